"""Every query that runs often finds its rows by an index, however many there are.

The real functions are called and what they send is explained, so that a plan cannot be right for a
statement that nobody uses.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.store.making import NOW, apply_all, callback, delivery, open_inbox, open_writer
from tracker.core.starts import Budget, Period
from tracker.operations.retention import Ages, Pruner
from tracker.store import coordination
from tracker.store.engine import Database, migration_engine
from tracker.store.postgres import connect_postgres
from tracker.store.queries import batches, sheet_rows, spending, starts
from tracker.store.queries import overview as gauges
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import (
    SELECT_WAITING,
    STORE,
    UPDATE_APPLIED,
    causes,
    list_deliveries,
)
from tracker.store.queries.endpoints import delays, list_attempts, list_messages
from tracker.store.queries.search import SearchFilters, search_runs
from tracker.store.queries.sheet_rows import RowOutcome
from tracker.store.schema import runs
from tracker.store.url import DatabaseUrl
from tracker.store.writing.messages import (
    Attempt,
    Sending,
    due_times,
    enable,
    record_and_claim,
)
from tracker.store.writing.statements import LOCK_RUNS, postgres_statements

START = starts.StartRow(
    workspace_id="default",
    idempotency_key="key_1",
    technique_id="tech_1",
    fingerprint="",
    inputs=[],
    created_at=NOW,
)
SENDING = Sending(endpoint_id="point_1", holder="h", lease=timedelta(seconds=25))
RUNS = 6_000
"""Of these a hundred are active, half of them due; there are twenty techniques and workspaces."""
_MANY = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {RUNS}) "
_TIMES = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', julianday('2026-06-01 12:00:00') - {} / 1440.0)",
    "postgresql": "timestamptz '2026-06-01 12:00:00Z' - {} * interval '1 minute'",
}
_ROWS = {
    "runs": """INSERT INTO runs (run_id, status, progress, created_at, created_at_known,
        completed_at, output_count, standing, details, ranks, conflict, source, first_seen_at,
        callback_expected, tracking, settled_at, next_check_at, looks, checks, missing,
        technique_id, workspace_id)
        {many} SELECT 'run_' || i, CASE WHEN i <= 100 THEN 'running' ELSE 'completed' END, 0, {ago},
        {true}, {ago}, 0, CASE WHEN i <= 100 THEN 1 ELSE 5 END, 2, 0, {false}, 'history', {ago},
        {false}, CASE WHEN i <= 100 THEN 'active' ELSE 'settled' END,
        CASE WHEN i > 100 THEN {ago} END, CASE WHEN i <= 100 THEN {soon} END, 0, 0, 0,
        'tech_' || (i % 20), 'ws_' || (i % 20) FROM n""",
    "run_events": """INSERT INTO run_events (run_id, at, source, status, detail)
        {many} SELECT 'run_' || i, {ago}, 'poll', 'running', '{{}}' FROM n""",
    "deliveries": """INSERT INTO deliveries (delivery_id, run_id, received_at, last_received_at,
        receipts, outcome, body)
        {many} SELECT 'whd_' || i, 'run_' || i, {ago}, {ago}, 1,
        CASE WHEN i % 1000 = 0 THEN 'quarantined' ELSE 'applied' END, {bytes} FROM n""",
    "starts": """INSERT INTO starts (workspace_slot, idempotency_key, technique_id, fingerprint,
        inputs, state, created_at, run_id)
        {many} SELECT 'default', 'key_' || i, 'tech_' || (i % 20), '', '[]',
        CASE WHEN i <= 20 THEN 'sent' ELSE 'started' END, {ago},
        CASE WHEN i > 20 THEN 'run_' || i END FROM n""",
    "batches": """INSERT INTO batches (batch_id, workspace_slot, technique_id, name, created_at,
        launch, launch_at)
        {many} SELECT 'bat_' || i, 'default', 'tech_1', 'x.csv', {ago},
        CAST(CASE WHEN i <= 20 THEN '{{}}' END AS {json}), CASE WHEN i <= 20 THEN {ago} END
        FROM n""",
    "batch_rows": """INSERT INTO batch_rows (batch_id, position, line, row_digest, generation,
        attempt, idempotency_key)
        {many} SELECT 'bat_' || CASE WHEN i <= 2000 THEN i % 1000 + 1 ELSE 1001 END, i, i, i, 0, 0,
        'key_' || i FROM n""",
    "messages": """INSERT INTO messages (message_id, endpoint_id, event_id, event, run_id, body,
        event_at, created_at, state, attempts, next_attempt_at, delivered_at, last_attempt_at,
        lease_until, lease_holder)
        {many} SELECT 'msg_' || i, 'point_' || (i % 5), 'evt_' || i, 'run.settled', 'run_' || i,
        '{{}}', {ago}, {ago},
        CASE WHEN i <= 100 THEN 'pending' WHEN i <= 150 THEN 'failed' ELSE 'delivered' END, 1,
        CASE WHEN i <= 100 THEN {soon} END, CASE WHEN i > 150 THEN {ago} END, {ago},
        CASE WHEN i <= 10 THEN {soon} END, CASE WHEN i <= 10 THEN 'a worker' END FROM n""",
    "message_attempts": """INSERT INTO message_attempts (message_id, number, at, seconds)
        {many} SELECT 'msg_' || i, 1, {ago}, 0.1 FROM n""",
    "endpoints": """INSERT INTO endpoints (endpoint_id, url, events, filters, since, configured_at,
        state) {many} SELECT 'point_' || i, '', '[]', '{{}}', {first}, {ago}, 'enabled' FROM n
        WHERE i < 5""",
}


async def fill_tables(url: str) -> None:
    engine = migration_engine(DatabaseUrl.parse(url))
    at = _TIMES[engine.dialect.name]
    words = {
        "many": _MANY,
        "ago": at.format("i"),
        "soon": at.format("(50 - i)"),
        "first": at.format(RUNS),
    }
    if engine.dialect.name == "sqlite":
        words |= {"true": "1", "false": "0", "bytes": "x'00'", "json": "text"}
    else:
        words |= {"true": "true", "false": "false", "bytes": "'\\x00'::bytea", "json": "jsonb"}
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        for statement in _ROWS.values():
            await connection.execute(text(statement.format(**words).replace(":", "\\:")))
        if engine.dialect.name == "postgresql":
            await connection.execute(text("ANALYZE"))  # which the tracker never runs on SQLite
        await connection.commit()  # SQLite is in a transaction of ours all the same
    await engine.dispose()


@contextmanager
def heard() -> Iterator[list[tuple[str, Any]]]:
    """All statements that any engine sends within the block, with their parameters."""
    sent: list[tuple[str, Any]] = []

    def hear(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", hear)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", hear)


async def plans(db: Database, call: Callable[[Database], Awaitable[Any]]) -> str:
    """How the database goes about what `call` sends to it, with the planner's usual settings."""
    with heard() as sent:
        await call(db)
    engine = migration_engine(db.url)
    told = await explained(engine, sent)
    await engine.dispose()
    return told


