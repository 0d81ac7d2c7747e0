"""Following runs to their end in the database.

Usually a server or a worker polls. If a followed run stays overdue, none is running, and what is
due is polled from here.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Final, Generic, NamedTuple, Self, TypeVar

from tracker.core.clock import Clock
from tracker.core.errors import StoreError, StoreUnavailable
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import RunState, Tracking
from tracker.core.waiting import cancel, wait_for
from tracker.polling.poll import Poller
from tracker.store.coordination import Signals
from tracker.store.errors import StoreClosed
from tracker.store.queries import runs
from tracker.workspaces import Service

T = TypeVar("T")

CHECK_EVERY: Final = 0.5
"""Seconds between two reads of a database that sends no notifications."""
CHECK_ANYWAY: Final = 5.0
"""Seconds between two reads of one that does: the cost of a lost notification."""
OVERDUE: Final = timedelta(seconds=3)
"""A run that has been due for longer is polled by no process: workers poll at once."""
POLL_EVERY: Final = 1.0
"""Seconds between two rounds of polling from here."""
OUTAGE: Final = 60.0
"""Seconds without the database after which following ends with an error."""

Notify = Callable[[str], None]
"""Takes a line for the person who waits."""
More = Callable[[], Awaitable[tuple[Sequence[str], bool]]]
"""Gives further runs to follow, and whether there may be others later."""


class RunUpdate(NamedTuple):
    """A run as it is now, and the source of its last news."""

    record: Record
    source: Source | str


@dataclass(kw_only=True, eq=False)
class OwnPolling:
    """Calls `poll` while a caller waits, if no other process polls.

    Where one does, nothing stays overdue for `overdue_after`. Once something has, `poll` is called
    whenever something is due, at most every `poll_every` seconds, until the block ends.
    """

    poll: Callable[[], Awaitable[object]]
    clock: Clock
    overdue_after: timedelta = OVERDUE
    poll_every: float = POLL_EVERY
    _round: asyncio.Task[None] | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await cancel(self._round)

    @property
    def has_begun(self) -> bool:
        """Whether something was overdue."""
        return self._round is not None

    def check(self, due: datetime | None) -> asyncio.Task[None] | None:
        """Begin a round if what is due since then is overdue, and none is under way; return it.

        Raises unexpected errors of the last round.
        """
        if self._round is not None:
            if not self._round.done():
                return None
            self._round.result()
        if due is None or self.clock() - due <= self.overdue_after:
            return None
        self.overdue_after = timedelta(0)
        self._round = asyncio.create_task(self._poll_once(), name="own-polling")
        return self._round

    async def _poll_once(self) -> None:
        began = time.monotonic()
        with contextlib.suppress(StoreError):  # the caller's next read notices an outage
            await self.poll()
        await asyncio.sleep(max(self.poll_every - (time.monotonic() - began), 0.0))


@dataclass(kw_only=True, eq=False)
class Follower(Service):
    """Follows runs. One object serves any number of callers at the same time.

    A run that has been due for `overdue_after` is polled from here. `check_every` and
    `check_anyway` are the seconds between two reads of a database that sends no notifications, and
    of one that does.
    """

    signals: Signals
    poller: Poller
    overdue_after: timedelta = OVERDUE
    check_every: float = CHECK_EVERY
    check_anyway: float = CHECK_ANYWAY

    def __post_init__(self) -> None:
        self._records = _SharedCalls(lambda ids: runs.get_runs(self.database, ids))
        self._sources = _SharedCalls(lambda ids: runs.last_sources(self.database, ids))
        self._rounds = _SharedCalls(lambda _: self.poller.poll_due())

    async def read(self, run_ids: Sequence[str]) -> dict[str, Record]:
        """These runs as they are, in this order, without those that are not stored.

        Callers that read at the same time share the statements.
        """
        found = await self._records.call(run_ids)
        return {run_id: found[run_id] for run_id in run_ids if run_id in found}

    async def follow(
        self, run_ids: Iterable[str], *, more: More | None = None, notify: Notify | None = None
    ) -> AsyncGenerator[list[RunUpdate], None]:
        """The runs as they are, then each time those that changed, until none is active.

        Runs that are not in the database are left out. `more` is called before each read for
        further runs. `notify` gets each reason why the runs cannot be read, once. Raises
        `StoreUnavailable` if the database does not answer for `OUTAGE` seconds.
        """
        followed = _FollowedRuns(run_ids, notify, grows=more is not None)
        poll = partial(self._poll, followed)
        own = OwnPolling(poll=poll, clock=self.clock, overdue_after=self.overdue_after)
        with self.signals.subscribed(followed.on_signal):
            async with own:
                while followed.open or followed.grows:
                    followed.changed.clear()
                    if more is not None and followed.grows:
                        new, may_grow = await until_available(more, followed.notify_once)
                        followed.open |= dict.fromkeys(new)
                        followed.grows = may_grow
                    read = partial(self._read, followed)
                    if updates := await until_available(read, followed.notify_once):
                        yield updates
                    if not (followed.open or followed.grows):
                        return
                    dues = [due for _, due in self._unclaimed(followed)]
                    if (begun := own.check(min(dues, default=None))) is not None:
                        # `_pause` may last `check_anyway`.
                        begun.add_done_callback(lambda _: followed.changed.set())
                    await self._pause(followed, own.overdue_after)

    async def _read(self, followed: "_FollowedRuns") -> list[RunUpdate]:
        """Read the open runs; those that changed."""
        found = await self.read(list(followed.open))
        shown = {run_id: _shown(one) for run_id, one in found.items()}
        changed = [run_id for run_id in found if followed.shown.get(run_id) != shown[run_id]]
        sources = await self._sources.call(changed) if changed else {}
        followed.shown |= shown
        followed.open = {
            run_id: one for run_id, one in found.items() if one.tracking is Tracking.ACTIVE
        }
        return [RunUpdate(found[each], sources.get(each, found[each].source)) for each in changed]

    def _unclaimed(self, followed: "_FollowedRuns") -> list[tuple[Record, datetime]]:
        """The open runs that no process reads now, and when each is due."""
        now = self.clock()
        return [
            (record, record.next_check_at)
            for record in followed.open.values()
            if record is not None
            and record.next_check_at is not None
            and (record.lease_until is None or record.lease_until <= now)
        ]

    async def _poll(self, followed: "_FollowedRuns") -> None:
        """Poll what is due, once; then report why due runs cannot be read, if it is known."""
        now = self.clock()
        overdue = [record for record, due in self._unclaimed(followed) if due < now]
        await self._rounds.call([one.run.run_id for one in overdue])
        for record in overdue:
            workspace = self.workspaces.reader_of(record.run.workspace_id)
            if workspace is None or workspace.client is None:
                followed.notify_once(
                    f"run {record.run.run_id} is due, but no process polls, and no FLORA API key "
                    "for its workspace is set here: start `tracker serve` or `tracker worker`"
                )
            elif (reason := workspace.client.breaker.reason) is not None:
                followed.notify_once(f"runs cannot be read: {reason}")
        followed.changed.set()

    async def _pause(self, followed: "_FollowedRuns", overdue_after: timedelta) -> None:
        """Wait until something may have changed, or a run may have become overdue."""
        notified = self.database.dialect == "postgresql" and self.signals.listening
        # At the same moments for all callers, so that they share their reads.
        every = self.check_every
        longest = self.check_anyway if notified else every - time.monotonic() % every
        now = self.clock()
        dues = [one.next_check_at for one in followed.open.values() if one and one.next_check_at]
        overdue_in = [(due + overdue_after - now).total_seconds() for due in dues]
        soonest = min((wait for wait in overdue_in if wait > 0), default=longest)
        await wait_for(followed.changed, min(max(soonest, 0.05), longest))


class _SharedCalls(Generic[T]):
    """Calls `work` with the run ids of all callers that wait for its next call, one at a time.

    Without it, each of a thousand callers that wait for a run would read the database by itself.
    """

    def __init__(self, work: Callable[[Sequence[str]], Awaitable[T]]) -> None:
        self._work = work
        self._lock = asyncio.Lock()
        self._next: _SharedCall[T] | None = None

    async def call(self, run_ids: Iterable[str]) -> T:
        """The result of a call that begins after this, with these run ids among others."""
        if self._next is None:
            self._next = shared = _SharedCall[T]()
            shared.task = asyncio.create_task(self._run(shared), name="follow-shared")
        shared = self._next
        shared.run_ids |= dict.fromkeys(run_ids)
        shared.callers += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.callers -= 1
            if not shared.callers and not shared.task.done():  # all were cancelled
                if self._next is shared:
                    self._next = None
                shared.task.cancel()
                await asyncio.wait([shared.task])

    async def _run(self, shared: "_SharedCall[T]") -> T:
        async with self._lock:
            self._next = None
            return await self._work(list(shared.run_ids))


class _SharedCall(Generic[T]):
    task: asyncio.Task[T]

    def __init__(self) -> None:
        self.run_ids: dict[str, None] = {}
        self.callers = 0


class _FollowedRuns:
    """The open runs of one caller, and how each was last shown."""

    def __init__(self, run_ids: Iterable[str], notify: Notify | None, *, grows: bool) -> None:
        self.open: dict[str, Record | None] = dict.fromkeys(run_ids)
        self.grows = grows
        self.changed = asyncio.Event()
        self._notify = notify
        self._notified: set[str] = set()
        self.shown: dict[str, tuple[RunState, Tracking, str | None]] = {}

    def on_signal(self, run_ids: Sequence[str]) -> None:
        """These runs changed; any may have if none is named."""
        if self.grows or not run_ids or not self.open.keys().isdisjoint(run_ids):
            self.changed.set()

    def notify_once(self, line: str) -> None:
        if self._notify is not None and line not in self._notified:
            self._notified.add(line)
            self._notify(line)


def _shown(record: Record) -> tuple[RunState, Tracking, str | None]:
    return record.run, record.tracking, record.last_error


async def until_available(
    work: Callable[[], Awaitable[T]],
    notify: Notify | None,
    *,
    pause: float = CHECK_EVERY,
    give_up_after: float = OUTAGE,
) -> T:
    """The result of `work`, repeated every `pause` seconds until the database answers.

    Raises `StoreUnavailable` if it does not for `give_up_after` seconds, or was closed here.
    """
    give_up = time.monotonic() + give_up_after
    while True:
        try:
            return await work()
        except StoreUnavailable as error:
            if time.monotonic() >= give_up or isinstance(error, StoreClosed):
                raise
            if notify is not None:
                notify(f"{error}; still trying")
            await asyncio.sleep(pause)
