"""The state machine of tests/stateful for as long as you like, other sequences each time.

    python -m bench.soak_stateful [--examples 300] [--steps 40] [--database sqlite|postgres|both]
                                  [--seed N] [--json FILE]

Each example is a tracker of its own on an emptied database; after every step all promises are
checked, and at its end everything has to settle. What fails is shrunk and printed as a program. The
seed is printed, and repeats the run. The default takes a few minutes.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.stateful.machine import TrackerMachine
from tests.stateful.quiet import quiet
from tests.support.databases import Background, PostgresDatabases, migrate, sqlite_url_of
from tests.support.postgres import PostgresServer

FIGURES = (
    *("examples", "steps", "runs", "starts", "requests", "faults", "crashes", "acknowledged"),
    *("forged", "broken", "seconds"),
)


def soak(url: str, *, examples: int, steps: int, number: int) -> dict[str, Any]:
    """Examples on one database; the figures, and how often each rule was applied. What was broken
    has been printed."""
    figures: Counter[str] = Counter(broken=0)
    began = time.monotonic()

    @seed(number)
    def machine() -> TrackerMachine:
        return TrackerMachine(url, figures)

    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        with quiet():
            run_state_machine_as_test(machine, settings=chosen)
    except Exception:
        figures["broken"] += 1
        traceback.print_exc()
    figures["seconds"] = round(time.monotonic() - began)
    rules = {
        name.removeprefix("rule "): count
        for name, count in sorted(figures.items())
        if name.startswith("rule ")
    }
    return {name: figures[name] for name in FIGURES} | {"rules": rules}


@contextmanager
def _database(kind: str) -> Iterator[str]:
    """The URL of a database with the tracker's schema."""
    background = Background()
    try:
        if kind == "sqlite":
            with tempfile.TemporaryDirectory() as folder:
                url = sqlite_url_of(Path(folder) / "tracker.db")
                background.run(migrate(url))
                yield url
            return
        with PostgresServer() as server:
            databases = PostgresDatabases(server.url(), background)
            with databases.migrated() as url:
                yield url
            databases.close()
    finally:
        background.close()


def main() -> int:
    """The command line; 1 where a promise was broken."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--examples", type=int, default=300, help="on each database")
    arguments.add_argument("--steps", type=int, default=40, help="of each example")
    arguments.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    arguments.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments.add_argument("--json", type=Path, help="write the figures there")
    given = arguments.parse_args()
    print(f"seed {given.seed}")
    figures: dict[str, object] = {"seed": given.seed}
    broken = 0
    for kind in ("sqlite", "postgres") if given.database == "both" else (given.database,):
        with _database(kind) as url:
            done = soak(url, examples=given.examples, steps=given.steps, number=given.seed)
        figures[kind] = done
        broken += done["broken"]
        print(f"{kind:9}", *(f"{name} {done[name]}" for name in FIGURES), sep="  ")
        print(" " * 9, *(f"{name} {count}" for name, count in done["rules"].items()), sep="  ")
    if given.json:
        given.json.write_text(json.dumps({"soak": "stateful", "figures": figures}, indent=2))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
