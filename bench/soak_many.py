"""Many processes on one PostgreSQL: everything is done once, and in time.

    python -m bench.soak_many [--runs 2000] [--receivers 3] [--workers 3] [--cut-every 2]
        [--json FILE]

Receivers and workers, some of them on machines whose clocks are minutes wrong, bring runs to their
end while FLORA loses and doubles callbacks, stands behind a gateway, forgets keys soon, has
colleagues start runs too, and exchanges its key. One receiver and one worker are killed on the way,
and the connections that carry notifications are cut again and again. Triggers in the database and
FLORA's own record of what it was asked tell whether anything was done twice, or late.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.e2e.many import Figures, endure
from tests.e2e.starting import FORGOTTEN
from tests.support.databases import migrate
from tests.support.postgres import PostgresServer
from tracker.worker import WorkerTimes

SETTLED_WITHIN = 600.0


async def soak(runs: int, receivers: int, workers: int, cut_every: float) -> Figures:
    """All of it on a new server."""
    with PostgresServer(fsync=True) as server, tempfile.TemporaryDirectory() as folder:
        await migrate(server.url())
        return await endure(
            server.url(),
            Path(folder),
            receivers=receivers,
            workers=workers,
            runs=runs,
            cut_every=cut_every or None,
            within=SETTLED_WITHIN,
            exchange_every=5.0,
            **FORGOTTEN,
        )


def told(figures: Figures) -> dict[str, Any]:
    """The figures by name."""
    seen = figures.seen
    late = seen.late or [0.0]
    return {
        "runs": figures.asked,
        "runs_begun_at_flora": figures.begun,
        "runs_settled": figures.settled,
        "starts": dict(figures.keys.states),
        "paid_twice": len(figures.keys.paid_twice),
        "runs_under_a_wrong_key": len(figures.keys.wrong) + len(figures.keys.told_wrong),
        "processes_killed": figures.killed,
        "seconds": round(figures.seconds, 1),
        "claims": len(seen.late),
        "claims_taken_over_from_the_dead": seen.taken_over,
        "claims_stolen": len(seen.stolen),
        "reads_made_twice": len(seen.read_twice),
        "sweeps": seen.sweeps,
        "sweeps_at_once": seen.sweeps_at_once,
        "deadlocks": seen.deadlocks,
        "listeners_cut": figures.listeners_cut,
        "late_seconds_p50": round(late[len(late) // 2], 2),
        "late_seconds_p99": round(late[len(late) * 99 // 100], 2),
        "late_seconds_max": round(late[-1], 2),
        "slowest_start_seconds": round(figures.slowest_start, 2),
    }


def main() -> int:
    """The command line; 1 where a promise was broken."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=2000)
    arguments.add_argument("--receivers", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=3)
    arguments.add_argument(
        "--cut-every", type=float, default=2.0, help="seconds between two cuts; 0 for none"
    )
    arguments.add_argument("--json", type=Path, help="write the figures there")
    given = arguments.parse_args()
    figures = asyncio.run(soak(given.runs, given.receivers, given.workers, given.cut_every))
    broken = figures.broken
    if figures.seen.late and figures.seen.late[-1] >= WorkerTimes.tick:
        broken.append("a look was late by a tick")
    for name, value in told(figures).items():
        print(f"  {name:34} {value}")
    for promise in broken:
        print(f"BROKEN: {promise}")
    if given.json:
        figures_told = told(figures) | {"broken": broken}
        given.json.write_text(json.dumps({"soak": "many", "figures": figures_told}, indent=2))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
