"""All benchmarks, one after the other: `python -m bench [NAME …] [--results bench/results]`.

Speed is compared with a ceiling or a peer in the same run: alone these numbers mean nothing.
Together they take about twenty minutes on two cores; what is longer (ten million runs, a
million callbacks) has options of its own.
"""

import sys
from typing import Final

from bench.series import Program, run

BENCHMARKS: Final[dict[str, Program]] = {
    "ingest": ("bench.ingest", "--rounds", "3", "--seconds", "4"),
    "others": ("bench.others", "--rounds", "2", "--seconds", "4"),
    "economy": ("bench.economy",),
    "footprint": ("bench.footprint", "--callbacks", "100000"),
    "scale": ("bench.scale", "--runs", "200000"),
}

if __name__ == "__main__":
    sys.exit(
        run(
            BENCHMARKS,
            prog="python -m bench",
            about="What the tracker costs, beside what it might cost.",
            into=lambda _, results: ("--results", str(results)),
        )
    )
