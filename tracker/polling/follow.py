"""Following runs to their end in the database, whoever brings the news.

Usually a server or a worker does. Where a run that is followed stays overdue, none of them is
running, and what is due is polled from here.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Final, NamedTuple, TypeVar

from tracker.core.clock import Clock
from tracker.core.errors import StoreError, StoreUnavailable
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import Run, Tracking
from tracker.polling.poll import Poller
from tracker.polling.workspaces import Workspaces
from tracker.store.engine import Database
from tracker.store.queries import changes
from tracker.store.queries import runs as read
from tracker.store.signals import Signals

T = TypeVar("T")

LOOK_EVERY: Final = 0.5
"""Seconds between two looks into a database that tells of no change."""
LOOK_ANYWAY: Final = 5.0
"""Seconds between two looks where changes are told: what a lost notification costs."""
OVERDUE: Final = timedelta(seconds=3)
"""A run that is due for longer is nobody's: workers look at once."""
POLL_EVERY: Final = 1.0
"""Seconds between two rounds of polling from here."""
OUTAGE: Final = 60.0
"""Seconds for which the database may be away before following it is given up."""
AT_A_TIME: Final = 1000
"""So many runs are asked for in one statement."""

Tell = Callable[[str], None]
"""Takes a line for the person who waits."""
More = Callable[[], Awaitable[tuple[Sequence[str], bool]]]
"""Gives runs to be followed besides, and whether others may come."""


class Sight(NamedTuple):
    """A run as it stands, and who brought the last news of it."""

    record: Record
    source: Source


class Follower:
    """Follows runs. One object serves any number of callers at the same time."""

    def __init__(
        self,
        *,
        database: Database,
        signals: Signals,
        poller: Poller,
        workspaces: Workspaces,
        clock: Clock,
    ) -> None:
        self._database = database
        self._signals = signals
        self._poller = poller
        self._workspaces = workspaces
        self._clock = clock

    async def follow(
        self, run_ids: Iterable[str], *, more: More | None = None, tell: Tell | None = None
    ) -> AsyncGenerator[list[Sight], None]:
        """The runs as they stand, then those that changed, each time until none is active.

        A run that is not in the database is left out. `more` is asked at each look for further
        runs. `tell` hears once of whatever keeps the runs from being read. Raises
        `StoreUnavailable` where the database stays away for `OUTAGE` seconds.
        """
        watch = _Watch(run_ids, more, tell)
        with self._signals.subscribed(watch.heard):
            polling: asyncio.Task[None] | None = None
            try:
                while watch.open or more is not None:
                    watch.changed.clear()
                    if more is not None:
                        new, others_may_come = await patiently(more, watch.tell_once)
                        watch.add(new)
                        more = watch.more = more if others_may_come else None
                    if sights := await patiently(partial(self._look, watch), watch.tell_once):
                        yield sights
                    if not watch.open and more is None:
                        return
                    if polling is not None and polling.done():
                        polling.result()  # raises what was not foreseen
                        polling = None
                    if polling is None and self._overdue(watch):
                        polling = asyncio.create_task(self._poll(watch), name="follow-poll")
                    await self._pause(watch)
            finally:
                if polling is not None:
                    polling.cancel()
                    await asyncio.wait([polling])

    async def _look(self, watch: "_Watch") -> list[Sight]:
        """Look at the runs that are open; those that changed."""
        found = await self._open_runs(list(watch.open))
        sights = await self._sights(watch.changes(found))
        watch.take(found)
        return sights

    async def _open_runs(self, run_ids: Sequence[str]) -> dict[str, Record]:
        found: dict[str, Record] = {}
        for start in range(0, len(run_ids), AT_A_TIME):
            found |= await read.get_runs(self._database, run_ids[start : start + AT_A_TIME])
        return found

    async def _sights(self, records: Sequence[Record]) -> list[Sight]:
        sources: dict[str, Source] = {}
        for start in range(0, len(records), AT_A_TIME):
            some = [one.run.run_id for one in records[start : start + AT_A_TIME]]
            sources |= await changes.last_sources(self._database, some)
        return [Sight(one, sources.get(one.run.run_id, one.source)) for one in records]

    def _overdue(self, watch: "_Watch") -> list[Record]:
        """The runs that nobody reads although it is time."""
        now = self._clock()
        return [
            record
            for record in watch.open.values()
            if record is not None
            and record.next_check_at is not None
            and now - record.next_check_at > OVERDUE
            and (record.lease_until is None or record.lease_until <= now)
        ]

    async def _poll(self, watch: "_Watch") -> None:
        """Poll what is due, once; then say what kept the overdue runs from being read, if it is
        known."""
        overdue = self._overdue(watch)
        # The database being away is for the next look to find out.
        with contextlib.suppress(StoreError):
            await self._poller.poll_due()
        for record in overdue:
            workspace = self._workspaces.of(record.run.workspace_id)
            if workspace is None or workspace.client is None:
                watch.tell_once(
                    f"run {record.run.run_id} is due, but nobody polls, and no FLORA API key for "
                    "its workspace is set here: start `tracker serve` or `tracker worker`"
                )
            elif (reason := workspace.client.breaker.reason) is not None:
                watch.tell_once(f"runs cannot be read: {reason}")
        watch.changed.set()
        await asyncio.sleep(POLL_EVERY)

    async def _pause(self, watch: "_Watch") -> None:
        """Wait until something may have changed, or a run may have become overdue."""
        told = self._database.dialect == "postgresql" and self._signals.listening
        longest = LOOK_ANYWAY if told else LOOK_EVERY
        now = self._clock()
        dues = [one.next_check_at for one in watch.open.values() if one and one.next_check_at]
        overdue_in = [(due + OVERDUE - now).total_seconds() for due in dues]
        soonest = min((wait for wait in overdue_in if wait > 0), default=longest)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(max(soonest, 0.05), longest)):
                await watch.changed.wait()


