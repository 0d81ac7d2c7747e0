"""The simulated FLORA of a trial: it counts what it is asked, and may have had runs before."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Final

from bench.economy.trial import SEED, Trial
from tracker.core.clock import utc_now
from tracker.simulator import Options, Simulator, running

NOT_COUNTED: Final = ("runs.start", "generations.start", "techniques.list", "techniques.get")
"""Endpoints that are no reads of runs."""
EARLIER_RUNS: Final = 60
EARLIER: Final = timedelta(hours=3)


class Clock:
    """The machine's clock, or some time before it."""

    def __init__(self) -> None:
        self.back = timedelta()

    def __call__(self) -> datetime:
        """The time that it shows, UTC."""
        return utc_now() - self.back


@asynccontextmanager
async def flora_of(trial: Trial) -> AsyncIterator[Simulator]:
    """FLORA as the trial finds it. Where durations are known, it has runs of three hours ago."""
    options = Options(
        seed=SEED,
        run_seconds=trial.seconds,
        history_outputs=trial.history_outputs,
        drop=1.0 if trial.lost else 0.0,
    )
    clock = Clock()
    async with running(options, clock=clock) as flora:
        if trial.known:
            begin_earlier(flora, clock, EARLIER_RUNS, EARLIER)
        yield flora


def begin_earlier(flora: Simulator, clock: Clock, count: int, over: timedelta) -> None:
    """Give it so many runs that began over so long a time, the last of them ended by now."""
    for number in range(count):
        clock.back = over - number * (over - over / 10) / count
        flora.start()
    clock.back = timedelta()


def reads(flora: Simulator) -> Mapping[str, int]:
    """How often each endpoint was read, however that was answered."""
    counted: Counter[str] = Counter()
    for (route, _), count in flora.world.counts.items():
        if route not in NOT_COUNTED:
            counted[route] += count
    return counted
