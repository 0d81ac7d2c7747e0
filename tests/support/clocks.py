"""Clocks in the hand of a test: a wall clock and a monotonic one."""

import asyncio
from datetime import UTC, datetime, timedelta


class HandClock:
    """A wall clock that stands still until it is moved or set, and one that only runs forward."""

    def __init__(self) -> None:
        self._now = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
        self._passed = 1000.0

    def __call__(self) -> datetime:
        return self._now

    def seconds(self) -> float:
        """The one that only runs forward."""
        return self._passed

    def move(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)
        self._passed += seconds

    def set(self, seconds: float) -> None:
        """Set the wall clock by so many seconds, forward or back; no time passes."""
        self._now += timedelta(seconds=seconds)


class PassedTime:
    """A monotonic clock that runs only while something waits: waits seem as long as ever, and take
    no time."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        until = self._now + seconds
        await asyncio.sleep(0)
        self._now = max(self._now, until)