async def explained(engine: AsyncEngine, sent: list[tuple[str, Any]]) -> str:
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    told = []
    async with engine.connect() as connection:
        for statement, parameters in sent:
            if statement.lstrip().startswith(("SELECT", "WITH", "UPDATE", "INSERT", "DELETE")):
                rows = await connection.exec_driver_sql(explain + statement, parameters)
                told += [str(row[-1]) for row in rows]
    assert told
    return "\n".join(told)


QUERIES: dict[str, tuple[Callable[[Database], Awaitable[Any]], str]] = {
    "claiming what is due": (
        lambda db: coordination.claim_due(
            db, holder="h", now=NOW, lease=timedelta(seconds=60), limit=10
        ),
        "ix_runs_due",
    ),
    "claiming what is due in some workspaces": (
        lambda db: coordination.claim_due(
            db, holder="h", now=NOW, lease=timedelta(60), limit=10, workspaces=["ws_1", None]
        ),
        "ix_runs_due",
    ),
    "claiming what has ended": (
        lambda db: coordination.claim_due(
            db,
            holder="h",
            now=NOW,
            lease=timedelta(60),
            limit=10,
            which=coordination.Due.NEWEST_ENDS,
        ),
        "ix_runs_due",
    ),
    "where runs stand in FLORA's list": (
        lambda db: coordination.list_positions(db, ["run_1", "run_2"], ["ws_1", None], among=200),
        "ix_runs_newest",
    ),
    "the next moment that something is due": (
        lambda db: coordination.next_due_at(db, now=NOW),
        "ix_runs_due",
    ),
    "giving claims back": (lambda db: coordination.release(db, "h"), "ix_runs_due"),
    "runs": (read.list_runs, "ix_runs_newest"),
    **{
        f"runs that are {status}": (
            partial(read.list_runs, status=status),
            "ix_runs_newest_not_completed",
        )
        for status in ("pending", "running", "failed")
    },
    **{
        f"runs that are {tracking}": (
            partial(read.list_runs, tracking=tracking),
            "ix_runs_newest_not_settled",
        )
        for tracking in ("active", "lost")
    },
    "runs that are completed": (partial(read.list_runs, status="completed"), "ix_runs_newest"),
    "runs that are settled": (partial(read.list_runs, tracking="settled"), "ix_runs_newest"),
    "runs by technique": (
        lambda db: read.list_runs(db, technique_id="tech_1"),
        "ix_runs_newest_of_a_technique",
    ),
    "runs by workspace": (
        lambda db: read.list_runs(db, workspace_id="ws_1"),
        "ix_runs_newest_of_workspace",
    ),
    "one run": (lambda db: read.get_run(db, "run_1"), ""),
    "a timeline": (lambda db: read.events(db, "run_1"), "ix_run_events_timeline"),
    "durations": (lambda db: read.durations_of(db, ["tech_1", "tech_2"]), "ix_runs_durations"),
    "callbacks": (list_deliveries, "ix_deliveries_newest"),
    "callbacks in quarantine": (
        lambda db: list_deliveries(db, outcome="quarantined"),
        "ix_deliveries_quarantined",
    ),
    "callbacks that nobody has acknowledged": (
        lambda db: list_deliveries(db, outcome="quarantined", acknowledged=False),
        "ix_deliveries_quarantined",
    ),
    "causes of quarantine": (
        lambda db: causes(db, limit=10),
        "ix_deliveries_quarantined",
    ),
    "callbacks of a run": (
        lambda db: list_deliveries(db, run_id="run_1"),
        "ix_deliveries_run",
    ),
    "messages": (list_messages, "ix_messages_newest"),
    "messages of an endpoint": (
        lambda db: list_messages(db, endpoint_id="point_1"),
        "ix_messages_newest_of_endpoint",
    ),
    **{
        f"messages that are {state}": (partial(list_messages, state=state), "ix_messages_")
        for state in ("pending", "failed")
    },
    "messages of a rare event": (
        partial(list_messages, event="run.lost"),
        "ix_messages_newest_not_settled",
    ),
    "messages of a run": (lambda db: list_messages(db, run_id="run_1"), "ix_messages_run"),
    "the attempts of a message": (lambda db: list_attempts(db, "msg_1"), ""),
    "delays of an endpoint": (
        lambda db: delays(db, "point_1", since=NOW - timedelta(days=1)),
        "ix_messages_newest_of_endpoint",
    ),
    "when messages are due": (
        lambda db: due_times(db, [SENDING], now=NOW),
        "ix_messages_due",
    ),
    "open starts": (starts.open_starts, "ix_starts_open"),
    "starts in doubt": (starts.open_starts, "ix_starts_in_doubt"),
    "starts that may be a run": (
        lambda db: starts.that_may_be(db, "run_1"),
        "ix_starts_unresolved",
    ),
    "known origins": (
        lambda db: starts.possible(db, START, ["run_1", "run_2"]),
        "ix_starts_run",
    ),
    "runs known before a start": (
        lambda db: starts.newest_known(db, "default", before=NOW),
        "ix_runs_newest_of_workspace",
    ),
    "rival starts": (
        lambda db: starts.rivals(db, "default", "tech_1", "key_1"),
        "ix_starts_unresolved",
    ),
    "starts of a workspace whose outcome is not known": (
        lambda db: starts.list_starts(db, workspace_id="default", limit=50),
        "ix_starts_unresolved",
    ),
    "batches to launch": (
        lambda db: batches.claim_due(db, ["default"], holder="h", now=NOW, limit=10),
        "ix_batches_open",
    ),
    "batches to close": (lambda db: batches.finish_ended(db, NOW), "ix_batches_open"),
    "why rows of a batch failed": (lambda db: sheet_rows.error_groups(db, "bat_1"), "batch_rows"),
    "failed rows of a batch": (
        lambda db: batches.entries(db, "bat_1", outcome=RowOutcome.FAILED, limit=100),
        "batch_rows",
    ),
    "whether there are generation runs": (
        lambda db: read.has_generations(db, ["ws_1", None]),
        "ix_runs_generations",
    ),
}


