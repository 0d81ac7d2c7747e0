"""`python -m bench.others`: see the package."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Final

from bench.ingest.rounds import Round
from bench.others.hookspool import Hookspool
from bench.others.installing import NotInstalled
from bench.others.receiver import Receiver
from bench.others.rounds import compare
from bench.others.stripe_sync import StripeSync
from bench.report import RESULTS, Report, say

COMPARED: Final[tuple[tuple[Receiver, ...], ...]] = (
    (Hookspool(), Hookspool(no_delay=True)),
    (StripeSync(),),
)
"""What is compared with the tracker at a time; one installation serves them all."""


def main() -> int:
    """The command line; exit status 1 where an acknowledged callback is missing."""
    arguments = argparse.ArgumentParser(prog="python -m bench.others")
    arguments.add_argument("--connections", type=int, nargs="+", default=[64])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=4.0)
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    report = Report("others")
    found: list[Round] = []
    for receivers in COMPARED:
        with tempfile.TemporaryDirectory() as directory:
            installed = Path(directory)
            try:
                receivers[0].install(installed)
            except NotInstalled as reason:
                say(f"left out, as it could not be installed: {receivers[0].name}: {reason}")
                report.figures[receivers[0].kind] = f"{receivers[0].name} could not be installed"
                continue
            for connections in given.connections:
                found += compare(
                    report,
                    receivers,
                    installed,
                    connections=connections,
                    rounds=given.rounds,
                    seconds=given.seconds,
                )
    report.write(given.results)
    return 1 if any(one.lost for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
