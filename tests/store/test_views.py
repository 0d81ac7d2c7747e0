"""The views for dashboards: the same on both databases, documented, and no scan of all runs."""

import re
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import Connection, inspect, text

from bench.filling import fill
from tests.store.test_plans import plans
from tracker.core.clock import utc_now
from tracker.store.engine import Database
from tracker.store.queries import overview, sweeps

PAGE = Path(__file__).parents[2] / "docs" / "views.md"
RUNS = 3_000

VIEWS = (
    *("v_run_states", "v_ends_hourly", "v_lags_hourly", "v_callback_health", "v_cost_daily"),
    *("v_failures_daily", "v_spending_daily", "v_spending_daily_by_tag"),
    *("v_overdue_runs", "v_sweeps", "v_open_starts", "v_quarantine"),
)
BIG = ("runs", "run_events", "run_outputs", "deliveries", "starts", "sweeps")


def documented() -> dict[str, list[str]]:
    """The columns of each view as the page has them."""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        name = re.match(r"`(v_\w+)`", part)
        if name is not None:
            found[name[1]] = re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)
    return found


async def test_each_column_is_documented(db: Database) -> None:
    """The page names every view and every column, in order, and no others."""

    def columns(connection: Connection) -> dict[str, list[str]]:
        looker = inspect(connection)
        return {
            view: [column["name"] for column in looker.get_columns(view)]
            for view in looker.get_view_names()
            if view.startswith("v_")
        }

    async with db.read() as connection:
        found = await connection.run_sync(columns)
    assert set(found) == set(VIEWS)
    assert found == documented()


async def test_the_documented_types_hold(postgres_url: str) -> None:
    """On PostgreSQL each column has the type that the page gives."""
    page = dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", PAGE.read_text(), re.MULTILINE))
    connection = await asyncpg.connect(postgres_url)
    found = await connection.fetch(
        "SELECT attrelid::regclass::text AS view, attname, format_type(atttypid, NULL) AS type "
        "FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid "
        "WHERE relkind = 'v' AND relname LIKE 'v\\_%' ORDER BY 1, attnum"
    )
    await connection.close()
    short = {"timestamp with time zone": "timestamptz"}
    wrong = [
        tuple(row)
        for row in found
        if short.get(row["type"], row["type"]) != page.get(row["attname"])
    ]
    assert len(found) > 80
    assert wrong == []


async def test_the_examples_on_the_page_work(postgres_url: str) -> None:
    """Every query that the page shows can be run as it stands."""
    queries = re.findall(r"```sql\n(SELECT.*?)```", PAGE.read_text(), re.S)
    assert len(queries) == 3
    connection = await asyncpg.connect(postgres_url)
    for query in queries:
        await connection.fetch(query)
    await connection.close()


async def test_the_role_can_read_the_views_and_nothing_else(postgres_url: str) -> None:
    """The recipe on the page gives a role that sees every view, no table, and writes nothing."""
    recipe, more = re.findall(r"```sql\n((?:CREATE|GRANT).*?)```", PAGE.read_text(), re.S)
    owner = await asyncpg.connect(postgres_url)
    role = "dashboards_" + (await owner.fetchval("SELECT current_database()"))
    try:
        await owner.execute(re.sub(r"\bdashboards\b", role, recipe))
        guest = await asyncpg.connect(postgres_url, user=role, password="choose one")
        for view in VIEWS:
            await guest.fetch(f"SELECT * FROM {view}")
        await guest.execute("SET default_transaction_read_only = off")
        for statement in (
            "SELECT * FROM runs",
            "SELECT body FROM deliveries",
            "SELECT * FROM run_tallies",
            "UPDATE v_overdue_runs SET status = 'failed'",
            "DELETE FROM runs",
            "CREATE TABLE t ()",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await guest.execute(statement)
        await owner.execute(re.sub(r"\bdashboards\b", role, more))
        await guest.fetch("SELECT * FROM runs, run_outputs, run_events, sweeps, techniques")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await guest.execute("DELETE FROM runs")
        await guest.close()
    finally:
        await owner.execute(f'DROP OWNED BY "{role}"')
        await owner.execute(f'DROP ROLE "{role}"')
        await owner.close()


def views() -> dict[str, str]:
    """Each view, whole and as a dashboard asks for the last day of it."""
    since = {"v_ends_hourly": "hour", "v_lags_hourly": "hour", "v_cost_daily": "day"}
    asked = {view: f"SELECT * FROM {view}" for view in VIEWS}
    return asked | {
        f"the last day of {view}": f"SELECT * FROM {view} WHERE {column} >= '{utc_now():%Y-%m-%d}'"
        for view, column in since.items()
    }


async def test_nothing_reads_all_runs(db: Database) -> None:
    """With many rows every view, and all that the overview asks, goes through indexes and
    rollups."""
    await fill(db, RUNS)
    now = utc_now()

    async def ask(db: Database, query: str) -> None:
        async with db.read() as connection:
            await connection.execute(text(query.replace(":", "\\:")))

    asked = {name: (lambda db, query=query: ask(db, query)) for name, query in views().items()}
    asked |= {
        "states": overview.states,
        "ends": lambda db: overview.ends_by_hour(db, now=now, hours=48),
        "callbacks": lambda db: overview.callback_health(db, now=now),
        "lags": lambda db: overview.lags(db, now=now),
        "costs": lambda db: overview.costs(db, now=now, days=7),
        "overdue": lambda db: overview.overdue(db, now=now),
        "sweeps": sweeps.sweep_health,
    }
    assert reads_whole(await plans(db, lambda db: ask(db, "SELECT sum(checks) FROM runs")))
    for name, call in asked.items():
        told = await plans(db, call)
        assert not reads_whole(told), f"{name}:\n{told}"
        if name in ("ends", "callbacks", "lags", "costs"):
            assert reads_a_part(told, db.dialect), f"{name}:\n{told}"


def reads_whole(plan: str) -> bool:
    """Whether one of the tables that grow is read from end to end.

    SQLite scans an index of some rows alone, which is what such an index is for.
    """
    partial = (
        *("ix_starts_open", "ix_starts_in_doubt", "ix_starts_unresolved"),
        *("ix_deliveries_quarantined", "ix_runs_due"),
    )
    for line in plan.splitlines():
        if any(f"Seq Scan on {table} " in line + " " for table in BIG):
            return True
        if any(f"Index Scan using pk_{table}" in line for table in BIG) and "loops" in line:
            return True
        words = line.split()
        scans = words[:1] == ["SCAN"] and words[1] in (*BIG, "s", "newest", "complete", "reached")
        if scans and not any(name in line for name in partial):
            return True
    return False


def reads_a_part(plan: str, dialect: str) -> bool:
    """Whether only the rollups of the hours that were asked for are read."""
    if dialect == "sqlite":
        return "run_tallies USING PRIMARY KEY (measure=? AND since>?)" in plan
    return "since >= " in plan and "Seq Scan on run_tallies " not in plan + " "
