"""How long the views and the dashboard's questions take with a million runs.

    python -m bench.scale_views [--runs 1000000] [--database sqlite|postgresql|URL]

Without `--database` both are tried, on throw-away databases: a file, and a PostgreSQL that this
starts from the binaries that the tests use. A URL names an empty database of your own. Each
question is asked five times; the median is printed, in milliseconds, the first time beside it.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from bench.filling import fill
from bench.throw_away import throw_away
from tracker.core.clock import utc_now
from tracker.store import attention, feed, migrate, overview, read, tallies
from tracker.store.engine import Database

VIEWS = (
    *("v_run_states", "v_ends_hourly", "v_lags_hourly", "v_callback_health", "v_cost_daily"),
    *("v_overdue_runs", "v_sweeps", "v_open_starts", "v_quarantine"),
)
LAST_DAY = {"v_ends_hourly": "hour", "v_lags_hourly": "hour", "v_cost_daily": "day"}
Question = Callable[[Database], Awaitable[Any]]


def questions(now: datetime) -> dict[str, Question]:
    """What is asked, by name."""

    def view(query: str) -> Question:
        async def ask(db: Database) -> int:
            async with db.read() as connection:
                return len((await connection.execute(text(query.replace(":", "\\:")))).all())

        return ask

    day = now - timedelta(days=1)
    return {
        **{f"SELECT * FROM {name}": view(f"SELECT * FROM {name}") for name in VIEWS},
        **{
            f"{name}, the last day": view(f"SELECT * FROM {name} WHERE {at} >= '{day:%Y-%m-%d}'")
            for name, at in LAST_DAY.items()
        },
        "overview.states": overview.states,
        "overview.ends_by_hour, 48 h": lambda db: overview.ends_by_hour(db, now=now, hours=48),
        "overview.callback_health": lambda db: overview.callback_health(db, now=now),
        "overview.lags": lambda db: overview.lags(db, now=now),
        "overview.costs": lambda db: overview.costs(db, now=now),
        "attention.overdue": lambda db: attention.overdue(db, now=now),
        "attention.sweep_health": attention.sweep_health,
        "read.counts": lambda db: read.counts(db, now=now),
        "read.list_runs": read.list_runs,
        "feed.newest": feed.newest,
    }


async def measure(url: str, runs: int) -> None:
    """Fill the database at `url`, ask, and print."""
    await migrate.upgrade(url)
    async with await Database.open(url) as db:
        began = time.perf_counter()
        await fill(db, runs)
        print(f"\n{db.dialect}: {runs:,} runs, made in {time.perf_counter() - began:.0f} s")
        for name, ask in questions(utc_now()).items():
            took = []
            for _ in range(5):
                began = time.perf_counter()
                await ask(db)
                took.append((time.perf_counter() - began) * 1000)
            print(f"  {statistics.median(took):9.1f} ms  (first {took[0]:7.1f})  {name}")
        began = time.perf_counter()
        await tallies.recount(db)
        print(f"  {time.perf_counter() - began:9.1f} s   tracker db recount")


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=1_000_000)
    arguments.add_argument("--database", action="append")
    given = arguments.parse_args()
    for database in given.database or ["sqlite", "postgresql"]:
        if "://" in database:
            asyncio.run(measure(database, given.runs))
        else:
            with throw_away(database) as url:
                asyncio.run(measure(url, given.runs))


if __name__ == "__main__":
    main()
