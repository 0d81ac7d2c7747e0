"""How much disk a run takes, by table, and what is left of it when retention has been there.

    python -m bench.disk [--runs 20000] [--database sqlite|postgres|both] [--json FILE]

Runs go through the start log and the writer as they do in production: asked for with a prompt of
120 characters and a key, called back with a body as FLORA sends it, read once with two outputs
behind links. What the tables and their indexes then take is measured as it is, with the room that
updates leave in them, and packed. Then all of it is pruned: what the packed tables still take is
what retention keeps for good.
"""

import argparse
import asyncio
import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg

from bench.churn import vacuum_often
from bench.sizes import SIZES
from bench.throw_away import throw_away
from tests.store.making import callback, open_writer, seen
from tests.web.callbacks import event
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Entry, Observed
from tracker.core.run import Output, RunStatus
from tracker.operations.retention import Ages, Pruner
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.writing import rollups

AT_ONCE: Final = 250
PARTS: Final = ("rows", "indexes")
PROMPT: Final = (
    "A cat on a red roof in the rain, seen from the street through a wet window at dusk, "
)
TECHNIQUE: Final = "tech_8c1f0e6b2d7a4935"
WORKSPACE: Final = "ws_5f2d9a7c31e84b06"


def _entries(number: int) -> Iterator[Entry]:
    """What comes in about one run."""
    now = utc_now()
    run_id = f"run_{number:016x}"
    facts: dict[str, Any] = {"workspace_id": WORKSPACE, "technique_id": TECHNIQUE}
    first = Observation(run_id=run_id, source=Source.START, at=now, created_at=now, **facts)
    inputs = [{"id": "prompt", "type": "text", "value": f"{PROMPT}{number:036}"}]
    yield Observed(
        observation=first,
        inputs=inputs,
        callback_expected=True,
        workspace_id="default",
        idempotency_key=_key(number),
    )
    data = {"run_id": run_id, "run_type": "technique", "workspace_id": WORKSPACE}
    body = event(run_id, id=f"whd_{number:016x}", data=data | {"status": "completed"})
    yield callback(run_id, f"whd_{number:016x}", at=now, body=body, workspace_id=WORKSPACE)
    whole = facts | {
        "technique_name": "Product shots on a roof",
        "progress": 100.0,
        "created_at": now,
        "started_at": now,
        "completed_at": now,
        "charged_cost": 1,
        "outputs": tuple(
            Output(
                f"out_{number:08x}_{n}",
                "imageUrl",
                f"https://media.example.com/{WORKSPACE}/runs/{run_id}/{n}-{number:048x}.png",
            )
            for n in range(2)
        ),
    }
    billed = now + timedelta(minutes=2)
    yield seen(run_id, RunStatus.COMPLETED, at=billed, reads=1, facts=whole)


def _key(number: int) -> str:
    return f"order-2026-06-{number:024}"


async def load(db: Database, numbers: range) -> None:
    """These runs, from the start to the end."""
    async with open_writer(db) as writer:
        for first in range(numbers.start, numbers.stop, AT_ONCE):
            some = range(first, min(first + AT_ONCE, numbers.stop))
            entries = [list(_entries(number)) for number in some]
            for number in some:
                await starts.reserve(
                    db,
                    starts.StartRow(
                        workspace_id="default",
                        idempotency_key=_key(number),
                        technique_id=TECHNIQUE,
                        fingerprint=f"{number:064x}",
                        inputs=[{"id": "prompt", "type": "text", "value": f"{PROMPT}{number:036}"}],
                        created_at=utc_now(),
                    ),
                )
            for step in zip(*entries, strict=True):
                await writer.submit_all(step)
            await rollups.compact(db)


Sizes = Counter[tuple[str, str]]
"""Bytes by table, and by whether they are its `rows` or its `indexes`."""


async def sizes(url: str, *, packed: bool = False) -> Sizes:
    """What the tables take, as they are or without any room in them."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as file:
            if packed:
                file.execute("VACUUM")
            return _added_up(file.execute(SIZES["sqlite"]))
    connection: Any = await asyncpg.connect(url)
    await connection.execute("VACUUM FULL" if packed else "VACUUM")
    found = _added_up(await connection.fetch(SIZES["postgresql"]))
    await connection.close()
    return found


def _added_up(rows: Iterable[Sequence[Any]]) -> Sizes:
    found = Sizes()
    for name, table, size in rows:
        found[table, "rows" if name == table else "indexes"] += size
    return found


async def measure(url: str, runs: int) -> dict[str, Any]:
    """Load, look, prune, look again; bytes for each run."""
    await migrate.upgrade(url)
    async with await Database.open(url) as db:
        if db.dialect == "postgresql":
            await vacuum_often(url)
        empty = await sizes(url)
        await load(db, range(runs))
        full = await sizes(url)
        packed = await sizes(url, packed=True)
        later = utc_now() + timedelta(days=100)
        ages = Ages(runs=timedelta(days=90), bodies=timedelta(days=30))
        removed = await Pruner(database=db, clock=lambda: later, sleep=_no_rest).prune(ages)
        left = await sizes(url, packed=True)
    for taken in (full, packed, left):
        taken.subtract(empty)
    tables = {
        table: {part: round(full[table, part] / runs) for part in PARTS}
        for table, _ in sorted(full)
    }
    return {
        "database": db.dialect,
        "runs": runs,
        "by_table": {name: parts for name, parts in tables.items() if any(parts.values())},
        "bytes_per_run": round(full.total() / runs),
        "packed": round(packed.total() / runs),
        "kept_for_good": round(left.total() / runs),
        "removed": removed["runs"],
    }


async def _no_rest(_: float) -> None:
    await asyncio.sleep(0)


def show(figures: dict[str, Any]) -> None:
    """A line for each table."""
    print(f"\n{figures['database']}: bytes for each run     rows  indexes")
    for name, parts in figures["by_table"].items():
        print(f"  {name:32} {parts['rows']:7,} {parts['indexes']:8,}")
    print(f"  {'in all':32} {figures['bytes_per_run']:16,}")
    print(f"  {'without any room':32} {figures['packed']:16,}")
    print(f"  {'left of it by retention':32} {figures['kept_for_good']:16,}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    figures = []
    for database in ("sqlite", "postgres") if given.database == "both" else (given.database,):
        with throw_away(database) as url:
            figures.append(asyncio.run(measure(url, given.runs)))
        show(figures[-1])
    if given.json:
        given.json.write_text(json.dumps({"soak": "disk", "figures": figures}, indent=2))
    return 0 if all(one["removed"] == one["runs"] for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
