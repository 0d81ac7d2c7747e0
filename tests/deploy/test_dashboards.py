"""The Grafana dashboards: what the script makes, and every query in them has an answer."""

import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import yaml

from tests.deploy.conftest import ROOT, Promtool, names_in
from tests.store.making import NOW, callback, open_writer, quarantined, seen, started
from tracker.core.run import RunStatus
from tracker.store.engine import Database

GRAFANA = ROOT / "deploy/grafana"
FILES = {path.stem: json.loads(path.read_text()) for path in (GRAFANA / "dashboards").glob("*")}
PANELS = [(page, one) for page in FILES for one in FILES[page]["panels"] if one["type"] != "row"]


def told(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The queries of one kind of source, each with the title of its panel."""
    return [
        (f"{page}: {panel['title']}", target)
        for page, panel in PANELS
        for target in panel["targets"]
        if target["datasource"]["type"] == kind
    ]


def as_grafana_sends(sql: str, *, workspaces: str = "'ws_1', 'unknown'") -> str:
    """The SQL with Grafana's words in it replaced."""
    since = f"'{(NOW - timedelta(days=7)).isoformat()}'"
    until = f"'{(NOW + timedelta(hours=1)).isoformat()}'"
    sql = re.sub(r"\$__timeFilter\((\w+)\)", rf"\1 BETWEEN {since} AND {until}", sql)
    sql = sql.replace("$__timeFrom()", since).replace("$__timeTo()", until)
    sql = sql.replace("${workspace:sqlstring}", workspaces)
    assert "$" not in sql, sql
    return sql


def as_prometheus_gets(expression: str) -> str:
    """The PromQL with Grafana's words in it replaced."""
    expression = expression.replace("$__rate_interval", "1m").replace("$workspace", ".*")
    assert "$" not in expression, expression
    return expression


def test_the_files_are_what_the_script_makes() -> None:
    """Nobody edits them by hand; `python deploy/grafana/generate.py` writes them."""
    command = [sys.executable, GRAFANA / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert FILES.keys() == {"service", "runs"}


@pytest.fixture
async def filled(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A database in which each view has something to show, as the role that dashboards have."""
    ended = {"workspace_id": "ws_1", "technique_id": "tech_1", "created_at": NOW}
    done = {**ended, "completed_at": NOW, "charged_cost": 1, "outputs": ()}
    async with await Database.open(postgres_url) as db, open_writer(db) as writer:
        await writer.submit_all(
            [
                *(started(run, facts=ended) for run in ("run_1", "run_2", "run_3")),
                callback("run_1"),
                quarantined("whd_x"),
            ]
        )
        later = NOW + timedelta(seconds=30)
        await writer.submit_all(
            [
                seen("run_1", RunStatus.COMPLETED, at=later, facts=done, reads=1),
                seen("run_2", RunStatus.COMPLETED, at=later, facts=done, reads=1),
            ]
        )
    recipe = re.findall(r"```sql\n(CREATE ROLE.*?)```", (ROOT / "docs/views.md").read_text(), re.S)
    role = f"dashboards_{uuid4().hex}"  # roles are the whole server's
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(re.sub(r"\bdashboards\b", role, recipe[0]))
    await connection.execute(f"SET ROLE {role}")
    yield connection
    await connection.execute("RESET ROLE")
    await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    await connection.close()


async def test_every_sql_query_runs_as_the_read_only_role(filled: asyncpg.Connection) -> None:
    """On the real schema; what goes into a chart has its time in front, and rows in order."""
    queries = told("grafana-postgresql-datasource")
    assert len(queries) > 12
    answered = 0
    for title, target in queries:
        rows = await filled.fetch(as_grafana_sends(target["rawSql"]))
        answered += bool(rows)
        if target["format"] == "time_series" and rows:
            assert next(iter(rows[0].keys())) == "time", title
            times = [row["time"] for row in rows]
            assert times == sorted(times), title
    assert answered > len(queries) / 2


async def test_the_figures_are_right(filled: asyncpg.Connection) -> None:
    """A few of them, against what was put in."""
    by_title = {title: target["rawSql"] for title, target in told("grafana-postgresql-datasource")}

    async def ask(title: str, **more: str) -> list[tuple[Any, ...]]:
        sql = as_grafana_sends(by_title[f"runs: {title}"], **more)
        return [tuple(row) for row in await filled.fetch(sql)]

    assert await ask("Open runs") == [(1,)]
    assert await ask("Cost") == [(2.0,)]
    assert await ask("Cost", workspaces="'ws_of_others'") == [(0.0,)]
    assert await ask("Missed callbacks") == [(0.5,)]
    assert await ask("Quarantined") == [(1,)]
    hour = NOW.replace(minute=0, second=0, microsecond=0)
    assert await ask("Finished runs per hour, by source") == [
        (hour, "callback", 1),
        (hour, "poll", 1),
    ]
    ((_, p50, p95),) = await ask("Detection delay")
    assert (p50, p95) == (0.1, 30)


async def test_the_choice_of_workspaces_is_never_empty(filled: asyncpg.Connection) -> None:
    """An empty list would make every other query wrong."""
    (variable,) = [one for one in FILES["runs"]["templating"]["list"] if one["name"] == "workspace"]
    assert [row[0] for row in await filled.fetch(variable["query"])] == ["unknown", "ws_1"]


def test_every_promql_query_names_metrics_that_there_are(series: set[str]) -> None:
    """A renamed metric would leave a panel empty."""
    queries = told("prometheus")
    assert len(queries) > 30
    for title, target in queries:
        names = names_in(target["expr"])
        assert names, title
        assert names <= series, title
    (variable,) = [
        one for one in FILES["service"]["templating"]["list"] if one["name"] == "workspace"
    ]
    assert names_in(variable["query"]) <= series


def test_every_metric_is_on_the_dashboard_or_explained_elsewhere(exposed: dict[str, str]) -> None:
    """What nobody looks at need not be counted; the rest is for alerts and for the curious."""
    shown = set().union(*(names_in(target["expr"]) for _, target in told("prometheus")))
    alerts = names_in((ROOT / "deploy/prometheus/alerts.yml").read_text())
    unseen = {
        name
        for name in exposed
        if name.startswith("tracker_") and not any(one.startswith(name) for one in shown | alerts)
    }
    assert unseen == {
        *("tracker_adopted_runs_total", "tracker_history_verified_timestamp_seconds"),
        *("tracker_oldest_due_seconds", "tracker_starts_open", "tracker_sweep_items_total"),
    }


def test_every_promql_query_parses(promtool: Promtool, tmp_path: Path) -> None:
    """Prometheus itself reads them."""
    rules = [
        {"record": f"panel:{number}", "expr": as_prometheus_gets(target["expr"])}
        for number, (_, target) in enumerate(told("prometheus"))
    ]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", file)


def test_every_panel_says_how_to_read_it() -> None:
    """A title, a description, a unit, a place of its own, and the source that was chosen."""
    for page, panel in PANELS:
        assert panel["title"], page
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
    for page, content in FILES.items():
        places = [(one["gridPos"]["x"], one["gridPos"]["y"]) for one in content["panels"]]
        assert len(set(places)) == len(places), page
        ids = [one["id"] for one in content["panels"] if one["type"] != "row"]
        assert len(set(ids)) == len(ids), page


def test_ids_in_tables_lead_to_the_pages_of_the_tracker() -> None:
    """Each table with runs or deliveries links them, at the address that the dashboard is given."""
    (tracker,) = [one for one in FILES["runs"]["templating"]["list"] if one["name"] == "tracker"]
    assert tracker["query"].startswith("http")
    linked = {
        (override["matcher"]["options"], link["url"].partition("${__value")[0])
        for _, panel in PANELS
        for override in panel["fieldConfig"]["overrides"]
        for one in override["properties"]
        for link in one["value"]
    }
    assert {("run_id", "${tracker}/runs/"), ("delivery_id", "${tracker}/deliveries/")} <= linked


def test_the_provisioning_names_what_the_dashboards_ask_for() -> None:
    """A source for each kind of dashboard, without a password in the file."""
    folder = GRAFANA / "provisioning"
    sources = yaml.safe_load((folder / "datasources/tracker.yml").read_text())["datasources"]
    wanted = {
        one["query"]
        for content in FILES.values()
        for one in content["templating"]["list"]
        if one["name"] == "datasource"
    }
    assert {source["type"] for source in sources} == wanted
    secrets = [source.get("secureJsonData", {}) for source in sources]
    assert all(value.startswith("$") for one in secrets for value in one.values())
    (provider,) = yaml.safe_load((folder / "dashboards/tracker.yml").read_text())["providers"]
    assert provider["type"] == "file"


def test_the_example_for_prometheus_fits_the_rest() -> None:
    """It scrapes with the token, and in the interval that Grafana is told of."""
    example = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert "credentials_file" in example["scrape_configs"][0]["authorization"]
    sources = (GRAFANA / "provisioning/datasources/tracker.yml").read_text()
    assert f"timeInterval: {example['global']['scrape_interval']}" in sources
