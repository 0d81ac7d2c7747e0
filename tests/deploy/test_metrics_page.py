"""`docs/metrics.md` names every metric and every log event, and no other."""

import ast
import re
from collections.abc import Iterator
from typing import get_args

import pytest

from tests.deploy.conftest import ROOT, Promtool
from tracker.operations import metrics
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.web import auth

PAGE = (ROOT / "docs/metrics.md").read_text()
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading."""
    section = re.split(r"^#+ ", PAGE.split(f" {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    rows = [row for row in section.splitlines() if row.startswith("| `")]
    return [[cell.strip() for cell in row.strip()[1:-1].split("|")] for row in rows]


@pytest.fixture
async def services(sqlite_url: str) -> Services:
    """Services that know a workspace with a key."""
    settings = Settings(
        tracker_database_url=sqlite_url, flora_api_key="sk_test_1", flora_workspace_id="ws_1"
    )
    async with open_services(settings) as services:
        yield services


def labels_of(services: Services) -> dict[str, set[str]]:
    """The labels of every metric, by the name that the page has for it."""
    found: dict[str, set[str]] = {}
    for collector in services.metrics.registry._collector_to_names:
        named = hasattr(collector, "_labelnames")
        for metric in collector.describe() if named else collector.collect():
            total = "_total" if metric.type == "counter" else ""
            source = collector if named else metric
            found[metric.name + total] = set(source._labelnames)
    return found


async def test_every_metric_is_described(services: Services, exposed: dict[str, str]) -> None:
    """With its type and its labels."""
    described = {
        name.strip("`"): (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _ in table("Work") + table("State")
    }
    await services.metrics.exposition()
    labels = labels_of(services)
    assert described == {
        name: (kind, labels[name])
        for name, kind in exposed.items()
        if not name.startswith("process_")
    }


async def test_what_is_exposed_is_as_prometheus_wants_it(
    services: Services, promtool: Promtool
) -> None:
    """The format, and the names: `promtool` finds nothing to blame."""
    text = (await services.metrics.exposition())[0].decode()
    assert promtool("check", "metrics", given=text) == ""


def test_every_reason_and_outcome_is_described() -> None:
    """The values of a label that are few and fixed stand in the row of their metric."""
    rows = {name.strip("`"): meaning for name, _, _, meaning in table("Work")}
    for metric, words in (
        ("tracker_callbacks_total", metrics.RECEIVED),
        ("tracker_callbacks_applied_total", metrics.APPLIED),
        ("tracker_callbacks_refused_total", metrics.REFUSALS),
        ("tracker_auth_refused_total", metrics.AUTH_REFUSALS),
        ("tracker_database_write_failures_total", metrics.WRITE_FAILURES),
        ("tracker_run_ends_total", [source.value for source in metrics.ENDED_BY]),
        ("tracker_sweeps_total", metrics.SWEEP_RESULTS),
    ):
        assert set(words) <= set(re.findall(r"`(\w+)`", rows[metric])), metric


def test_every_refusal_is_one_of_those_counted_from_the_beginning() -> None:
    """What `tracker.web.callbacks` says when it refuses is known to the metrics."""
    tree = ast.parse((ROOT / "tracker/web/callbacks.py").read_text())
    said = {
        leaf.value.replace(" ", "_")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._refused"
        for leaf in ast.walk(node.args[0])
        if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
    }
    assert len(said) > 5
    assert said <= set(metrics.REFUSALS)
    assert set(get_args(auth.Reason)) == set(metrics.AUTH_REFUSALS)


def logged() -> Iterator[tuple[str, str]]:
    """Each event that the code logs, with its level."""
    code = [*(ROOT / "tracker").rglob("*.py"), *(ROOT / "migrations").rglob("*.py")]
    for path in sorted(code):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and ast.unparse(node.func.value) == "log"
            ):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                event = node.args[0]
                assert isinstance(event, ast.Constant), f"{where}: an event is a constant"
                level = "error" if node.func.attr == "exception" else node.func.attr
                yield str(event.value), level


def test_every_log_event_is_described() -> None:
    """With its level; an event that is new goes into the table of docs/metrics.md."""
    described = {(event.strip("`"), level) for event, level, _ in table("The log")}
    assert described == set(logged())


def test_log_events_are_named_in_one_way() -> None:
    """`what.happened`, or one word for the process itself; loggers are all called `log`."""
    for event, _ in logged():
        assert re.fullmatch(r"[a-z]+(\.[a-z_]+)?", event), event
    for path in (ROOT / "tracker").rglob("*.py"):
        made = re.findall(r"^(\w+) = get_logger", path.read_text(), re.M)
        assert set(made) <= {"log"}, path
