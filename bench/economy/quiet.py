"""What a sweep costs that finds nothing new: `tracker reconcile` beside a history that is known."""

import asyncio
import json
import subprocess
import sys
from datetime import timedelta
from typing import Any, Final

from bench.economy.flora import Clock, begin_earlier, reads
from bench.economy.tracked import environment
from bench.economy.trial import SEED
from bench.throw_away import throw_away
from tracker.simulator import Options, running
from tracker.store import migrate

RUNS: Final = 1000
OVER: Final = timedelta(days=2)


def run_quiet(kind: str) -> list[dict[str, Any]]:
    """Sweep a history of a thousand runs three times: what each sweep found, and its reads."""
    with throw_away(kind) as url:
        asyncio.run(migrate.upgrade(url))
        return asyncio.run(_run(url))


async def _run(url: str) -> list[dict[str, Any]]:
    clock = Clock()
    async with running(Options(seed=SEED), clock=clock) as flora:
        begin_earlier(flora, clock, RUNS, OVER)
        sweeps = []
        for _ in range(3):
            before = sum(reads(flora).values())
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "tracker", "reconcile", "--json"],
                env=environment(flora, url, 0),
                capture_output=True,
                text=True,
                check=True,
            )
            (found,) = json.loads(done.stdout)["sweeps"]
            sweeps.append(
                {
                    "discovered": found["discovered"],
                    "repaired": found["repaired"],
                    "reads": sum(reads(flora).values()) - before,
                }
            )
    return sweeps
