"""`tracker db prune` on a database in use: what it removes, and what a receiver notices of it.

    python -m bench.soak_prune [--runs 60000] [--seconds 10] [--database sqlite|postgres|both]
        [--json FILE]

A database as after a busy quarter; two thirds of it are older than `--older-than 30d`. One receiver
takes a callback after the other, first alone, then while two prunes run in
processes of their own. Each callback's way into the database is timed. The exit status is 1 where a
callback was not taken, took longer than FLORA waits, or where anything but the old runs is gone.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from sqlalchemy import func, select

from bench.filling import fill
from bench.throw_away import throw_away
from tests.store.making import RULES, delivery, open_inbox
from tests.store.test_rollups import counted, stored_rollups
from tests.support.deliveries import applied
from tracker.core.clock import utc_now
from tracker.core.rollup import STATE
from tracker.operations.retention import Ages, Pruner
from tracker.receiving.apply import Applier
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.schema import runs
from tracker.store.writing import rollups
from tracker.workspaces import Workspace, Workspaces

DAYS: Final = 30
FLORA_WAITS: Final = 10.0


async def receive(db: Database, name: str, done: asyncio.Event) -> list[float]:
    """Callbacks one after the other until `done`: the seconds that each took."""
    took: list[float] = []
    async with (
        Applier(
            db,
            workspaces=Workspaces([Workspace(place="default")], database=db, clock=utc_now),
            rules=RULES,
            clock=utc_now,
            background=True,
        ) as applier,
        open_inbox(db, on_stored=applier.stored) as inbox,
    ):
        while not done.is_set():
            began = time.perf_counter()
            await inbox.store(delivery(f"{name}_{len(took)}", at=utc_now()))
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0.005)
    return took


async def prune(url: str) -> tuple[dict[str, int], float]:
    """The command, in a process of its own: what it says, and the seconds that it took."""
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tracker", "db", "prune", "--older-than", f"{DAYS}d"),
        *("--bodies-older-than", f"{DAYS // 2}d", "--json"),
        env={"PATH": os.environ["PATH"], "TRACKER_DATABASE_URL": url},
        stdout=asyncio.subprocess.PIPE,
    )
    printed, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(1)
    removed: dict[str, int] = json.loads(printed)["removed"]
    return removed, time.perf_counter() - began


async def measure(url: str, given: argparse.Namespace) -> dict[str, Any]:
    """Fill, receive alone, receive while two prune, and look at what is left."""
    await migrate.upgrade(url)
    async with await Database.open(url) as db:
        await fill(db, given.runs, sweeps=5000)
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(given.seconds, done.set)
        alone = await receive(db, "alone", done)
        done = asyncio.Event()
        receiving = asyncio.create_task(receive(db, "beside", done))
        both = await asyncio.gather(prune(url), prune(url))
        done.set()
        beside = await receiving
        await applied(db)
        await rollups.compact(db)
        states = [
            {key: n for key, n in found.items() if key.measure == STATE}
            for found in (await stored_rollups(db), await counted(db))
        ]
        ages = Ages(runs=timedelta(days=DAYS, minutes=10), bodies=timedelta(days=DAYS))
        left = await Pruner(database=db, clock=utc_now).prune(ages, dry=True)
        async with db.read() as connection:
            new = select(func.count()).where(runs.c.tracking == "active")
            active = (await connection.execute(new)).scalar_one()
    seconds = max(took for _, took in both)
    removed = {name: sum(one[name] for one, _ in both) for name in both[0][0]}
    # One of a thousand is active from the first; each callback makes one more.
    made = len(alone) + len(beside) + sum(n % 1000 == 7 for n in range(1, given.runs + 1))
    return {
        "database": db.dialect,
        "removed": removed,
        "seconds": round(seconds, 1),
        "runs_per_second": round(removed["runs"] / seconds),
        "acknowledged": len(alone) + len(beside),
        "unsettled_removed": made - active,
        "beside_callbacks": len(beside),
        **{f"alone_{name}": value for name, value in _quantiles(alone).items()},
        **{f"beside_{name}": value for name, value in _quantiles(beside).items()},
        "kept": max(beside) < FLORA_WAITS
        and made == active
        and states[0] == states[1]
        and not any(left.values()),
    }


def _quantiles(took: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(took, n=1000)
    parts = {"p50_ms": cuts[499], "p99_ms": cuts[989], "max_ms": max(took)}
    return {name: round(1000 * value, 1) for name, value in parts.items()}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=60_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long it receives alone")
    parser.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    figures = []
    for database in ("sqlite", "postgres") if given.database == "both" else (given.database,):
        with throw_away(database) as url:
            figures.append(asyncio.run(measure(url, given)))
        for name, value in figures[-1].items():
            print(f"  {name:17} {value}")
        print()
    if given.json:
        given.json.write_text(json.dumps({"soak": "prune", "figures": figures}, indent=2))
    return 0 if all(one["kept"] for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
