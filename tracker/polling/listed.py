"""What lists show of runs: of which workspace they are, and which of them retention has removed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Final

from tracker.core.observation import Observation, Source
from tracker.core.record import Record
from tracker.core.run import RunStatus
from tracker.store.engine import Database
from tracker.store.writing import retention
from tracker.store.writing.retention import ListedRun
from tracker.workspaces import Workspace

KNOWN_WITHIN: Final = timedelta(days=1)
"""A swept history makes a run known sooner; retention removes nothing that is younger."""
DETAILS_WITHIN: Final = timedelta(minutes=1)
"""How long after the end of a run a list may still lack its details."""


def attributed(workspace: Workspace, seen: Observation) -> Observation:
    """An observation read with the workspace's key, as its own if it names no workspace."""
    if seen.workspace_id is not None or workspace.workspace_id is None:
        return seen
    return replace(seen, workspace_id=workspace.workspace_id)


def attributed_page(workspace: Workspace, items: Sequence[Observation]) -> list[Observation]:
    """A page's items, attributed to the workspace whose key read it.

    The workspace learns its id, and whether its lists carry details. Raises `OtherWorkspace` if
    every item that names a workspace names another one.
    """
    workspace.check_listed(item.workspace_id for item in items)
    completed = with_details = old = with_outputs = 0
    for item in items:
        if item.status is RunStatus.COMPLETED:
            completed += 1
            with_details += bool(item.details)
            workspace.lists_carry_costs |= item.charged_cost is not None
            if item.completed_at is not None and item.read_at - item.completed_at > DETAILS_WITHIN:
                old += 1
                with_outputs += bool(item.outputs) or item.charged_cost is not None
    if completed:
        workspace.lists_carry_details = 2 * with_details >= completed
    if old:
        workspace.lists_carry_outputs = 2 * with_outputs >= old
    return [attributed(workspace, item) for item in items]


async def without_removed(
    db: Database, items: Sequence[Observation]
) -> tuple[list[Observation], set[str]]:
    """The items without runs that retention has removed, which must not come back; and the ids of
    those that it may remove before the items are written (`Observed.only_stored`)."""
    ended = _ended(items)
    removed, stored = await retention.find_removed(db, ended) if ended else (set[str](), set[str]())
    return [item for item in items if item.run_id not in removed], stored


async def counted_before(
    db: Database, records: Mapping[str, Record], items: Iterable[Observation]
) -> set[str]:
    """The items that show the end of a run which retention had removed and which was tracked again:
    the rollups have counted that end."""

    ended = [
        one
        for one in _ended(items)
        if (record := records.get(one.run_id)) is not None
        and record.source is Source.TRACK
        and not record.run.precedence.ended
        and record.first_seen_at - one.at > KNOWN_WITHIN
    ]
    return await retention.find_possibly_removed(db, ended) if ended else set()


def _ended(items: Iterable[Observation]) -> list[ListedRun]:
    return [
        ListedRun(
            item.run_id,
            item.workspace_id,
            item.created_at,
            "generation" if item.run_type == "generation" else "technique",
        )
        for item in items
        if item.created_at is not None and item.may_have_ended
    ]