class _Watch:
    """What one caller follows: the runs that are open yet, and as what they were last shown."""

    def __init__(self, run_ids: Iterable[str], more: More | None, tell: Tell | None) -> None:
        self.open: dict[str, Record | None] = dict.fromkeys(run_ids)
        self.more = more
        self.changed = asyncio.Event()
        self._tell = tell
        self._told: set[str] = set()
        self._shown: dict[str, tuple[Run, Tracking, str | None]] = {}

    def heard(self, run_ids: Sequence[str]) -> None:
        """Runs changed; where none are named, any may have."""
        if self.more is not None or not run_ids or not self.open.keys().isdisjoint(run_ids):
            self.changed.set()

    def add(self, run_ids: Iterable[str]) -> None:
        """Follow these too."""
        self.open |= dict.fromkeys(run_ids)

    def changes(self, found: dict[str, Record]) -> list[Record]:
        """Those that show otherwise than before."""
        return [one for one in found.values() if self._shown.get(one.run.run_id) != _shown(one)]

    def take(self, found: dict[str, Record]) -> None:
        """These are shown now. What has ended, or is gone, is open no more."""
        self._shown |= {run_id: _shown(record) for run_id, record in found.items()}
        self.open = {
            run_id: found[run_id]
            for run_id in self.open
            if run_id in found and found[run_id].tracking is Tracking.ACTIVE
        }

    def tell_once(self, line: str) -> None:
        """Tell what was not told before."""
        if self._tell is not None and line not in self._told:
            self._told.add(line)
            self._tell(line)


def _shown(record: Record) -> tuple[Run, Tracking, str | None]:
    """What is shown of a run."""
    return record.run, record.tracking, record.last_error


async def patiently(work: Callable[[], Awaitable[T]], tell: Tell | None) -> T:
    """What `work` returns, as soon as the database answers.

    Raises `StoreUnavailable` where it does not for `OUTAGE` seconds.
    """
    give_up = time.monotonic() + OUTAGE
    while True:
        try:
            return await work()
        except StoreUnavailable as error:
            if time.monotonic() >= give_up:
                raise
            if tell is not None:
                tell(f"{error}; still trying")
            await asyncio.sleep(LOOK_EVERY)
