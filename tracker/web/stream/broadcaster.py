"""One for the process: reads each change once, and hands it to all who follow.

It reads only while somebody follows: when a signal says that a run changed, and now and then on its
own, because a signal can be lost and because on SQLite other processes send none.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Final

import structlog

from tracker.core.errors import StoreError, StoreUnavailable
from tracker.core.record import Record
from tracker.core.run import Tracking
from tracker.store.engine import Database
from tracker.store.queries import changes as feed
from tracker.store.queries import runs as read
from tracker.store.signals import Signals
from tracker.web.http.errors import unavailable
from tracker.web.stream.events import Change, Wanted
from tracker.web.stream.reader import Reader
from tracker.web.stream.whole import Whole

PAGE: Final = 250
"""So many lines are read at once; a reader's queue holds several times as many."""
GATHER: Final = 0.05
"""Seconds between two reads, so that changes which come close together are read together."""
LOOK_EVERY: Final = (2.0, 15.0)
"""Seconds after which it looks without a signal: where other processes cannot be heard, and where
they can."""
BEFORE: Final = 1000
"""So far before the newest number it begins: what is being committed just now may have less."""
SETTLE_SECONDS: Final = 1.0
"""So long what is being committed is waited for at the beginning."""
START_SECONDS: Final = 8.0
"""So long a reader waits for the beginning."""
REMEMBERED: Final = 10_000
"""Of so many runs it is remembered how their tracking was last told."""

log = structlog.get_logger(__name__)