async def test_queries_use_their_index(full: Database) -> None:
    """Each of them goes through the index that is there for it, and reads no table whole."""
    for name, (call, index) in QUERIES.items():
        told = await plans(full, call)
        assert index in told, f"{name}:\n{told}"
        assert not _reads_a_table(told), f"{name}:\n{told}"


async def test_a_large_batch_leads_to_its_runs_by_their_keys(full: Database) -> None:
    """Starts and runs of other batches are not read, however many rows this one has."""
    with heard() as sent:
        await batches.batch_counts(full, ["bat_1001"])
        await batches.entries(full, "bat_1001", outcome=RowOutcome.FAILED, limit=100)
        await sheet_rows.error_groups(full, "bat_1001")
        for of_runs in sheet_rows.of_several_runs(["bat_1001"]):
            await full.fetch(of_runs.add_columns(runs.c.charged_cost))
        await full.fetch(sheet_rows.run_ids_of(["bat_1001"]))
    told = await explained(full.engine, sent)
    # PostgreSQL reads the rows once to find the ids of their runs.
    reads = 6 if full.dialect == "postgresql" else 7
    assert len(re.findall("pk_starts|sqlite_autoindex_starts_1", told)) == reads, told
    assert "ix_runs_start" in told
    assert not re.search("Seq Scan on (starts|runs)", told), told
    assert not re.search("SCAN (starts|runs)", told), told


