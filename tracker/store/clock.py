"""The clock that all processes on one database share: on PostgreSQL the server's.

Leases, and the times at which runs are due, are written by one process and compared by another. If
each used the clock of its machine, two clocks that differ by more than a lease lasts would let both
processes take it. So the server is asked for its time, and a monotonic clock carries the answer on
until it is asked again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from sqlalchemy import func, select

from tracker.core.clock import Clock, boot_seconds, utc_now
from tracker.core.log import get_logger
from tracker.core.waiting import cancel, repeat
from tracker.store.engine import Database

ASK_EVERY: Final = 10.0
"""Seconds between two questions: the drift in between does not matter, but a machine may be
suspended, and the server replaced."""
SLOW: Final = 1.0
"""Seconds after which an answer is too imprecise."""
LOGGED_FROM: Final = timedelta(seconds=5)
"""A machine's clock that is off by more is logged."""

_ASK: Final = select(func.clock_timestamp())

log = get_logger(__name__)


class ServerClock:
    """A `Clock` of the server's time; `ask` has to be called once before it is read.

    `on_jump` are called where the server's clock was set, with the difference, before any time
    after that is given.
    """

    def __init__(self, db: Database, *, seconds: Callable[[], float] = boot_seconds) -> None:
        self._db = db
        self._seconds = seconds
        self._start: datetime | None = None
        self.on_jump: list[Callable[[timedelta], None]] = []

    def __call__(self) -> datetime:
        """The present moment by the server's clock, aware, in UTC."""
        if self._start is None:
            raise RuntimeError("the server has not been asked for its time yet")
        return self._start + timedelta(seconds=self._seconds())

    async def ask(self) -> None:
        """Ask the server for its time. Raises `StoreUnavailable`."""
        async with self._db.read() as connection:
            before = self._seconds()
            answer = (await connection.execute(_ASK)).scalar_one().astimezone(UTC)
            after = self._seconds()
        if self._start is not None and after - before > SLOW:
            return
        # The answer was made at some time between the two.
        earliest, latest = answer - timedelta(seconds=after), answer - timedelta(seconds=before)
        if self._start is None or not earliest <= self._start <= latest:
            start = earliest + (latest - earliest) / 2
            if self._start is not None and abs(jump := start - self._start) > LOGGED_FROM:
                log.warning("clock.server_jumped", seconds=round(jump.total_seconds(), 1))
                for jumped in self.on_jump:
                    jumped(jump)
            self._start = start

    async def ask_after(self, seconds: float) -> None:
        """Ask in so many seconds; while there is no answer, the last one is used."""
        await asyncio.sleep(seconds)
        await self.ask()


@asynccontextmanager
async def shared_clock(db: Database, *, ask_every: float = ASK_EVERY) -> AsyncIterator[Clock]:
    """The clock shared by all processes on `db`, for as long as the block lasts.

    SQLite is used on one machine, whose clock it is. Raises `StoreUnavailable`.
    """
    if db.dialect == "sqlite":
        yield utc_now
        return
    clock = ServerClock(db)
    await clock.ask()
    off = utc_now() - clock()
    if abs(off) > LOGGED_FROM:
        log.warning("clock.off", seconds=round(off.total_seconds(), 1))
    keeping = asyncio.create_task(
        repeat("server clock", partial(clock.ask_after, ask_every)), name="server-clock"
    )
    try:
        yield clock
    finally:
        await cancel(keeping)
