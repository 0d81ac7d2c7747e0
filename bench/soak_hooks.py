"""An endpoint that is down for minutes, and a tracker that is killed meanwhile.

    python -m bench.soak_hooks [--database sqlite|postgres|both] [--runs 1000] [--seconds 300]
        [--json FILE]

`tracker serve` with its worker runs against the simulator, with two endpoints and the tracker's own
waits. One endpoint is down for `--seconds`, in which `--runs` runs end and the tracker is killed
three times and started again. Then every run has to arrive at both, at least once, under one id,
not before it is settled in the database, and verified by `standardwebhooks`; at the endpoint that
was never down within two seconds (95th percentile).
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.e2e.hooks import outage
from tests.e2e.processes import open_sandbox
from tests.support.databases import Background, PostgresDatabases, migrate, sqlite_url_of
from tests.support.postgres import PostgresServer
from tracker.store.engine import Database

KILLS = 3
WITHIN = 120.0
"""Seconds after the outage in which everything has to arrive: claims of killed processes expire."""
P95_WITHIN = 2.0


async def soak(database: str, runs: int, seconds: float) -> dict[str, Any]:
    """The outage on one database; the figures."""
    with tempfile.TemporaryDirectory() as folder, _opened(database, Path(folder)) as url:
        await migrate(url)
        async with (
            open_sandbox(Path(folder), url, forks=False) as sandbox,
            await Database.open(url) as opened,
        ):
            down, up = await outage(
                sandbox, opened, runs=runs, seconds=seconds, kills=KILLS, within=WITHIN
            )
    broken = [f"down: {what}" for what in down.broken] + [f"up: {what}" for what in up.broken]
    if len({runs, down.runs, up.runs}) > 1:
        broken.append(f"{runs - down.runs} runs are not in the database")
    if up.p95 > P95_WITHIN:
        broken.append(f"up: 95 % within {up.p95:.1f} s")
    return {"down": asdict(down), "up": asdict(up), "kills": KILLS, "broken": broken}


@contextmanager
def _opened(database: str, folder: Path) -> Iterator[str]:
    """The URL of a new database, for as long as the block lasts."""
    if database == "sqlite":
        yield sqlite_url_of(folder / "tracker.db")
        return
    with PostgresServer(fsync=True) as server:
        background = Background()
        databases = PostgresDatabases(server.url(), background)
        databases.create("tracker")
        databases.close()
        background.close()
        yield server.url("tracker")


def main() -> int:
    """The command line; 1 where a promise was broken."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    arguments.add_argument("--runs", type=int, default=1000)
    arguments.add_argument("--seconds", type=float, default=300.0, help="how long it is down")
    arguments.add_argument("--json", type=Path, help="write the figures there")
    given = arguments.parse_args()
    chosen = ("sqlite", "postgres") if given.database == "both" else (given.database,)
    figures = {}
    for database in chosen:
        print(database, flush=True)
        figures[database] = asyncio.run(soak(database, given.runs, given.seconds))
        for name, value in figures[database].items():
            print(f"  {name:8} {value}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"soak": "hooks", "figures": figures}, indent=2))
    return int(any(each["broken"] for each in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
