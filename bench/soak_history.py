"""A first sweep of a long history that is killed ten times: every run is here, for few pages more.

    python -m bench.soak_history [--runs 100000] [--kills 10] [--database sqlite|postgresql|both]
        [--json FILE]

The sweep is `tracker reconcile`, in processes of its own, against the simulator over HTTP; it runs
once without being killed and once with SIGKILL each time another share of the pages was read.
The exit status is 1 where a run is missing or more than 10 % more pages were read.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench.throw_away import KINDS, chosen, throw_away
from tests.e2e.history import Swept, sweep
from tracker.store import migrate

MORE: Final = 1.1


def measure(kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """Both sweeps on one kind of database, each of an empty one."""
    found: dict[str, Any] = {}
    for name, kills in (("whole", 0), ("killed", given.kills)):
        with tempfile.TemporaryDirectory() as directory, throw_away(kind) as url:
            began = time.perf_counter()
            log = Path(directory) / "log"
            swept = asyncio.run(whole(url, given.runs, kills, log))
            found[name] = asdict(swept) | {"seconds": round(time.perf_counter() - began, 1)}
        print(kind, name, found[name], flush=True)
    return found


async def whole(url: str, history: int, kills: int, log: Path) -> Swept:
    """A sweep of an empty database."""
    await migrate.upgrade(url)
    return await sweep(url, history=history, kills=kills, log=log)


def broken(found: dict[str, Any], given: argparse.Namespace) -> list[str]:
    """What was promised and does not hold."""
    once, killed = found["whole"], found["killed"]
    promises = {
        "runs are missing": once["rows"] == killed["rows"] == given.runs,
        "it was not killed as often": killed["killed"] == given.kills,
        "more than 10 % more pages": killed["pages"] <= MORE * once["pages"],
    }
    return [name for name, kept in promises.items() if not kept]


def main() -> int:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=100_000)
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--database", choices=(*KINDS, "both"), default="both")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    found = {kind: measure(kind, given) for kind in chosen(given.database)}
    failed = [f"{kind}: {each}" for kind, one in found.items() for each in broken(one, given)]
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))
    for each in failed:
        print(f"BROKEN: {each}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
