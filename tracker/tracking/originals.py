"""Which run did a key start? What the history can tell where FLORA's answer did not."""

import time
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from tracker.core.clock import Clock
from tracker.core.entry import Seen
from tracker.core.observation import Observation, Source
from tracker.core.record import Record
from tracker.sources import history
from tracker.store import starts
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.store.starts import StartRow
from tracker.tracking.workspaces import Workspace

CLOCKS_AGREE: Final = timedelta(seconds=2)
"""FLORA's `Date` header is cut to seconds and an answer takes its time: a difference within this
says nothing about the clocks."""
SOON: Final = timedelta(minutes=10)
"""A run begins within this time after its start was last sent."""

AT_ONCE: Final = timedelta(seconds=30)
"""FLORA's answer to a request comes within this time."""


class Originals:
    """Finds the runs of starts, and tracks them as ours."""

    def __init__(self, *, database: Database, door: Door, clock: Clock) -> None:
        self._database = database
        self._door = door
        self._clock = clock

    async def find(
        self, workspace: Workspace, row: StartRow, *, give_up: float
    ) -> Observation | None:
        """The one run that must be this start's, or `None` where there is none or more than one.

        It is of the same technique, began between the first sending of the key and some minutes
        after the last, and nothing else accounts for it: no other start has it, nobody tracked it,
        and no other start in doubt could be its. `give_up` is the moment of `time.monotonic` until
        which FLORA is asked. Raises `FloraError`.
        """
        candidates = await self._candidates(workspace, row, give_up)
        # The rivals first: one that becomes a run meanwhile is accounted for then, or is a rival.
        rivals = await starts.rivals(
            self._database, row.workspace_slot, row.technique_id, row.idempotency_key
        )
        accounted = await starts.accounted(self._database, list(candidates))
        left = [item for run_id, item in candidates.items() if run_id not in accounted]
        if len(left) != 1 or any(_may_be(workspace, rival, left[0]) for rival in rivals):
            return None
        return left[0]

    async def adopt(self, workspace: Workspace, row: StartRow, original: Observation) -> Record:
        """Track the original that the history shows, as the run that we started."""
        own = Observation(run_id=original.run_id, source=Source.START, at=self._clock())
        await self.track(workspace, row, own)
        return await self._pass(Seen(observation=original))

    async def track(self, workspace: Workspace, row: StartRow, seen: Observation) -> Record:
        """Commit a run of ours and close its row in the ledger, in one transaction."""
        workspace_id = seen.workspace_id or workspace.workspace_id
        return await self._pass(
            Seen(
                observation=replace(seen, workspace_id=workspace_id, technique_id=row.technique_id),
                inputs=row.inputs,
                callback_expected=row.callback_url is not None,
                slot=row.workspace_slot,
                idempotency_key=row.idempotency_key,
            )
        )

    async def _pass(self, entry: Seen) -> Record:
        passed = await self._door.put(entry)
        if passed.after is None:
            raise AssertionError("a sight of a run always leaves a record")
        return passed.after

    async def _candidates(
        self, workspace: Workspace, row: StartRow, give_up: float
    ) -> dict[str, Observation]:
        """Runs of the technique that began while the key was in use, by id."""
        first, last = _in_use(workspace, row)
        found: dict[str, Observation] = {}
        pages = history.pages(
            workspace.require_client(),
            "technique",
            technique_id=row.technique_id,
            deadline=lambda: max(give_up - time.monotonic(), 0.1),
        )
        async with aclosing(pages):
            async for page in pages:
                for item in page.items:
                    began = item.created_at
                    if (
                        item.technique_id == row.technique_id
                        and began is not None
                        and _cut_as(began, first) <= began <= last
                    ):
                        found[item.run_id] = item
                oldest = history.oldest(page.items)
                if oldest is not None and oldest < first - SOON:
                    break
        return found


def _in_use(workspace: Workspace, row: StartRow) -> tuple[datetime, datetime]:
    """Between which of FLORA's moments a run of this start may have begun."""
    first = row.in_use_since or row.created_at
    last = row.sent_at or first
    # FLORA's 409 says that the run was there when it answered; else it may begin yet.
    answered = (row.error or {}).get("status") == 409
    return _at_flora(workspace, first), _at_flora(workspace, last) + (AT_ONCE if answered else SOON)


def _may_be(workspace: Workspace, rival: StartRow, run: Observation) -> bool:
    """Whether a run may be another start's, which is in doubt too."""
    if rival.sent_at is None or run.created_at is None:
        return rival.sent_at is not None
    first, last = _in_use(workspace, rival)
    return _cut_as(run.created_at, first) <= run.created_at <= last


def _cut_as(shown: datetime, moment: datetime) -> datetime:
    """`moment`, as exact as FLORA shows times: one without a fraction is cut to its second."""
    return moment.replace(microsecond=0) if shown.microsecond == 0 else moment


def _at_flora(workspace: Workspace, moment: datetime) -> datetime:
    """One of our moments on FLORA's clock, where that is known to differ."""
    offset = workspace.require_client().clock_offset or timedelta()
    return moment + offset if abs(offset) > CLOCKS_AGREE else moment
