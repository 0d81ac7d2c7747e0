"""The clock that all processes on one database share: on PostgreSQL the server's.

Leases, and the moments at which runs are due, are written by one process and compared by another.
Where each went by its own machine's clock, two that are further apart than a lease lasts would both
take what one of them holds. So the server is asked for its time, and its answer is carried on by a
count of seconds that nobody sets, until it is asked again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from sqlalchemy import func, select

from tracker.core.clock import Clock, boot_seconds, utc_now
from tracker.core.errors import StoreError
from tracker.store.engine import Database

ASK_EVERY: Final = 10.0
"""Seconds between two questions: two machines' seconds differ by far less than that matters, but a
machine may be halted, and the server replaced."""
SLOW: Final = 1.0
"""Seconds after which an answer says too little to go by."""
WORTH_TELLING: Final = timedelta(seconds=5)
"""A machine whose own clock is off by more is told so in the log."""

_ASK: Final = select(func.clock_timestamp())

log = structlog.get_logger(__name__)


class ServerClock:
    """A `Clock` that tells the server's time. It has to be asked once before it is read."""

    def __init__(self, db: Database, *, seconds: Callable[[], float] = boot_seconds) -> None:
        self._db = db
        self._seconds = seconds
        self._start: datetime | None = None

    def __call__(self) -> datetime:
        """The present moment by the server's clock, aware, in UTC."""
        if self._start is None:
            raise RuntimeError("the server has not been asked for its time yet")
        return self._start + timedelta(seconds=self._seconds())

    async def ask(self) -> None:
        """Ask the server for its time. Raises `StoreUnavailable`."""
        async with self._db.read() as connection:
            before = self._seconds()
            told = (await connection.execute(_ASK)).scalar_one().astimezone(UTC)
            after = self._seconds()
        if self._start is not None and after - before > SLOW:
            return
        # The answer was made at some moment between the two.
        earliest, latest = told - timedelta(seconds=after), told - timedelta(seconds=before)
        if self._start is None or not earliest <= self._start <= latest:
            start = earliest + (latest - earliest) / 2
            if self._start is not None and abs(start - self._start) > WORTH_TELLING:
                seconds = round((start - self._start).total_seconds(), 1)
                log.warning("clock.server_jumped", seconds=seconds)
            self._start = start

    async def keep(self) -> None:
        """Ask again and again. While the server does not answer, the last answer is carried on."""
        while True:
            await asyncio.sleep(ASK_EVERY)
            with suppress(StoreError):
                await self.ask()


@asynccontextmanager
async def shared_clock(db: Database) -> AsyncIterator[Clock]:
    """The clock of all who use `db`, for as long as the block lasts.

    SQLite is used by one machine, and goes by its clock. Raises `StoreUnavailable`.
    """
    if db.dialect == "sqlite":
        yield utc_now
        return
    clock = ServerClock(db)
    await clock.ask()
    off = utc_now() - clock()
    if abs(off) > WORTH_TELLING:
        log.warning("clock.off", seconds=round(off.total_seconds(), 1))
    keeping = asyncio.create_task(clock.keep(), name="server-clock")
    try:
        yield clock
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