class Broadcaster:
    """Hands out readers, at most `readers` at a time, each with room for so many changes."""

    def __init__(self, db: Database, signals: Signals, *, readers: int, room: int) -> None:
        self._db = db
        self._signals = signals
        self._most = readers
        self._room = room
        self._readers: set[Reader] = set()
        self._whole = Whole(0)
        self._told_upto = 0
        self._named: set[str] = set()
        self._told: OrderedDict[str, Tracking] = OrderedDict()
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._closed = False

    async def follow(self, wanted: Wanted) -> Reader:
        """A reader, which has to be closed; nothing is offered to it before it goes live.

        Raises `Fault` 503 where there are too many already, and `StoreUnavailable`.
        """
        if self._closed:
            raise unavailable("The service is shutting down.")
        if len(self._readers) >= self._most:
            raise unavailable(f"{self._most} readers follow the stream already, which is the most.")
        reader = Reader(wanted, room=self._room, on_close=self._leave)
        self._readers.add(reader)
        try:
            await self._start()
        except BaseException:
            reader.close()
            raise
        return reader

    @property
    def told_upto(self) -> int:
        """All up to this number has been told."""
        return self._told_upto

    async def knows(self, number: int) -> bool:
        """Whether the timeline has come to that number; else it is another's, or was begun anew."""
        return number <= max(self._told_upto, await feed.newest(self._db))

    async def missed(self, number: int) -> AsyncIterator[list[Change]]:
        """What was told after that number and up to now, page by page.

        When it ends nothing lies between the last change and `told_upto`, until the caller waits
        for something: that is the moment to go live.
        """
        while number < self._told_upto:
            upto = self._told_upto
            page = await feed.after(self._db, number, limit=PAGE, upto=upto)
            records = await self._records({line.run_id for line in page.lines})
            yield _changes(page.lines, records)
            number = page.lines[-1].id if len(page.lines) == PAGE else upto

    def close(self) -> None:
        """End all readers at once, and take no more."""
        self._closed = True
        for reader in tuple(self._readers):
            reader.end()

    def _leave(self, reader: Reader) -> None:
        self._readers.discard(reader)
        if not self._readers and self._task is not None:
            self._task.cancel()
            self._task = self._started = None

    async def _start(self) -> None:
        if self._task is None:
            self._started = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(self._started), name="broadcaster")
        assert self._started is not None  # noqa: S101 - for the type checker
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.shield(self._started)
        except TimeoutError:
            raise StoreUnavailable("the timeline could not be read in time") from None

    async def _run(self, started: "asyncio.Future[None]") -> None:
        with self._signals.subscribed(self._heard):
            try:
                await self._begin()
            except StoreError as error:
                self._task = self._started = None
                started.set_exception(error)
                started.exception()  # whoever waits for it may be gone
                return
            started.set_result(None)
            down = False
            while True:
                try:
                    await self._read_on()
                    down = False
                except StoreError as error:
                    if not down:
                        log.warning("stream.database_down", error=str(error))
                    down = True
                    await asyncio.sleep(LOOK_EVERY[0])
                    continue  # what was committed meanwhile is said by nobody again
                await asyncio.sleep(GATHER)
                await self._wait()

    def _heard(self, run_ids: Sequence[str]) -> None:
        self._named.update(run_ids)
        self._woken.set()

    async def _wait(self) -> None:
        if self._whole.waits:
            return
        alone = self._db.dialect == "sqlite" or not self._signals.listening
        try:
            async with asyncio.timeout(LOOK_EVERY[0] if alone else LOOK_EVERY[1]):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _begin(self) -> None:
        """Find up to where the timeline is whole, so that "from now on" misses nothing.

        Where somebody's transaction stays open, a few lines are rather told although they are old.
        """
        newest = await feed.newest(self._db)
        self._whole = Whole(max(newest - BEFORE, 0))
        until = asyncio.get_running_loop().time() + SETTLE_SECONDS
        while self._whole.upto < newest and asyncio.get_running_loop().time() < until:
            page = await feed.after(self._db, self._whole.upto, limit=PAGE)
            if not page.lines:  # deleted meanwhile
                break
            self._pass(page)
            if self._whole.waits:
                await asyncio.sleep(GATHER)
        self._told_upto = self._whole.upto

    async def _read_on(self) -> None:
        """Tell all that is new."""
        more = True
        while more:
            self._woken.clear()
            named = set(self._named)
            page = await feed.after(self._db, self._whole.upto, limit=PAGE)
            if not page.lines and await feed.newest(self._db) < self._whole.upto:
                await self._begin_again()
                return
            seen = {line.run_id for line in page.lines}
            records = await self._records(seen | named)
            # Nothing can fail from here on.
            self._named -= named
            passed = self._pass(page)
            self._tell(_changes(passed, records))
            self._tell(self._unlined(records, named - seen))
            self._told_upto = self._whole.upto
            more = len(passed) == PAGE

    def _pass(self, page: feed.Page) -> list[feed.Line]:
        """The lines that may be told; the others wait for some before them."""
        now = asyncio.get_running_loop().time()
        numbers = [line.id for line in page.lines]
        return page.lines[: self._whole.take(numbers, page.moment, now=now)]

    async def _begin_again(self) -> None:
        """Every line was deleted, and SQLite counts from the beginning."""
        await self._begin()
        for reader in tuple(self._readers):
            reader.begin_again(self._told_upto)

    def _unlined(self, records: dict[str, Record], run_ids: set[str]) -> list[Change]:
        """Changes that the timeline does not hold, because nobody saw anything."""
        return [
            Change(record, None)
            for run_id, record in records.items()
            if run_id in run_ids and self._told.get(run_id) is not record.tracking
        ]

    async def _records(self, run_ids: set[str]) -> dict[str, Record]:
        return await read.get_runs(self._db, sorted(run_ids)) if run_ids else {}

    def _tell(self, changes: list[Change]) -> None:
        for change in changes:
            run_id = change.record.run.run_id
            self._told[run_id] = change.record.tracking
            self._told.move_to_end(run_id)
            for reader in tuple(self._readers):
                reader.offer(change)
        while len(self._told) > REMEMBERED:
            self._told.popitem(last=False)


def _changes(lines: Sequence[feed.Line], records: dict[str, Record]) -> list[Change]:
    """The lines with their runs, but for those that have been deleted meanwhile."""
    return [Change(records[line.run_id], line) for line in lines if line.run_id in records]
