"""The only place that reads the clock; everywhere else time is an argument."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

Clock = Callable[[], datetime]
"""Returns the current time as an aware `datetime` in UTC."""


def utc_now() -> datetime:
    """The machine's wall clock, aware, in UTC."""
    return datetime.now(UTC)


def boot_seconds() -> float:
    """Seconds of a clock that only runs forward, through a suspended machine too where the system
    has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@cache
def boot_id() -> str | None:
    """What `boot_seconds` counts from, the same in all processes that can compare theirs; `None`
    where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    namespace = ""  # in one of its own, a container counts from another time
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/time")
    return f"{boot} {namespace}".strip()
