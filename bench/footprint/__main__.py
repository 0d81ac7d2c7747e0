"""`python -m bench.footprint`: see the package."""

import argparse
import sys
from pathlib import Path
from typing import Final

from bench.footprint.idle import idle
from bench.footprint.memory import memory
from bench.footprint.startup import startup
from bench.report import RESULTS, Report
from bench.throw_away import chosen

PARTS: Final = ("memory", "idle", "startup")


def main() -> int:
    """The command line; exit status 1 where memory grows or is too much."""
    arguments = argparse.ArgumentParser(prog="python -m bench.footprint")
    arguments.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    arguments.add_argument("--callbacks", type=int, default=100_000)
    arguments.add_argument("--lives", type=int, default=2_000, help="runs from start to settled")
    arguments.add_argument("--seconds", type=float, default=60.0, help="in which nothing happens")
    arguments.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    report = Report("footprint")
    flat = True
    if "startup" in given.only:
        startup(report)
    for kind in chosen(given.database):
        if "idle" in given.only:
            idle(report, kind, seconds=given.seconds)
        if "memory" in given.only:
            flat &= memory(report, kind, callbacks=given.callbacks, lives=given.lives)
    report.write(given.results)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