async def test_starts_lead_to_their_further_runs_by_their_keys(full: Database) -> None:
    """The other runs of their workspace are not read."""
    keys = ["key_21", "key_22"]
    rows = (await starts.of_keys(full, "default", keys)).values()
    several = [replace(row, run_count=2) for row in rows]
    assert "ix_runs_start" in await plans(full, partial(starts.runs_of, rows=several))


async def test_a_search_of_a_rare_status_reads_its_window_alone(full: Database) -> None:
    """In the order of the index, where PostgreSQL would sort all runs of the status if it expected
    fewer than the window holds."""
    wanted = SearchFilters(state="running", text="nowhere")
    told = await plans(full, partial(search_runs, wanted=wanted, window=50))
    assert "ix_runs_newest_not_completed" in told
    assert "Sort" not in told, told


async def test_a_tag_is_found_by_its_index(full: Database) -> None:
    """On SQLite whatever else is asked for: a technique or workspace mostly has more runs."""
    index = "ix_runs_newest_tagged" if full.dialect == "sqlite" else "ix_runs_"
    for more in ({}, {"technique_id": "tech_1"}, {"workspace_id": "ws_1"}):
        told = await plans(full, partial(read.list_runs, tag="order=7", **more))
        assert index in told, f"{more}:\n{told}"
        assert not _reads_a_table(told), told


async def test_the_next_pages_use_it_too(full: Database) -> None:
    """A page deep in a listing costs no more than the first."""
    _, cursor = await read.list_runs(full, limit=3000)
    told = await plans(full, lambda db: read.list_runs(db, cursor=cursor))
    assert "ix_runs_newest" in told
    assert not _reads_a_table(told)
    assert "Filter" not in told  # the index is entered at the cursor, not read up to it


async def test_the_writer_finds_its_rows(full: Database) -> None:
    """A batch touches only its own rows: nothing is scanned, on the way in or out."""

    async def pass_some(db: Database) -> None:
        async with open_writer(db) as writer:
            await writer.submit_all([callback("run_5"), callback("run_500"), callback("run_new")])

    told = await plans(full, pass_some)
    assert not _reads_a_table(told), told


async def test_retention_finds_what_is_old(full: Database) -> None:
    """What it removes and what it leaves is found by indexes, however much there is of both."""
    age = timedelta(minutes=RUNS - 10)
    ages = Ages(runs=age, bodies=timedelta(minutes=RUNS - 20), keys=age)

    async def prune(db: Database) -> None:
        counts = await Pruner(database=db, clock=lambda: NOW).prune(ages)
        assert (counts["runs"], counts["bodies"]) == (11, 20)

    told = await plans(full, prune)
    told = told.replace("Seq Scan on run_outputs", "")  # which has no rows here
    assert "ix_runs_newest" in told
    assert "ix_deliveries_newest" in told
    assert not _reads_a_table(told), told


async def test_counting_reads_short_indexes(full: Database) -> None:
    """What a metric asks for does not grow with the history."""
    told = await plans(full, lambda db: gauges.counts(db, now=NOW))
    assert "ix_runs_due" in told
    assert "ix_deliveries_quarantined" in told
    assert not _reads_a_table(told), told


