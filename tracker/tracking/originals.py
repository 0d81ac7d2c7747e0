"""Which run did a key start? What the history can tell where FLORA's answer did not."""

from datetime import datetime, timedelta
from typing import Final

from tracker.core.observation import Observation
from tracker.sources import history
from tracker.store import starts
from tracker.store.engine import Database
from tracker.store.starts import StartRow
from tracker.tracking.workspaces import Workspace

CLOCKS_AGREE: Final = timedelta(seconds=2)
"""FLORA's `Date` header is cut to seconds and an answer takes its time: a difference within this
says nothing about the clocks."""
SOON: Final = timedelta(minutes=10)
"""A run begins within this time after its start was last sent."""


async def find_original(
    database: Database, workspace: Workspace, row: StartRow
) -> Observation | None:
    """The one run that must be this start's, or `None` where there is none or more than one.

    It is of the same technique, began after the key was stored, and nothing else accounts for it:
    no other start has it, nobody tracked it, and no other start in doubt could be its. Raises
    `FloraError`.
    """
    stored_at = _at_flora(workspace, row.created_at)
    candidates: dict[str, Observation] = {}
    async for page in history.pages(
        workspace.require_client(), "technique", technique_id=row.technique_id
    ):
        for item in page.items:
            if item.technique_id == row.technique_id and _began_after(item, stored_at):
                candidates[item.run_id] = item
        oldest = history.oldest(page.items)
        if oldest is not None and oldest < stored_at - SOON:
            break
    accounted = await starts.accounted(database, list(candidates))
    left = [item for run_id, item in candidates.items() if run_id not in accounted]
    if len(left) != 1:
        return None
    began = left[0].created_at or stored_at
    rivals = await starts.rivals(
        database, row.workspace_slot, row.technique_id, row.idempotency_key
    )
    if any(_may_be(workspace, rival, began) for rival in rivals):
        return None
    return left[0]


def _may_be(workspace: Workspace, rival: StartRow, began: datetime) -> bool:
    """Whether a run that began at that moment may be another start's, which is in doubt too."""
    if rival.sent_at is None:
        return False
    first, last = _at_flora(workspace, rival.created_at), _at_flora(workspace, rival.sent_at)
    return first <= began <= last + SOON


def _began_after(item: Observation, moment: datetime) -> bool:
    """Whether a run was created after `moment`; a time without a fraction is cut to its second."""
    if item.created_at is None:
        return False
    if item.created_at.microsecond == 0:
        moment = moment.replace(microsecond=0)
    return item.created_at >= moment


def _at_flora(workspace: Workspace, moment: datetime) -> datetime:
    """One of our moments on FLORA's clock, where that is known to differ."""
    offset = workspace.require_client().clock_offset or timedelta()
    return moment + offset if abs(offset) > CLOCKS_AGREE else moment
