"""Changes of runs as they happen, by any process: each is read once for all readers of this one.

::

    signals ──► Broadcaster ──► ChangeReader    one for each stream or loop that follows changes
                    │
                    ▼ reads new events once for all readers
                GapTracker      up to which number no event can still appear

The numbers of `run_events` are the events' ids. An event is handed out only when no smaller number
can still appear, so the last number is all that a reader has to remember, and any process can
resume from it.

The broadcaster reads only while there are readers: when a signal says that a run changed, and at
intervals, because a signal can be lost and on SQLite other processes send none.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from tracker.core.errors import StoreUnavailable
from tracker.core.events import RunFilter
from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.run import Tracking
from tracker.core.waiting import repeat, wait_for
from tracker.polling.follow import Notify, until_available
from tracker.store.coordination import Signals
from tracker.store.engine import Database
from tracker.store.errors import StoreClosed
from tracker.store.queries import runs as read
from tracker.store.queries.runs import EventLine, Snapshot

PAGE_SIZE: Final = 250
"""Events in one read. A reader's queue holds several times as many."""
QUEUE_SIZE: Final = 1000
"""Changes queued for one reader; beyond that it is disconnected."""
POLL_SECONDS: Final = 2.0
"""Between two reads of new events, where other processes' signals are not heard."""
COALESCE_SECONDS: Final = 0.05
"""Between two reads, so that changes which come together are read together."""
LISTENING_POLL_SECONDS: Final = 15.0
"""Between two reads without a signal, where other processes' signals are heard."""
START_LOOKBACK: Final = 1000
"""How far before the newest number reading starts: an open transaction may hold smaller ones."""
START_SETTLE_SECONDS: Final = 1.0
"""How long open transactions are waited for at the start."""
START_SECONDS: Final = 8.0
"""How long a reader waits for the start."""
REMEMBERED_RUNS: Final = 10_000
"""Runs whose last sent tracking state is remembered."""
GAP_SECONDS: Final = 10.0
"""After this long a gap is passed over: a foreign transaction may stay open for hours, and none of
the tracker's own takes so long."""
WAIT_SECONDS: Final = 60.0
"""How long one wait of a loop for the next change lasts; another follows."""

log = get_logger(__name__)


class _Gap(NamedTuple):
    """What is missing below `upto` was written, if at all, by transactions before `begun`."""

    upto: int
    begun: int
    until: float


class GapTracker:
    """Up to which number no event can still appear (`position`).

    PostgreSQL assigns an event's number when it is written and shows the event at the commit. A
    missing number is thus an event still to come, or none, where a transaction was rolled back. An
    event missing in one snapshot belongs to a transaction begun before that; once all of those have
    ended and it is still missing, it never appears.
    """

    def __init__(self, start: int) -> None:
        self.position = start
        self._dead = start
        self._gaps: deque[_Gap] = deque()

    @property
    def waiting(self) -> bool:
        """Whether there is a gap that may still be filled."""
        return bool(self._gaps)

    def advance(self, numbers: Sequence[int], snapshot: Snapshot | None, *, now: float) -> int:
        """How many of these events may be sent.

        They are the next ones after `position` in one snapshot; `snapshot` is `None` where numbers
        appear in order. `now` is in seconds, by a monotonic clock.
        """
        if snapshot is None:
            self.position = numbers[-1] if numbers else self.position
            return len(numbers)
        while self._gaps and (self._gaps[0].begun <= snapshot.ended or self._gaps[0].until <= now):
            self._dead = self._gaps.popleft().upto
        ready = 0
        for number in numbers:
            if number > self.position + 1 and number > self._dead + 1:
                break
            self.position = number
            ready += 1
        if ready == len(numbers):
            self._gaps.clear()
        elif not self._gaps or self._gaps[-1].upto < numbers[-1]:
            self._gaps.append(_Gap(numbers[-1], snapshot.begun, now + GAP_SECONDS))
        return ready


@dataclass(frozen=True, eq=False)
class Change:
    """A changed run. `event` is its new event; `None` where it changed without one (it was lost,
    or came back)."""

    record: Record
    event: EventLine | None


