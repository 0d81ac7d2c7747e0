"""What updates do to PostgreSQL's tables: how many stay in their page, and how far they grow.

    python -m bench.churn [--runs 40000] [--active 2000] [--rounds 40] [--json FILE]

Each variant of the storage settings has a database of its own on a PostgreSQL that this starts,
filled with the settled runs of a quarter. Then active runs are polled round after round through the
real claims and writer, callbacks are repeated, starts go through the start log, and the rollups are
compacted; in each round retention removes the runs of the oldest day and the bodies of another,
while as many new runs come and settle. An update that touches no index and finds room in its page
is *HOT*: it costs no index entry, and what it leaves behind needs no vacuum. The server's
autovacuum looks every second, so that the minutes of this stand for the days of a deployment.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg

from bench.filling import DAYS, fill
from tests.store.making import callback, open_writer, seen, started
from tests.support.databases import Background, PostgresDatabases
from tests.support.postgres import PostgresServer
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import RunStatus
from tracker.operations.retention import Ages, Pruner
from tracker.store import coordination, migrate
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.writing import rollups
from tracker.store.writing.writer import Writer

UPDATED: Final = ("runs", "deliveries", "starts", "run_tallies")
TABLES: Final = (*UPDATED, "run_events")
LEASE: Final = timedelta(seconds=30)
STARTS: Final = 50
"""Starts, and repeated callbacks, in each round."""
AT_ONCE: Final = 100
"""So many runs are claimed at a time, as the poller does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Storage settings to compare: what is run after the migrations, on empty tables."""

    name: str
    statements: tuple[str, ...] = ()


def _each(clause: str, *names: str) -> tuple[str, ...]:
    return tuple(f"ALTER TABLE {name} {clause}" for name in names)


_OURS: Final = (
    ", ".join(("fillfactor", "autovacuum_vacuum_scale_factor", "autovacuum_analyze_scale_factor"))
    + ", autovacuum_vacuum_insert_scale_factor"
)
VARIANTS: Final = (
    Variant(name="as migrated"),
    Variant(name="PostgreSQL's defaults", statements=_each(f"RESET ({_OURS})", *TABLES)),
    *(
        Variant(
            name=f"fillfactor {room}",
            statements=_each(f"SET (fillfactor = {room})", *UPDATED),
        )
        for room in (100, 90, 85, 70)
    ),
    # The only index on a column that moves with every look at a run.
    Variant(name="without ix_runs_due", statements=("DROP INDEX ix_runs_due",)),
)


async def churn(
    url: str, *, active: int, a_day: int, rounds: int, half: Callable[[], Awaitable[None]]
) -> None:
    """The work; `half` is called in the middle of it. A day has `a_day` runs."""
    now = utc_now()
    async with await Database.open(url) as db, open_writer(db) as writer:
        await writer.submit_all([started(f"active_{n}", at=now) for n in range(active)])
        for number in range(rounds):
            if number == rounds // 2:
                await half()
            now += timedelta(minutes=6)  # beyond the longest wait: all are due
            for _ in range(0, active, AT_ONCE):
                due = await coordination.claim_due(
                    db, holder="h", now=now, lease=LEASE, limit=AT_ONCE
                )
                facts = {"progress": min(99.0, number * 100 / rounds)}
                await writer.submit_all(
                    [seen(one.run.run_id, at=now, reads=1, claim="h", facts=facts) for one in due]
                )
            for n in range(STARTS):
                await _start(db, writer, f"key_{number}_{n}", now)
            again = [callback(f"run_{1 + n}", f"whd_{1 + n}", at=now) for n in range(STARTS)]
            await writer.submit_all(again)
            await _one_day(db, writer, number, now, a_day)
            await rollups.compact(db)


async def _one_day(db: Database, writer: Writer, number: int, now: datetime, runs: int) -> None:
    """The oldest day's runs go, with the bodies of a day in the middle, and as many runs come."""
    day = timedelta(days=1)
    ages = Ages(runs=(DAYS - 1 - number) * day, bodies=(DAYS // 2 - 1 - number) * day)
    await Pruner(database=db, clock=lambda: now, sleep=_no_rest).prune(ages)
    new = [f"run_of_day_{number}_{n}" for n in range(runs)]
    ended = {"charged_cost": 1, "completed_at": now}
    await writer.submit_all([started(run_id, at=now) for run_id in new])
    await writer.submit_all([callback(run_id, at=now) for run_id in new])
    await writer.submit_all(
        [seen(run_id, RunStatus.COMPLETED, at=now, reads=1, facts=ended) for run_id in new]
    )


async def _no_rest(_: float) -> None:
    await asyncio.sleep(0)


async def _start(db: Database, writer: Writer, key: str, now: datetime) -> None:
    """One start, as the starter takes it through the start log, whose run then ends."""
    await starts.reserve(
        db,
        starts.StartRow(
            workspace_id="default",
            idempotency_key=key,
            technique_id="tech_1",
            fingerprint="",
            inputs=[{"id": "prompt", "type": "text", "value": "a cat on a roof, in the rain"}],
            created_at=now,
        ),
    )
    await starts.take(db, "default", key, "h", now, LEASE)
    await starts.mark_sent(
        db, "default", key, holder="h", at=now, callback_url=None, request_body="{}"
    )
    run_id = f"run_of_{key}"
    first = Observation(run_id=run_id, source=Source.START, at=now, technique_id="tech_1")
    await writer.submit(Observed(observation=first, workspace_id="default", idempotency_key=key))
    await starts.give_back(db, "default", key, "h")
    await writer.submit(callback(run_id, at=now))
    ended = {"charged_cost": 1, "completed_at": now, "outputs": ()}
    await writer.submit(seen(run_id, RunStatus.COMPLETED, at=now, reads=1, facts=ended))


_STATS: Final = """
    SELECT s.relname AS table, n_tup_upd AS updates, n_tup_hot_upd AS hot, n_dead_tup AS dead,
        autovacuum_count AS vacuums, pg_relation_size(s.relid) AS heap,
        pg_indexes_size(s.relid) AS indexes
    FROM pg_stat_user_tables s WHERE s.relname = ANY($1)"""


@dataclass(frozen=True, slots=True)
class Moment:
    """How the tables stood, how much had been written to the log, and when."""

    tables: dict[str, dict[str, int]]
    log: int
    at: float

    @classmethod
    async def now(cls, connection: Any) -> "Moment":
        """This one."""
        at = time.perf_counter()
        await asyncio.sleep(1.5)  # the server's own statistics come a second late
        await connection.execute("SELECT pg_stat_clear_snapshot()")
        rows = await connection.fetch(_STATS, list(TABLES))
        log = await connection.fetchval("SELECT (pg_current_wal_lsn() - '0/0')::bigint")
        return cls({row["table"]: dict(row.items()) for row in rows}, log, at)


async def measure(url: str, variant: Variant, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One variant: its figures for each table."""
    await migrate.upgrade(url)
    connection: Any = await asyncpg.connect(url)
    for statement in variant.statements:
        await connection.execute(statement)
    async with await Database.open(url) as db:
        await fill(db, given.runs, sweeps=1000)
    for statement in _AS_FLORA_SENDS:
        await connection.execute(statement)
    moments = [await Moment.now(connection)]

    async def look() -> None:
        moments.append(await Moment.now(connection))

    a_day = given.runs // DAYS
    await churn(url, active=given.active, a_day=a_day, rounds=given.rounds, half=look)
    await look()
    await connection.close()
    return [_figures(variant, name, moments) for name in TABLES]


def _figures(variant: Variant, table: str, moments: Sequence[Moment]) -> dict[str, Any]:
    first, half, last = (moment.tables[table] for moment in moments)
    updates = last["updates"] - first["updates"]
    hot = last["hot"] - first["hot"]
    return {
        "variant": variant.name,
        "table": table,
        "updates": updates,
        "hot": round(hot / updates, 3) if updates else None,
        "heap_before": first["heap"],
        "heap_growth": [half["heap"] - first["heap"], last["heap"] - half["heap"]],
        "index_growth": [half["indexes"] - first["indexes"], last["indexes"] - half["indexes"]],
        "dead": last["dead"],
        "vacuums": last["vacuums"] - first["vacuums"],
        "log": moments[-1].log - moments[0].log,
    }


_AS_FLORA_SENDS: Final = (
    # Bodies as long as FLORA's, of which those of the older half are gone.
    f"""
    WITH those AS (
        SELECT delivery_id AS id, outcome = 'applied'
            AND received_at < now() - interval '{DAYS // 2} days' AS old FROM deliveries)
    UPDATE deliveries SET body_removed_at = CASE WHEN old THEN now() END,
        body = CASE WHEN old THEN '' ELSE decode(repeat('7b', 300), 'hex') END
    FROM those WHERE id = delivery_id""",
    "VACUUM (FULL, ANALYZE) deliveries",
)


async def vacuum_often(url: str) -> None:
    """Let the server's autovacuum look every second."""
    connection: Any = await asyncpg.connect(url)
    await connection.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


def show(figures: Sequence[dict[str, Any]]) -> None:
    """One line for each table; growth in the first half and in the second."""
    print(f"\n{figures[0]['variant']} ({figures[0]['log'] / 2**20:.0f} MB of log)")
    print("  table          updates    HOT  heap MB      growth  indexes' growth   dead  vacuums")
    for one in figures:
        heap, index = (
            " + ".join(f"{part / 2**20:.1f}" for part in one[name])
            for name in ("heap_growth", "index_growth")
        )
        hot = f"{one['hot']:.1%}" if one["updates"] else "-"
        print(
            f"  {one['table']:12} {one['updates']:9,} {hot:>6}"
            f" {one['heap_before'] / 2**20:8.1f} {heap:>11} {index:>16} {one['dead']:6,}"
            f" {one['vacuums']:8}"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40_000, help="settled runs beside them")
    parser.add_argument("--active", type=int, default=2_000, help="runs that are polled")
    parser.add_argument(
        "--rounds", type=int, default=40, help="how often each of them is, up to 40"
    )
    parser.add_argument("--variant", action="append", help="only these, by name")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    chosen = [one for one in VARIANTS if not given.variant or one.name in given.variant]
    all_figures: list[dict[str, Any]] = []
    with PostgresServer() as server:
        background = Background()
        databases = PostgresDatabases(server.url(), background)
        asyncio.run(vacuum_often(server.url()))
        for number, variant in enumerate(chosen):
            databases.create(f"churn_{number}")
            figures = asyncio.run(measure(server.url(f"churn_{number}"), variant, given))
            show(figures)
            all_figures += figures
        databases.close()
        background.close()
    if given.json:
        given.json.write_text(json.dumps({"soak": "churn", "figures": all_figures}, indent=2))


if __name__ == "__main__":
    main()
