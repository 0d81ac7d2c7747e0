"""All soaks, one after the other: `python -m bench.soaks [NAME …] [--results bench/results]`.

Each says what it does, and ends with status 1 where a promise is broken. Together they take about
half an hour. Their figures are left as `soak_NAME.json`.
"""

import sys
from typing import Final

from bench.series import Program, run

SOAKS: Final[dict[str, Program]] = {
    "crash": ("bench.soak_crash",),
    "outage": ("bench.soak_outage", "--seconds", "4"),
    "network": ("bench.soak_network", "--seconds", "50"),
    "starts": ("bench.soak_starts",),
    "stateful": ("bench.soak_stateful",),
    "many": ("bench.soak_many",),
    "migrations": ("bench.soak_migrations",),
    "prune": ("bench.soak_prune",),
    "hooks": ("bench.soak_hooks",),
    "history": ("bench.soak_history",),
}

if __name__ == "__main__":
    sys.exit(
        run(
            SOAKS,
            prog="python -m bench.soaks",
            about="The promise, put to the test for half an hour.",
            into=lambda name, results: ("--json", str(results / f"soak_{name}.json")),
        )
    )
