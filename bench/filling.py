"""A database as it looks after a busy quarter, made in SQL: any number of runs within a minute.

They spread over the last ninety days, three workspaces and twenty techniques. One of a thousand, or
as many as are asked for, is still active, and of those half are overdue; most ends came by
callback. Each run has two lines of timeline and a delivery; the sweeps are those of a quarter. Runs
and deliveries are numbered, or have scattered ids, each of which comes to lie somewhere else in an
index.
"""

from typing import Final

from sqlalchemy import Connection

from tracker.store.engine import Database, migration_engine
from tracker.store.writing import rollups

DAYS: Final = 90
SWEEPS: Final = DAYS * 24 * 12 * 3
"""One every five minutes, for each workspace."""

_NUMBERS: Final = {
    "postgresql": "generate_series(1, {count}) AS n(i)",
    "sqlite": "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
    " SELECT i FROM n) AS n",
}
# Odd, and the golden ratio of 2**32: each number has one of its own, far from those before it.
SCATTER: Final = 2_654_435_761
_WORDS: Final[dict[str, dict[str, str]]] = {
    "postgresql": {
        "ago": "now() - ({0}) * interval '1 second'",
        "true": "true",
        "bytes": "'\\x7b7d'::bytea",
        "json": "'{}'::jsonb",
        "scattered": f"lpad(to_hex(i::bigint * {SCATTER} % 4294967296), 8, '0')"
        " || lpad(to_hex(i), 8, '0')",
    },
    "sqlite": {
        "ago": "strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', -({0})))",
        "true": "1",
        "bytes": "x'7b7d'",
        "json": "'{}'",
        "scattered": f"printf('%08x%08x', i * {SCATTER} % 4294967296, i)",
    },
}


