"""What a history page tells of its workspace, and when reading one is cheaper than single reads."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from tracker.core.observation import Observation
from tracker.core.record import Record
from tracker.core.run import RunStatus
from tracker.store import retention
from tracker.store.engine import Database
from tracker.store.retention import Sighting
from tracker.tracking.workspaces import Workspace


def taken_over(workspace: Workspace, items: Iterable[Observation]) -> list[Observation]:
    """A page's items as the workspace's, which learns from them in turn.

    It learns its id, and whether its lists carry details. An item that names no workspace is its
    own: a key belongs to one workspace, so what it reads does too.
    """
    completed = with_details = 0
    taken = []
    for item in items:
        workspace.learn(item.workspace_id)
        taken.append(owned(workspace, item))
        if item.status is RunStatus.COMPLETED:
            completed += 1
            with_details += bool(item.details)
    if completed:
        workspace.lists_carry_details = 2 * with_details >= completed
    return taken


async def without_removed(db: Database, items: Sequence[Observation]) -> list[Observation]:
    """A page's items without those that retention has removed: they ended long ago, and are known
    no more because they need not be."""
    ended = [
        Sighting(
            item.run_id,
            item.workspace_id,
            item.created_at,
            "generation" if item.run_type == "generation" else "technique",
        )
        for item in items
        if item.created_at is not None and item.status.ended
    ]
    removed = await retention.removed(db, ended)
    return [item for item in items if item.run_id not in removed]


def owned(workspace: Workspace, seen: Observation) -> Observation:
    """What was read with the workspace's key, as its own where it names none."""
    if seen.workspace_id is not None or workspace.workspace_id is None:
        return seen
    return replace(seen, workspace_id=workspace.workspace_id)


def listable(records: Iterable[Record], workspace: Workspace) -> list[Record]:
    """The due runs that a page of technique runs can answer for.

    Where lists leave the details out, a page says nothing new about a run known to have ended.
    """
    return [
        record
        for record in records
        if record.run.run_type != "generation"
        and (workspace.lists_carry_details or not record.run.standing.ended)
    ]


def pays(pages_away: Collection[int]) -> bool:
    """Whether to read on: some number of pages costs less than the due runs on them, read alone.

    `pages_away` tells of each run on which page from here it is expected, the next one being 1.
    """
    return any(due > pages for due, pages in enumerate(sorted(pages_away), start=1))
