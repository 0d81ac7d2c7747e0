"""Evidence of what a start became: what is kept of it, and what the history can add.

A run in the history is nobody's by itself: colleagues start the same technique. It is taken for a
start only where FLORA says, by 409 or 422, that the start's key is in use, and exactly one run of
the technique since the first sending is not accounted for.
"""

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import FloraRefusal, StartNotStored, StoreError
from tracker.core.observation import Observation, Source
from tracker.core.record import Record, Seen
from tracker.polling import history
from tracker.polling.workspaces import Workspace
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow
from tracker.store.writing.writer import Writer

STORE_AGAIN: Final = (0.2, 5.0)
"""The first and the longest wait before an answer is stored again, in seconds."""
LAST_WITHIN: Final = 8.0
"""Seconds that the end of the process waits for answers that are not stored yet."""
MARGIN: Final = timedelta(minutes=10)
"""How far beyond the moment that matters the history is read: it is sorted by creation, roughly."""
_NO_DIFFERENCE: Final = (timedelta(), timedelta())

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRead:
    """The runs of a technique that may have begun since `since`, by id; `begun_at` is when the
    read began, both by our clock."""

    since: datetime
    begun_at: datetime
    runs: dict[str, Observation]


class Originals:
    """Keeps the runs of starts, and finds them."""

    def __init__(self, *, database: Database, writer: Writer, clock: Clock) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._unfiltered: set[str] = set()
        self._keeping: dict[asyncio.Task[None], str] = {}

    async def track(self, workspace_id: str, row: StartRow, seen: Observation) -> Record:
        """Commit a run of ours and close its start, in one transaction.

        Raises `StartNotStored` where the database does not take it now; that is tried again until
        it does, for as long as the process lives.
        """
        entry = Seen(
            observation=replace(
                seen,
                workspace_id=seen.workspace_id or workspace_id,
                technique_id=row.technique_id,
            ),
            inputs=row.inputs,
            tags=row.tags,
            reserved_at=row.reserved_at,
            reserved_cost=row.reserved_cost,
            callback_expected=row.callback_url is not None,
            slot=row.workspace_slot,
            idempotency_key=row.idempotency_key,
        )
        try:
            return await self._put(entry)
        except StoreError as error:
            log.error(
                "start.not_stored", run_id=seen.run_id, key=row.idempotency_key, error=str(error)
            )
            keeping = asyncio.create_task(self._keep(entry), name="start-answer")
            self._keeping[keeping] = seen.run_id
            keeping.add_done_callback(lambda done: self._keeping.pop(done, None))
            raise StartNotStored(
                f"FLORA started run {seen.run_id}, and the database could not keep it yet; it is "
                "tried again",
                run_id=seen.run_id,
            ) from error

    async def adopt(self, workspace_id: str, row: StartRow, original: Observation) -> Record:
        """Track a run that the history shows, as the one that we started."""
        own = Observation(run_id=original.run_id, source=Source.START, at=self._clock())
        await self.track(workspace_id, row, own)
        return await self.observe(original)

    async def observe(self, observation: Observation) -> Record:
        """Commit what FLORA shows of a run. Raises `StoreUnavailable`."""
        return await self._put(Seen(observation=observation))

    async def aclose(self) -> None:
        """Wait a little for what is not stored yet, and log what is lost with this process."""
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=LAST_WITHIN)
        for task, run_id in list(self._keeping.items()):
            task.cancel()
            log.critical("start.answer_lost", run_id=run_id, advice="tracker starts resolve")

    async def _keep(self, entry: Seen) -> None:
        wait = STORE_AGAIN[0]
        while True:
            await asyncio.sleep(wait)
            wait = min(wait * 2, STORE_AGAIN[1])
            try:
                await self._put(entry)
            except StoreError as error:
                log.debug("start.still_not_stored", error=str(error))
            else:
                log.info("start.stored", run_id=entry.observation.run_id)
                return

    async def _put(self, entry: Seen) -> Record:
        submitted = await self._writer.submit(entry)
        if submitted.after is None:
            raise AssertionError("an observation of a run always leaves a record")
        return submitted.after

    async def read(
        self, workspace: Workspace, technique_id: str, since: datetime, *, give_up: float
    ) -> HistoryRead:
        """Read the history completely, back to what may have begun at `since`, by our clock.

        `give_up` is the moment of `time.monotonic` until which FLORA is asked. Raises `FloraError`.
        """
        begun_at = self._clock()
        while True:
            filtered = workspace.slot not in self._unfiltered
            try:
                found = await self._pages(workspace, technique_id, since, give_up, filtered)
            except FloraRefusal as refusal:
                # That a filter is refused says nothing about the key: all runs are read instead.
                if not (filtered and 400 <= refusal.status < 500) or refusal.status in (401, 429):
                    raise
                log.info("start.filter_refused", status=refusal.status, code=refusal.code)
                self._unfiltered.add(workspace.slot)
            else:
                return HistoryRead(since=since, begun_at=begun_at, runs=found)

    async def _pages(
        self,
        workspace: Workspace,
        technique_id: str,
        since: datetime,
        give_up: float,
        filtered: bool,
    ) -> dict[str, Observation]:
        client = workspace.require_client()
        found: dict[str, Observation] = {}
        pages = history.pages(
            client,
            "technique",
            technique_id=technique_id if filtered else None,
            deadline=lambda: max(give_up - time.monotonic(), 0.1),
        )
        async with aclosing(pages):
            async for page in pages:
                found |= {
                    item.run_id: item for item in page.items if item.technique_id == technique_id
                }
                oldest = history.oldest(page.items)
                earliest = since + (client.clock_bounds or _NO_DIFFERENCE)[0]
                if oldest is not None and oldest < earliest - MARGIN:
                    break
        return {run_id: item for run_id, item in found.items() if _may_be(workspace, item, since)}

    async def unaccounted(
        self, workspace: Workspace, row: StartRow, read: HistoryRead
    ) -> list[Observation]:
        """The runs of that read that may have begun since the start's first sending, and that
        nothing else accounts for: no other start has them, and nobody gave them to track."""
        first = row.in_use_since or row.created_at
        accounted = await starts.accounted(self._database, list(read.runs))
        return [
            item
            for run_id, item in read.runs.items()
            if run_id not in accounted and _may_be(workspace, item, first)
        ]

    async def find(
        self, workspace: Workspace, row: StartRow, read: HistoryRead
    ) -> Observation | None:
        """The one run that must be this start's, whose key FLORA says is in use; `None` where there
        is none, more than one, or another start that it may be of as well."""
        # The rivals first: one that becomes a run meanwhile is accounted for then, or is a rival.
        rivals = await starts.rivals(
            self._database, row.workspace_slot, row.technique_id, row.idempotency_key
        )
        left = await self.unaccounted(workspace, row, read)
        if len(left) != 1:
            return None
        if any(
            _may_be(workspace, left[0], rival.in_use_since or rival.created_at) for rival in rivals
        ):
            return None
        return left[0]


def _may_be(workspace: Workspace, run: Observation, since: datetime) -> bool:
    """Whether a run may have begun at or after one of our moments.

    The measured difference of the clocks is allowed for, and so is the cutting of FLORA's times to
    seconds or milliseconds. A run without a time may be any.
    """
    if run.created_at is None:
        return True
    bounds = workspace.require_client().clock_bounds or _NO_DIFFERENCE
    cut = timedelta()
    if run.created_at.microsecond % 1000 == 0:
        cut = timedelta(milliseconds=1) if run.created_at.microsecond else timedelta(seconds=1)
    return run.created_at + cut > since + bounds[0]
