"""How long `tracker db copy` takes to carry a deployment over, and how much memory it needs.

    python -m bench.moving [--runs 200000] [--results DIRECTORY]

A SQLite file with that many runs, and what goes with them, is copied to a PostgreSQL that this
starts (with `fsync` on, its data where temporary files lie), from there to another, and back to a
file. Each is the command itself, in a process of its own, and what it compares is part of it.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.filling import fill
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tracker.store import migrate
from tracker.store.engine import Database


async def filled(url: str, runs: int) -> None:
    """Make a database with so many runs, whose ids are as scattered as FLORA's."""
    await migrate.upgrade(url)
    async with await Database.open(url) as db:
        await fill(db, runs, scattered=True)


def copy(source: str, target: str) -> dict[str, Any]:
    """Run the command; what it prints, with its processor time and the most memory it held."""
    with tempfile.TemporaryFile() as told:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "tracker", "db", "copy", "--to", target, "--json"],
            env=os.environ | {"TRACKER_DATABASE_URL": source},
            stdout=told,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the copy to {target} failed; run it by hand to see why")
        told.seek(0)
        copied = json.load(told)
    rows = sum(copied["tables"].values())
    return {
        "from": source.partition(":")[0],
        "to": target.partition(":")[0],
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_a_second": round(rows / seconds),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    """Fill, copy three times, tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200_000)
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    report = Report("moving")
    with ExitStack() as stack:
        urls = [
            stack.enter_context(throw_away(kind))
            for kind in ("sqlite", "postgresql", "postgresql", "sqlite")
        ]
        say(f"filling a file with {asked.runs} runs")
        asyncio.run(filled(urls[0], asked.runs))
        copies = []
        for source, target in pairwise(urls):
            say(f"from {source.partition(':')[0]} to {target.partition(':')[0]}")
            copies.append(copy(source, target))
    report.figures = {"runs": asked.runs, "copies": copies}
    report.add(
        Table(
            f"`tracker db copy` of {asked.runs:,} runs",
            ("from", "to", "rows", "seconds", "rows a second", "processor s", "peak MB"),
            [tuple(one.values()) for one in copies],
        )
    )
    if asked.results is not None:
        report.write(asked.results)


if __name__ == "__main__":
    main()
