"""What the schedule costs a run that has FLORA's list to itself, and how fresh it is: computed.

The tracker's own schedule is asked, run by run, without a database or a network. No page is shared,
so this is the most that polling can cost; the trials show what it costs in company.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from bench.economy.trial import EVENLY
from tracker.core.run import RunState
from tracker.core.schedule import Durations, Policy, next_poll

RUNS: Final = 400
BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Alone:
    """Reads for each run, and the seconds from its end to the read that showed it."""

    reads: float
    p50: float
    p95: float


def alone(middle: float, *, interval: float, known: bool) -> Alone:
    """Runs that take from half of `middle` seconds to one and a half, without callbacks."""
    policy = Policy(interval=timedelta(seconds=interval))
    low, high = (share * middle for share in EVENLY)
    spread = high - low
    durations = Durations(count=200, p50=middle, p95=low + 0.95 * spread) if known else None
    reads, stale = 0, []
    for number in range(RUNS):
        run, end = RunState(run_id=f"run_{number}"), low + spread * (number + 0.5) / RUNS
        now, polls = 0.0, 0
        while polls == 0 or now < end:
            following = next_poll(
                run,
                policy=policy,
                now=BEGIN + timedelta(seconds=now),
                first_seen=BEGIN,
                polls=polls,
                callback_expected=False,
                durations=durations,
            )
            now = (following.at - BEGIN).total_seconds() if following else end
            polls += 1
        reads += polls
        stale.append(now - end)
    stale.sort()
    return Alone(reads / RUNS, stale[RUNS // 2], stale[RUNS * 95 // 100])
