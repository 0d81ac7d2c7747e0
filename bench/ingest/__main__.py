"""`python -m bench.ingest`: see the package."""

import argparse
import sys
from pathlib import Path

from bench.ingest.burst import burst
from bench.ingest.latency import latency
from bench.ingest.pair import pair
from bench.ingest.rounds import compare
from bench.report import RESULTS, Report
from bench.throw_away import chosen


def main() -> int:
    """The command line; exit status 1 where an acknowledged callback is lost, or has no effect."""
    arguments = argparse.ArgumentParser(prog="python -m bench.ingest")
    arguments.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    arguments.add_argument("--connections", type=int, nargs="+", default=[64, 256])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=4.0)
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    report = Report("ingest")
    found = [
        one
        for kind in chosen(given.database)
        for connections in given.connections
        for one in compare(
            report, kind, connections=connections, rounds=given.rounds, seconds=given.seconds
        )
    ]
    if "postgresql" in chosen(given.database):
        for connections in given.connections:
            found += pair(
                report, connections=connections, rounds=given.rounds, seconds=given.seconds
            )
    bursts = [
        one
        for kind in chosen(given.database)
        for one in burst(report, kind, rounds=max(1, given.rounds - 2))
    ]
    for kind in chosen(given.database):
        latency(report, kind, seconds=2 * given.seconds)
    report.write(given.results)
    return 1 if any(one.lost for one in (*found, *bursts)) else 0


if __name__ == "__main__":
    sys.exit(main())
