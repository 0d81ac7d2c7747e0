"""`python -m bench.scale`: see the package."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from bench.report import RESULTS, Report, say
from bench.scale.databases import SETTINGS, filled
from bench.scale.disk import disk
from bench.scale.ingest import WANTED, ingest
from bench.scale.questions import questions
from bench.throw_away import chosen

PARTS: Final = ("ingest", "questions", "disk")
ROOM: Final = {"sqlite": 2_500, "postgresql": 3_000}
"""Bytes that a run takes while its database is filled: rows, indexes, and the server's log."""
FIXED: Final = 6 << 30
"""Bytes that the log and what is received meanwhile may take besides."""


def main() -> int:
    """The command line; exit status 1 where something could not be measured."""
    arguments = argparse.ArgumentParser(prog="python -m bench.scale")
    arguments.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    arguments.add_argument("--runs", type=int, default=1_000_000)
    arguments.add_argument("--against", type=int, default=10_000)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--callbacks", type=int, default=20_000, help="in each round of ingest")
    arguments.add_argument(
        "--before", type=int, default=0, help="callbacks between a checkpoint and each round"
    )
    arguments.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    arguments.add_argument(
        *("--set", "-s"),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"of PostgreSQL, beside {' '.join(f'{n}={v}' for n, v in SETTINGS.items())}",
    )
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    report = Report("scale")
    fine = is_all = True
    for kind in chosen(given.database):
        need = given.runs * ROOM[kind] + FIXED
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if free < need:
            say(f"{kind}: {need >> 30} GB are needed and {free >> 30} are free: left out")
            is_all = False
            continue
        settings = dict(one.split("=", 1) for one in given.set)
        with filled(kind, (given.against, given.runs), settings) as plots:
            if "disk" in given.only:
                disk(report, plots[-1])
            if "questions" in given.only:
                fine &= not questions(report, plots)
            if "ingest" in given.only:
                ratio = ingest(
                    report,
                    plots,
                    rounds=given.rounds,
                    callbacks=given.callbacks,
                    before=given.before,
                )
                fine &= ratio >= WANTED
    if not fine:
        say("what is in bold takes longer than was wanted: docs/performance.md has the reasons")
    report.write(given.results)
    return 0 if is_all else 1


if __name__ == "__main__":
    sys.exit(main())
