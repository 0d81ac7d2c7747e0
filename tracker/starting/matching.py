"""Start matching: which run a start became, and storing that run.

A run in the history belongs to no start by itself: colleagues start the same technique. It is
matched with a start only if FLORA says, by 409 or 422, that the start's key is in use, and exactly
one run of the technique that became known since the first sending is not accounted for.

What is compared are the times at which runs became known here. FLORA's creation times are compared
with each other alone: its clock may differ from ours and from the header `Date`, and be set.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from tracker.core.errors import FloraRefusal, FloraUnreadable, StartNotStored, StoreError
from tracker.core.log import get_logger
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed, Record
from tracker.flora.client import HistoryPage, pages
from tracker.polling import history
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow
from tracker.store.writing.writer import Writer
from tracker.workspaces import Service, Workspace

STORE_AGAIN: Final = (0.2, 5.0)
"""The first and the longest wait before an answer is stored again, in seconds."""
READ_BELOW: Final = timedelta(hours=2)
"""How far the history is read below the runs that were known before a start: FLORA's clock may have
been set back by an hour, and the list is only roughly sorted by creation."""
FIRST_READ: Final = timedelta(days=3)
"""How far the history is read where none was known before a start: FLORA's clock differs from ours
and from `Date` by less."""

PAGE_SECONDS: Final = 20.0
"""How long FLORA may take for a page."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRead:
    """The runs of a technique, or that may be, down to those that were surely known before some
    time, by id; `begun` is when the read began, by `SharedClock.seconds`."""

    begun: float
    runs: dict[str, Observation]


@dataclass(kw_only=True, eq=False)
class StartMatcher(Service):
    """Stores the runs of starts, and finds them in the history."""

    writer: Writer

    def __post_init__(self) -> None:
        self._unfiltered: set[str] = set()
        self._storing: dict[asyncio.Task[None], str] = {}

    async def aclose(self) -> None:
        """Wait for answers that are not stored yet; those that are lost by a cancellation are
        logged."""
        try:
            if self._storing:
                await asyncio.wait(self._storing)
        finally:
            for task, run_id in list(self._storing.items()):
                task.cancel()
                log.critical("start.answer_lost", run_id=run_id, advice="tracker starts resolve")

    async def track(self, row: StartRow, seen: Observation) -> Record:
        """Store a run as the start's, which closes the start, in one transaction.

        Raises `StartNotStored` if the database does not take it now; that is tried again until it
        does, for as long as the process lives.
        """
        entry = row.became(seen, callback_expected=row.callback_url is not None)
        try:
            return (await self.writer.submit(entry)).record
        except StoreError as error:
            log.error(
                "start.not_stored", run_id=seen.run_id, key=row.idempotency_key, error=str(error)
            )
            storing = asyncio.create_task(self._store(entry), name="start-answer")
            self._storing[storing] = seen.run_id
            storing.add_done_callback(lambda done: self._storing.pop(done, None))
            raise StartNotStored(
                f"FLORA started run {seen.run_id}, and the database could not store it yet; this "
                "is retried",
                run_id=seen.run_id,
            ) from error

    async def adopt(
        self, row: StartRow, run_id: str, observation: Observation | None = None
    ) -> Record:
        """Store a run as the start's, and what FLORA showed of it, if anything."""
        own = Observation(run_id=run_id, source=Source.START, at=self.clock())
        record = await self.track(row, own)
        if observation is not None:
            record = (await self.writer.submit(Observed(observation=observation))).record
        return record

    async def _store(self, entry: Observed) -> None:
        wait, longest = STORE_AGAIN
        while True:
            await asyncio.sleep(wait)
            wait = min(wait * 2, longest)
            try:
                await self.writer.submit(entry)
            except StoreError as error:
                log.debug("start.still_not_stored", error=str(error))
            else:
                log.info("start.stored", run_id=entry.observation.run_id)
                return

    async def read(
        self, workspace: Workspace, technique_id: str, since: datetime, *, give_up: float
    ) -> HistoryRead:
        """Read the history completely, down to what was known here before `since`, at least to
        three days before it where nothing was.

        FLORA is read until the time `give_up` of `time.monotonic`. Raises `FloraError`.
        """
        begun = self.clock.seconds()
        known_until = await starts.newest_known(
            self.database, workspace.workspace_id, before=since - starts.SET_BACK
        )
        client = workspace.require_client()
        first = since + min(client.clock_offset or timedelta(), timedelta())
        if known_until is None:
            known_until = bottom = first - FIRST_READ
        else:  # FLORA's clock may have been ahead
            known_until = min(known_until, first)
            bottom = known_until - READ_BELOW

        async def read(cursor: str | None) -> HistoryPage:
            return await client.history(
                cursor=cursor,
                technique_id=technique_id if filtered else None,
                deadline=min(PAGE_SECONDS, max(give_up - time.monotonic(), 0.1)),
            )

        while True:
            filtered = workspace.place not in self._unfiltered
            try:
                async with aclosing(pages(read)) as found_pages:
                    found = await _read(found_pages, technique_id, known_until, bottom)
            except FloraRefusal as refusal:
                # A refused filter says nothing about the key: all runs are read instead.
                if not (filtered and 400 <= refusal.status < 500) or refusal.status in (401, 429):
                    raise
                log.info("start.filter_refused", status=refusal.status, code=refusal.code)
                self._unfiltered.add(workspace.place)
            else:
                return HistoryRead(begun=begun, runs=found)

    async def find(self, row: StartRow, read: HistoryRead) -> Observation | None:
        """The run of a start whose key FLORA says is in use, in a history that lists it; `None` if
        there is none, more than one, one of unknown technique, or another start that it may be of
        as well."""
        # The rivals first: one that becomes a run meanwhile is accounted for then, or is a rival.
        rivals = await starts.rivals(
            self.database, row.workspace_id, row.technique_id, row.idempotency_key
        )
        left = await starts.possible(self.database, row, row.possible_runs or read.runs)
        run = read.runs.get(next(iter(left))) if len(left) == 1 else None
        if run is None or run.technique_id != row.technique_id:
            return None
        if any([await starts.possible(self.database, rival, left) for rival in rivals]):
            return None
        return run


async def _read(
    pages: AsyncIterator[HistoryPage], technique_id: str, known_until: datetime, bottom: datetime
) -> dict[str, Observation]:
    """The runs that may be of the technique, down to `bottom`.

    Raises `FloraUnreadable` for an item that may be newer than `known_until`.
    """
    found: dict[str, Observation] = {}
    known = False  # whether what follows was listed before
    async for page in pages:
        readable = min(page.unreadable, default=len(page.items))
        known = known or _reaches(known_until, page.items[:readable])
        if page.unreadable and not known:  # it may be the run of this start
            reason = page.unreadable[readable]
            raise FloraUnreadable(f"an item of the history cannot be read: {reason}")
        found |= {
            item.run_id: item
            for item in page.items
            if _may_be_of(technique_id, item) and not (item.created_at and item.created_at < bottom)
        }
        known = known or _reaches(known_until, page.items)
        if _reaches(bottom, page.items):
            break
    return found


def _reaches(bottom: datetime, items: Sequence[Observation]) -> bool:
    """Whether items of a list, newest first, reach down to `bottom`."""
    oldest = history.oldest(items)
    return oldest is not None and oldest <= bottom


def _may_be_of(technique_id: str, run: Observation) -> bool:
    """Whether a run may be of this technique: one without a technique, or with what is no id of
    one, may."""
    named = run.technique_id
    return named == technique_id or named is None or not named.startswith("tech_")