class ChangeReader:
    """The bounded queue between the broadcaster and one reader, and which runs that follows.

    The broadcaster never waits for a reader: one whose queue is full is disconnected.
    """

    def __init__(
        self, runs: RunFilter, *, queue_size: int, on_close: Callable[["ChangeReader"], None]
    ) -> None:
        self.runs = runs
        self.position = 0
        """All events up to this number have been queued or skipped."""
        self.ended = False
        self._live = False
        self._queue_size = queue_size
        self._on_close = on_close
        self._queue: deque[Change | int] = deque()
        self._filled = asyncio.Event()

    def go_live(self, number: int) -> None:
        """Accept what is offered after `number` from now on."""
        self.position = number
        self._live = True

    def offer(self, change: Change) -> None:
        """Queue a change, if it is followed and new to this reader."""
        if not self._live or self.ended:
            return
        if change.event is not None:
            if change.event.id <= self.position:
                return
            self.position = change.event.id
        if self.runs.matches(change.record):
            self._add(change)

    def restart(self, number: int) -> None:
        """Events are numbered anew, and continue after `number`."""
        if self._live and not self.ended:
            self.position = number
            self._add(number)

    def _add(self, one: Change | int) -> None:
        if len(self._queue) < self._queue_size:
            self._queue.append(one)
            self._filled.set()
        else:
            log.info("stream.reader_dropped", behind=self._queue_size)
            self.end()

    def end(self) -> None:
        """Disconnect; what is queued is dropped."""
        self.ended = True
        self._queue.clear()
        self._filled.set()
        self.close()

    def close(self) -> None:
        """Give the place back to the broadcaster."""
        self._on_close(self)

    async def wait(self, timeout: float) -> bool:
        """Wait until something is queued, `timeout` seconds at most; false at the end."""
        if not self._queue and not self.ended:
            self._filled.clear()
            await wait_for(self._filled, timeout)
        return not self.ended

    def next(self) -> Change | int | None:
        """The next change, or the number after which events continue that are numbered anew;
        `None` where nothing is queued."""
        return self._queue.popleft() if self._queue else None


