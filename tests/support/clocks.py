"""Clocks in the hand of a test: a wall clock and a monotonic one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg


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


@asynccontextmanager
async def server_clock(postgres_url: str) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
    """PostgreSQL with a clock that can be set: for connections made within the block to that
    database. Yields what sets it by so many seconds, against the machine's."""
    admin: Any = await asyncpg.connect(postgres_url)

    async def set_to(seconds: float) -> None:
        await admin.execute(
            "CREATE OR REPLACE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql "
            f"AS 'SELECT pg_catalog.clock_timestamp() + interval ''{seconds} s''"
            "'"
        )

    await set_to(0)
    name = urlsplit(postgres_url).path.removeprefix("/")
    await admin.execute(f'ALTER DATABASE "{name}" SET search_path = public, pg_catalog')
    try:
        yield set_to
    finally:
        await admin.close()