async def fill(
    db: Database,
    count: int,
    *,
    sweeps: int = SWEEPS,
    active: int | None = None,
    scattered: bool = False,
) -> None:
    """Put that many runs, and what goes with them, into an empty database, and count them."""
    engine = migration_engine(db.url)
    async with engine.begin() as connection:
        if db.dialect == "postgresql":
            await connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        await connection.run_sync(_insert, count, active or count // 1000, sweeps, scattered)
    await engine.dispose()
    await rollups.recount(db)
    if db.dialect == "postgresql":
        await analyze(db)


async def analyze(db: Database) -> None:
    """Let PostgreSQL's planner know what is there, as autovacuum would. The tracker never does so
    on SQLite."""
    engine = migration_engine(db.url)
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.exec_driver_sql("SET statement_timeout = 0")
        await connection.exec_driver_sql("VACUUM ANALYZE")
    await engine.dispose()


def _insert(connection: Connection, count: int, few: int, sweeps: int, scattered: bool) -> None:
    dialect = connection.dialect.name
    words = _WORDS[dialect]
    key = words["scattered"] if scattered else "i"

    def numbers(upto: int) -> str:
        return _NUMBERS[dialect].format(count=upto)

    def ago(seconds: str) -> str:
        return words["ago"].format(seconds)

    # Seconds since its creation: the newest runs are the last ones.
    age = f"({count} - i) * {DAYS * 86400.0 / count}"
    took = "(20 + i % 40)"
    every = max(count // max(few, 1), 10)
    active = f"(i % {every} = 7)"
    via = "CASE WHEN i % 25 = 1 THEN 'poll' WHEN i % 40 = 2 THEN 'history' ELSE 'callback' END"
    seen = f"{age} - {took} - CASE WHEN {via} = 'callback' THEN 0.3 + i % 3 ELSE 15 + i % 60 END"
    failed = "(i % 17 = 3)"

    def ended(value: str) -> str:
        return f"CASE WHEN NOT {active} THEN {value} END"

    yes, no = words["true"], f"NOT {words['true']}"
    statements = [
        f"""INSERT INTO techniques (technique_id, name, inputs, outputs, synced_at)
            SELECT 'tech_' || i, 'Technique ' || i, {words["json"]}, {words["json"]}, {ago("0")}
            FROM {numbers(20)}""",
        f"""INSERT INTO runs (run_id, run_type, workspace_id, technique_id, technique_name, status,
            progress, created_at, created_at_known, started_at, completed_at, charged_cost,
            output_count, standing, details, ranks, conflict, source, first_seen_at, callback_at,
            callback_expected, ended_via, end_seen_at, tracking, settled_at, next_check_at, looks,
            checks, missing)
        SELECT 'run_' || {key}, 'technique', 'ws_' || (i % 3), 'tech_' || (1 + i * 7 % 20),
            'Technique',
            CASE WHEN {active} THEN 'running' WHEN {failed} THEN 'failed' ELSE 'completed' END,
            50, {ago(age)}, {yes}, {ago(age)}, {ended(ago(f"{age} - {took}"))},
            {ended("(i % 90) / 100.0")}, 0,
            CASE WHEN {active} THEN 1 WHEN {failed} THEN 4 ELSE 5 END,
            CASE WHEN {active} THEN 0 ELSE 2 END, 0, {no}, 'start', {ago(age)},
            CASE WHEN {via} = 'callback' AND NOT {active} THEN {ago(seen)} END, {yes},
            {ended(via)}, {ended(ago(seen))},
            CASE WHEN {active} THEN 'active' ELSE 'settled' END,
            {ended(ago(f"{seen} - 1"))},
            CASE WHEN {active} THEN {ago("i % 2000 - 900")} END, 0, 1, 0
        FROM {numbers(count)}""",
        *(
            f"""INSERT INTO run_events (run_id, at, source, status, detail)
            SELECT 'run_' || {key}, {at}, '{source}', '{status}', {words["json"]}
            FROM {numbers(count)}"""
            for source, status, at in (
                ("start", "pending", ago(age)),
                ("callback", "completed", ago(seen)),
            )
        ),
        f"""INSERT INTO deliveries (delivery_id, run_id, workspace_id, event_type, received_at,
            last_received_at, receipts, outcome, reason, body)
        SELECT 'whd_' || {key}, 'run_' || {key}, 'ws_' || (i % 3), 'run.completed', {ago(seen)},
            {ago(seen)}, 1, CASE WHEN i % {5 * every} = 9 THEN 'quarantined' ELSE 'applied' END,
            CASE WHEN i % {5 * every} = 9 THEN 'not a JSON object' END, {words["bytes"]}
        FROM {numbers(count)}""",
        f"""INSERT INTO starts (workspace_slot, workspace_id, idempotency_key, technique_id,
            fingerprint, inputs, state, created_at, run_id)
        SELECT 'ws_' || (i % 3), 'ws_' || (i % 3), 'key_' || {key}, 'tech_' || (1 + i * 7 % 20),
            '', {words["json"]},
            CASE WHEN i % {10 * every} = 5 THEN 'unresolved' WHEN i % {10 * every} = 6 THEN 'sent'
                ELSE 'started' END,
            {ago(age)}, CASE WHEN i % {10 * every} NOT IN (5, 6) THEN 'run_' || {key} END
        FROM {numbers(count)}""",
        f"""INSERT INTO sweeps (workspace_id, started_at, finished_at, pages, items, discovered,
            repaired, unreadable, through, error)
        SELECT 'ws_' || (i % 3), {ago(f"({sweeps} - i) * {DAYS * 86400.0 / sweeps}")},
            {ago(f"({sweeps} - i) * {DAYS * 86400.0 / sweeps} - 2")}, 1, 40, 0, i % 2, 0,
            CASE WHEN i % 100 <> 5 THEN
                {ago(f"({sweeps} - i) * {DAYS * 86400.0 / sweeps} + 60")} END,
            CASE WHEN i % 100 = 5 THEN 'FLORA answered 503' END
        FROM {numbers(sweeps)}""",
    ]
    for statement in statements:
        connection.exec_driver_sql(statement)