class Broadcaster:
    """Gives out readers, and offers each change to all of them."""

    def __init__(self, db: Database, signals: Signals) -> None:
        self.poll_seconds = POLL_SECONDS
        self._db = db
        self._signals = signals
        self._readers: set[ChangeReader] = set()
        self._gaps = GapTracker(0)
        self.sent_upto = 0
        """All events up to this number have been sent."""
        self._signalled: set[str] = set()
        self._woken = asyncio.Event()
        self._sent_tracking: OrderedDict[str, Tracking] = OrderedDict()
        self._starting = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def follow(
        self, runs: RunFilter, after: int | None, notify: Notify | None = None
    ) -> AsyncGenerator[Change, None]:
        """The changes of these runs after the event `after`, or from now on.

        A loop that is too slow continues from the database. An `after` that the database does not
        have begins with what comes next. `notify` gets each reason why changes cannot be read.
        Raises `StoreUnavailable` if the database does not answer for a minute when changes are read
        from it.
        """
        while not self._closed:
            reader = await until_available(partial(self.subscribe, runs), notify)
            try:
                if after is None or not await until_available(
                    partial(self.has_reached, after), notify
                ):
                    after = self.sent_upto
                async for page in self.missed(after):
                    for change in page:
                        if runs.matches(change.record):
                            yield change
                after = max(after, self.sent_upto)
                reader.go_live(after)  # nothing has been awaited since the last page
                while await reader.wait(WAIT_SECONDS):
                    while (one := reader.next()) is not None:
                        if isinstance(one, int):
                            after = one
                        else:
                            yield one
                            after = one.event.id if one.event else after
                    after = after if reader.ended else reader.position
            finally:
                reader.close()

    async def reached(self) -> int:
        """A number for `follow`, from which on it misses nothing. Raises `StoreUnavailable`."""
        reader = await self.subscribe(RunFilter())
        reader.close()
        return self.sent_upto

    async def subscribe(self, runs: RunFilter, *, queue_size: int = QUEUE_SIZE) -> ChangeReader:
        """A reader, which has to be closed. It is offered nothing before it goes live.

        Raises `StoreUnavailable`.
        """
        if self._closed:
            raise StoreClosed("changes are not read any more")
        reader = ChangeReader(runs, queue_size=queue_size, on_close=self._leave)
        self._readers.add(reader)
        try:
            await self._start()
        except BaseException:
            reader.close()
            raise
        return reader

    async def has_reached(self, number: int) -> bool:
        """Whether there was an event of that number; else it is of another database, or from before
        numbering began anew."""
        return number <= max(self.sent_upto, await read.newest_event(self._db))

    async def missed(self, number: int) -> AsyncIterator[list[Change]]:
        """What was sent after `number`, in pages, up to `sent_upto`.

        At its end, until the caller waits for something, nothing lies between the last change and
        `sent_upto`: that is the moment to go live.
        """
        while number < self.sent_upto:
            upto = self.sent_upto
            page = await read.events_after(self._db, number, limit=PAGE_SIZE, upto=upto)
            records = await self._records({event.run_id for event in page.lines})
            yield _changes(page.lines, records)
            number = page.lines[-1].id if len(page.lines) == PAGE_SIZE else upto

    async def aclose(self) -> None:
        """Disconnect all readers and accept no more."""
        self._closed = True
        for reader in tuple(self._readers):
            reader.end()

    def _leave(self, reader: ChangeReader) -> None:
        self._readers.discard(reader)
        if not self._readers and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _start(self) -> None:
        try:
            async with asyncio.timeout(START_SECONDS), self._starting:
                if self._task is None:
                    await self._find_position()
                    self._task = asyncio.create_task(self._run(), name="broadcaster")
        except TimeoutError:
            raise StoreUnavailable("the run events could not be read in time") from None

    async def _run(self) -> None:
        with self._signals.subscribed(self._on_signal):
            await repeat("changes", self._send_next)

    async def _send_next(self) -> None:
        await self._send_new()
        await asyncio.sleep(COALESCE_SECONDS)
        if not self._gaps.waiting:
            listening = self._db.dialect != "sqlite" and self._signals.listening
            seconds = LISTENING_POLL_SECONDS if listening else self.poll_seconds
            await wait_for(self._woken, seconds)

    def _on_signal(self, run_ids: Sequence[str]) -> None:
        self._signalled.update(run_ids)
        self._woken.set()

    async def _find_position(self) -> None:
        """Find the number after which readers follow, so that "from now on" misses nothing.

        While someone's transaction stays open, a few events are sent although they are old.
        """
        newest = await read.newest_event(self._db)
        self._gaps = GapTracker(max(newest - START_LOOKBACK, 0))
        until = asyncio.get_running_loop().time() + START_SETTLE_SECONDS
        while self._gaps.position < newest and asyncio.get_running_loop().time() < until:
            page = await read.events_after(self._db, self._gaps.position, limit=PAGE_SIZE)
            if not page.lines:  # deleted meanwhile
                break
            self._ready(page)
            if self._gaps.waiting:
                await asyncio.sleep(COALESCE_SECONDS)
        self.sent_upto = self._gaps.position

    async def _send_new(self) -> None:
        more = True
        while more:
            self._woken.clear()
            signalled = set(self._signalled)
            page = await read.events_after(self._db, self._gaps.position, limit=PAGE_SIZE)
            if not page.lines and await read.newest_event(self._db) < self._gaps.position:
                # Every event was deleted, and SQLite numbers them from 1 again.
                await self._find_position()
                for reader in tuple(self._readers):
                    reader.restart(self.sent_upto)
                return
            with_event = {event.run_id for event in page.lines}
            records = await self._records(with_event | signalled)
            # Nothing can fail from here on.
            self._signalled -= signalled
            ready = self._ready(page)
            self._send(_changes(ready, records))
            self._send(
                Change(record, None)
                for run_id in signalled - with_event
                if (record := records.get(run_id)) is not None
                and self._sent_tracking.get(run_id) is not record.tracking
            )
            self.sent_upto = self._gaps.position
            more = len(ready) == PAGE_SIZE

    def _ready(self, page: read.EventPage) -> list[EventLine]:
        """The events that may be sent; the others wait for smaller numbers."""
        now = asyncio.get_running_loop().time()
        numbers = [event.id for event in page.lines]
        return page.lines[: self._gaps.advance(numbers, page.snapshot, now=now)]

    async def _records(self, run_ids: set[str]) -> dict[str, Record]:
        return await read.get_runs(self._db, sorted(run_ids)) if run_ids else {}

    def _send(self, changes: Iterable[Change]) -> None:
        for change in changes:
            run_id = change.record.run.run_id
            self._sent_tracking[run_id] = change.record.tracking
            self._sent_tracking.move_to_end(run_id)
            for reader in tuple(self._readers):
                reader.offer(change)
        while len(self._sent_tracking) > REMEMBERED_RUNS:
            self._sent_tracking.popitem(last=False)


def _changes(events: Sequence[EventLine], records: dict[str, Record]) -> list[Change]:
    """The events with their runs, except runs that have been deleted meanwhile."""
    return [Change(records[event.run_id], event) for event in events if event.run_id in records]
