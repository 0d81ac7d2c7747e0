"""The only place that reads the clock; everywhere else time is an argument."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns the current time as an aware `datetime` in UTC."""


def utc_now() -> datetime:
    """The machine's wall clock, aware, in UTC."""
    return datetime.now(UTC)


def boot_seconds() -> float:
    """Seconds of a clock that only runs forward, through a suspended machine too where the system
    has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
