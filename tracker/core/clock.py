"""Time is an argument: the one place where the wall clock is read."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns the present moment as an aware `datetime` in UTC. Tests pass their own."""


def utc_now() -> datetime:
    """The machine's wall clock, aware, in UTC."""
    return datetime.now(UTC)


def boot_seconds() -> float:
    """Seconds that only count up, those in which the machine is suspended too, where it can."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
