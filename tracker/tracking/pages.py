"""What a history page tells of its workspace, and when reading one is cheaper than single reads."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime

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


def pays(wanted: Sequence[Record], *, newer: datetime | None, oldest: datetime) -> bool:
    """Whether the next page is likely to show two due runs: then it is cheaper than reading them.

    It is taken to reach as far back as the last one did, from `newer` (the end of the page before;
    the newest due run for the first) to `oldest`. Runs known to be newer than `oldest` have been
    passed.
    """
    ahead = [record.created_at for record in wanted if record.created_at <= oldest]
    if newer is None:
        return len(ahead) >= 2
    reach = oldest - (newer - oldest)
    return sum(created >= reach for created in ahead) >= 2
