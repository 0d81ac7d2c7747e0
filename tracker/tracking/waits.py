"""What the processes on one database tell each other of the waits that FLORA asks for.

Every request looks here before it leaves. That costs a row read by its key, where a request costs
a round trip through the internet, and needs no process to listen: a command that runs beside the
server hears of a wait like another worker does.
"""

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.flora.waits import LONGEST_WAIT
from tracker.store import waits
from tracker.store.engine import Database

WITHIN: Final = 1.0
"""Seconds that the database may take. Without its answer each process goes by what it was told
itself, and FLORA tells it soon enough."""


class DatabaseWaits:
    """The waits of the workspace in `slot`; `process` is who is told. Nothing is raised."""

    def __init__(self, database: Database, slot: str, *, process: str, clock: Clock) -> None:
        self._database = database
        self._slot = slot
        self._process = process
        self._clock = clock

    async def left(self) -> float:
        """How many seconds the last wait still lasts; 0 where it is over."""
        until = None
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(WITHIN):
                until = await waits.until(self._database, self._slot)
        if until is None:
            return 0.0
        left = (until - self._clock()).total_seconds()
        # No wait is longer than the longest: one that seems so was kept under another clock.
        return left if 0 < left <= LONGEST_WAIT + WITHIN else 0.0

    async def tell(self, seconds: float) -> None:
        """Keep a wait of so many seconds from now on."""
        until = self._clock() + timedelta(seconds=seconds)
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(WITHIN):
                await waits.keep(self._database, self._slot, until, told=self._process)
