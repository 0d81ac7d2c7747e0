"""A tracker whose database is down again and again, in every way that we know.

    python -m bench.soak_outage [--database sqlite|postgres|both] [--seconds 6] [--json FILE]

`tracker serve` with its worker runs against the simulator, while a witness sends, starts, reads and
follows. The database goes down in one way after the other, for `--seconds` each (some longer, so
that deadlines pass) and is back for a while. At the end everything has to be settled and true.
Outages that need a disk of their own are left out where this user may not mount one.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.e2e.outages import Outage, postgres_on, postgres_outages, sqlite_outages
from tests.e2e.processes import Sandbox, open_sandbox
from tests.e2e.witness import Witness, assert_folded, assert_nothing_lost
from tests.support.databases import sqlite_url_of
from tests.support.disk import CannotMount, SmallDisk
from tracker.store.engine import Database

PASSWORD = "hunter2-of-the-soak"  # noqa: S105
LONG = ("stopped", "frozen", "locked runs", "locked", "moved away", "disk full")
"""What lasts so long that every deadline passes."""
LONG_SECONDS = 11.0
FLOOD = {"deliveries": 400, "size": 240_000}
"""What comes at once in those, and is more than may wait."""
BACK_WITHIN = 10.0
SETTLED_WITHIN = 60.0
FEW_LINES = 12
"""So many lines of one kind, warnings or worse, are enough for one outage."""


async def soak(database: str, seconds: float, only: list[str] | None = None) -> dict[str, Any]:
    """All outages of one database, or those named; the figures."""
    figures: dict[str, Any] = {"outages": 0, "broken": []}
    async with _opened(database) as (sandbox, outages):
        # Without `--early`: such a start is answered after its callback, and lasts as long as both.
        await sandbox.simulate(
            *("--seed", "3", "--speed", "20", "--run-seconds", "20"),
            *("--drop", "20%", "--duplicate", "10%", "--late", "10%"),
        )
        server = await sandbox.serve(TRACKER_RECONCILE_CRON="*/5 * * * *")
        witness = Witness(sandbox.tracker, secrets=(PASSWORD, "whsec_simulator", "sk_test"))
        witness.begin(senders=6, readers=4, starters=3)
        await asyncio.sleep(2)
        slowest_back = 0.0
        for name, outage in outages.items():
            if only and name not in only:
                continue
            before, seen = len(server.log), len(witness.broken)
            async with outage():
                lasting = asyncio.sleep(max(seconds, LONG_SECONDS) if name in LONG else seconds)
                await asyncio.gather(lasting, *([witness.flood(**FLOOD)] if name in LONG else []))
            back = await witness.back(within=BACK_WITHIN)
            slowest_back = max(slowest_back, back)
            await asyncio.sleep(2)
            figures["outages"] += 1
            noise = _lines(server.log[before:])
            print(f"  {name:20}  back in {back:4.1f} s   {_few(noise)}", flush=True)
            for line in witness.broken[seen : seen + 5]:
                print(f"      {line}", flush=True)
            figures["broken"] += [
                f"{name}: {event} was logged {times} times"
                for event, times in noise.items()
                if times > FEW_LINES
            ]
        figures["peak_memory_mb"] = server.peak_memory // 1024**2
        await witness.end()
        async with await Database.open(sandbox.database_url) as db:
            acknowledged = await assert_nothing_lost(
                witness, db, sandbox.simulator, within=SETTLED_WITHIN
            )
            await assert_folded(db, within=SETTLED_WITHIN)
        await witness.close()
        assert await server.stop() == 0, server.log[-5000:]
        if PASSWORD in server.log or "Traceback" in server.log:
            figures["broken"].append("the log shows a password or a traceback")
    figures["broken"] += witness.broken
    return figures | {
        "deliveries_acknowledged": acknowledged,
        "lost": 0,
        "runs": len(witness.started),
        "slowest_answer_seconds": round(witness.slowest[1], 2),
        "slowest_answer": witness.slowest[0],
        "slowest_recovery_seconds": round(slowest_back, 2),
    }


@asynccontextmanager
async def _opened(database: str) -> AsyncIterator[tuple[Sandbox, dict[str, Outage]]]:
    """A sandbox on a new database, and what can happen to that."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            disk, other = (stack.enter_context(SmallDisk(megabytes)) for megabytes in (96, 64))
        except CannotMount as error:
            disk = other = None
            print(f"  (no disk that could be full: {error})")
        if database == "sqlite":
            home = (disk.path if disk else Path(folder)) / "database"
            home.mkdir()
            file = home / "tracker.db"
            async with open_sandbox(Path(folder), sqlite_url_of(file), forks=False) as sandbox:
                yield sandbox, sqlite_outages(file, disk, other)
            return
        async with postgres_on(disk, other, fsync=True) as postgres:
            url = postgres.url("tracker").replace("postgres@", f"postgres:{PASSWORD}@")
            async with open_sandbox(Path(folder), url, forks=False) as sandbox:
                yield sandbox, postgres_outages(postgres, disk, other)


def _lines(log: str) -> Counter[str]:
    """How often each event was logged as a warning or worse."""
    said: Counter[str] = Counter()
    for line in log.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            said[f"(no JSON) {line[:60]}"] += 1
            continue
        if entry["level"] not in ("debug", "info") and entry["event"] != "callback.quarantined":
            said[entry["event"]] += 1
    return said


def _few(noise: Counter[str]) -> str:
    return ", ".join(f"{event} {times}" for event, times in noise.most_common())


def main() -> int:
    """The command line; 1 where a promise was broken."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    arguments.add_argument("--seconds", type=float, default=6.0, help="how long each outage lasts")
    arguments.add_argument("--outage", action="append", help="only this one, by its name")
    arguments.add_argument("--json", type=Path, help="write the figures there")
    given = arguments.parse_args()
    chosen = ("sqlite", "postgres") if given.database == "both" else (given.database,)
    figures = {}
    for database in chosen:
        print(database)
        figures[database] = asyncio.run(soak(database, given.seconds, given.outage))
        for name, value in figures[database].items():
            print(f"  {name:28} {value if name != 'broken' else len(value)}")
    if given.json:
        given.json.write_text(json.dumps({"soak": "outage", "figures": figures}, indent=2))
    return int(any(each["broken"] for each in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
