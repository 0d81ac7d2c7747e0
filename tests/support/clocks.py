"""Clocks in the hand of a test: a wall clock and a monotonic one."""

import asyncio
from datetime import UTC, datetime, timedelta


class HandClock:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self._now = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self._now

    def move(self, seconds: float) -> None:
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