@pytest.mark.parametrize(
    "scope",
    [{}, {"workspace_id": "default"}, {"technique_id": "tech_1"}, {"tag": ("order", "7")}],
    ids=["everything", "workspace", "technique", "tag"],
)
async def test_the_use_of_a_budget_reads_short_indexes(
    full: Database, scope: dict[str, Any]
) -> None:
    """Each start is checked against its budgets: of the starts only those without a result are
    read, not all of the workspace or of the technique."""
    budget = Budget(usd=Decimal(9), period=Period.DAY, **scope)
    told = await plans(full, lambda db: spending.usages(db, [budget], now=NOW))
    read = re.findall(r"(?:SEARCH|SCAN) starts USING INDEX (\w+)|using (\w+) on starts", told)
    short = ["open", "in_doubt", "unresolved", "several"]
    assert ["".join(name) for name in read] == [f"ix_starts_{one}" for one in short], told
    assert not _reads_a_table(told), told


async def test_missing_callbacks_are_looked_for_among_the_newest_runs(full: Database) -> None:
    """Each scrape asks for them, and where no run was started with an address of its own, all runs
    would be read."""
    told = await plans(full, lambda db: starts.own_are_missing(db, now=NOW, among=RUNS // 60))
    if full.dialect == "sqlite":
        assert "SEARCH runs USING INDEX ix_runs_newest (created_at>?)" in told
    assert not _reads_a_table(told), told


async def test_a_scrape_reads_short_indexes(full: Database) -> None:
    """What Prometheus is told costs the same with any number of runs."""
    told = await plans(full, lambda db: gauges.read_gauges(db, now=NOW))
    assert "ix_runs_due" in told
    assert "ix_deliveries_quarantined" in told
    assert "ix_deliveries_newest" in told
    assert not _reads_a_table(told), told


def _reads_a_table(plan: str) -> bool:
    tables = (
        *("runs", "run_events", "run_outputs", "deliveries", "starts", "batches", "batch_rows"),
        *("messages", "message_attempts"),
    )
    for line in plan.splitlines():
        if any(f"Seq Scan on {table}" in line for table in tables):
            return True
        if line.startswith("SCAN ") and "USING" not in line and line.split()[1] in tables:
            return True
    return False


async def test_applying_finds_what_waits(full: Database) -> None:
    """Few deliveries wait among many, and their index holds these alone."""

    async def apply(db: Database) -> None:
        async with open_inbox(db) as inbox:
            await asyncio.gather(*(inbox.store(delivery(run)) for run in ("run_5", "run_new")))
        assert await apply_all(db) == 2

    told = await plans(full, apply)
    assert "ix_deliveries_waiting" in told
    assert not _reads_a_table(told), told


async def test_sending_finds_what_is_due(full: Database) -> None:
    """Claims, and outcomes of attempts, touch only rows of their own, also after an outage."""

    async def take(db: Database) -> None:
        for outcomes in ([], [("msg_101", Attempt(at=NOW, seconds=1, status=200))]):
            turn = partial(record_and_claim, sending=SENDING, outcomes=outcomes, now=NOW, most=5)
            await db.write(turn)
        assert await enable(db, "point_1", now=NOW)
        assert (await db.write(turn)).claims

    told = await plans(full, take)
    assert "ix_messages_due" in told
    assert "ix_messages_leased" in told
    assert not _reads_a_table(told), told


def _text(statement: Any) -> str:
    return str(statement.compile(dialect=postgresql.asyncpg.dialect()))


@pytest.mark.parametrize(
    ("statement", "values", "index"),
    [
        (_text(LOCK_RUNS), "ARRAY['a', 'b']", "pk_runs"),
        (_text(SELECT_WAITING), "16384, ARRAY['a'], 10", "ix_deliveries_waiting"),
        (_text(UPDATE_APPLIED), "now(), ARRAY['a']", "pk_deliveries"),
        (
            _text(postgres_statements().write),
            "'[]', '[]', '[]', '[]', ARRAY['a'], '[]', '[]'",
            "pk_runs",
        ),
        (STORE, "'[]', '{}'", "pk_deliveries"),
    ],
    ids=["lock", "take", "applied", "write", "store"],
)
async def test_what_is_planned_while_a_table_is_empty_goes_by_the_index(
    postgres_url: str, statement: str, values: str, index: str
) -> None:
    """A statement is planned once: a writer's would read whole tables, if it went by the size that
    they had when the tracker began."""
    connection = await connect_postgres(
        DatabaseUrl.parse(postgres_url), "test", avoiding=["seqscan"]
    )
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    await connection.execute(f"PREPARE writer AS {statement}")
    rows = await connection.fetch(f"EXPLAIN EXECUTE writer({values})")
    await connection.close()
    plan = "\n".join(str(row[0]) for row in rows)
    assert index in plan
    assert "Seq Scan" not in plan
