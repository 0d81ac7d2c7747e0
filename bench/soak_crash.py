"""The tracker killed with SIGKILL again and again, and told to stop with SIGTERM when it hurts.

    python -m bench.soak_crash [--database sqlite|postgres|both] [--seconds 60] [--seed N]
        [--json FILE]

First a life ends at every crash point: before and after each kind of commit, before and after each
kind of request to FLORA, in the server with its worker, in the worker and in a batch. Then, for
`--seconds`, lives end at any moment and at any commit or request, under a stream of starts,
callbacks and polls; on PostgreSQL receivers and workers side by side. Then it is told to stop under
that stream, also with the database gone, with the waits that it has in operation. At the end the
database, the simulator's records and what was acknowledged have to agree.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

from tests.e2e.crash_run import CrashRun, Role, crash_run
from tests.e2e.crashing import COMMITS, REQUESTS, Point, When
from tests.e2e.outages import Outage, frozen, locked_file, moved_away, stopped
from tests.support.databases import Background, PostgresDatabases, migrate, sqlite_url_of
from tests.support.postgres import PostgresServer

POINTS = [Point(when=when, name=name) for name in (*COMMITS, *REQUESTS) for when in get_args(When)]
ATTEMPTS: tuple[tuple[Role, bool], ...] = (
    *(("serve", False), ("batch", False), ("worker", False)),
    *(("serve", True), ("serve", True), ("serve", False), ("serve", True)),
)
"""The lives in which a crash point is looked for, and whether FLORA fails in them: not everything
happens in every life."""
STOP_WITHIN = 20.0
"""Seconds within which a process that is told to stop promises to end; a container has 30."""


async def soak(database: str, seconds: float, chance: random.Random) -> dict[str, Any]:
    """All of it on one database; the figures."""
    roles: tuple[Role, ...] = ("serve",) if database == "sqlite" else ("receiver", "worker")
    with (
        tempfile.TemporaryDirectory() as folder,
        _opened(database, Path(folder)) as (url, outages),
    ):
        await migrate(url)
        options = {"seed": chance.randrange(1000), "rate_limit": 0.05, "errors": 0.05}
        async with crash_run(url, Path(folder), **options) as one:
            missed = [str(point) for point in POINTS if not await _hit(one, point)]
            print(f"  {len(POINTS) - len(missed)} of {len(POINTS)} crash points hit", flush=True)
            await one.kill_at_random(roles, seconds, chance)
            await one.settle()
            print(f"  {one.killed.total()} lives killed", flush=True)
            stops = await _stop_again_and_again(one, outages, chance)
            await one.settle()
            verdict = await one.judge()
    slowest = max(stops, key=lambda name: stops[name])
    broken = [f"never hit: {point}" for point in missed]
    broken += [f"lost: {what}" for what in verdict.lost]
    broken += [f"paid twice: {what}" for what in verdict.paid_twice]
    broken += [
        f"{how}: ended after {took:.1f} s" for how, took in stops.items() if took > STOP_WITHIN
    ]
    return {
        "lives_killed": one.killed.total(),
        "crash_points": len(POINTS),
        "crash_points_hit": len(POINTS) - len(missed),
        "killed_at": dict(sorted(one.killed.items())),
        "deliveries_acknowledged": verdict.deliveries,
        "starts_acknowledged": verdict.starts,
        "starts_unresolved": verdict.unresolved,
        "runs_settled": verdict.runs,
        "lost": len(verdict.lost),
        "paid_twice": len(verdict.paid_twice),
        "stops": len(stops),
        "slowest_stop": slowest,
        "slowest_stop_seconds": round(stops[slowest], 1),
        "broken": broken,
    }


async def _hit(one: CrashRun, point: Point) -> bool:
    """Whether some life came to its end at this point."""
    for role, flora_fails in 4 * ATTEMPTS:
        if (await one.live(role, point, flora_fails=flora_fails)).killed:
            return True
    return False


async def _stop_again_and_again(
    one: CrashRun, outages: dict[str, Outage], chance: random.Random
) -> dict[str, float]:
    """Tell it to stop under load, first when all is well; in how many seconds it ended."""
    took: dict[str, float] = {}
    async with one.streaming(chance):
        for how in ("all is well", *outages):
            life = await one.serve_patiently()
            await asyncio.sleep(chance.uniform(0.5, 2))
            if how in outages:
                async with outages[how]():
                    took[how] = await one.stop(life)
            else:
                took[how] = await one.stop(life)
            print(f"  told to stop, {how}: ended after {took[how]:.1f} s", flush=True)
    return took


@contextmanager
def _opened(database: str, folder: Path) -> Iterator[tuple[str, dict[str, Outage]]]:
    """A new database without tables, and the ways in which it can be gone."""
    if database == "sqlite":
        home = folder / "database"
        home.mkdir()
        file = home / "tracker.db"
        yield (
            sqlite_url_of(file),
            {
                "the file is locked": partial(locked_file, file, "BEGIN EXCLUSIVE"),
                "the file is moved away": partial(moved_away, file),
            },
        )
        return
    with PostgresServer(fsync=True) as server:
        background = Background()
        databases = PostgresDatabases(server.url(), background)
        databases.create("tracker")
        databases.close()
        background.close()
        yield (
            server.url("tracker"),
            {
                "PostgreSQL says nothing": partial(frozen, server),
                "PostgreSQL has stopped": partial(stopped, server, server.stop),
            },
        )


def main() -> int:
    """The command line; 1 where a promise was broken."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    arguments.add_argument(
        "--seconds", type=float, default=60.0, help="how long lives end at random"
    )
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--json", type=Path, help="write the figures there")
    given = arguments.parse_args()
    chosen = ("sqlite", "postgres") if given.database == "both" else (given.database,)
    figures = {}
    for database in chosen:
        print(database)
        figures[database] = asyncio.run(soak(database, given.seconds, random.Random(given.seed)))
        for name, value in figures[database].items():
            if name == "killed_at":
                for point, times in value.items():
                    print(f"      {point:40} {times}")
            elif name == "broken":
                for promise in value:
                    print(f"  BROKEN: {promise}")
            else:
                print(f"  {name:28} {value}")
    if given.json:
        given.json.write_text(json.dumps({"soak": "crash", "figures": figures}, indent=2))
    return int(any(each["broken"] for each in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
