"""What a history page tells of its workspace, and when reading one is cheaper than single reads."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Final

from tracker.core.observation import Observation, Source
from tracker.core.record import Record
from tracker.core.run import RunStatus
from tracker.sources import history
from tracker.store import retention
from tracker.store.engine import Database
from tracker.store.retention import Sighting
from tracker.tracking.rounds import Round
from tracker.tracking.workspaces import Workspace

SEEN_WITHIN: Final = timedelta(days=1)
"""A run in a history that is swept is known sooner; retention removes nothing that is younger."""
DETAILS_BY: Final = timedelta(minutes=1)
"""How long after its end FLORA may still lack what a list will carry."""


def taken_over(workspace: Workspace, items: Iterable[Observation]) -> list[Observation]:
    """A page's items as the workspace's, which learns from them in turn.

    It learns its id, and whether its lists carry details. An item that names no workspace is its
    own: a key belongs to one workspace, so what it reads does too. Raises `OtherWorkspace` where
    every item that names one names another.
    """
    items = list(items)
    workspace.reads(item.workspace_id for item in items)
    completed = with_details = old = with_outputs = 0
    taken = []
    for item in items:
        taken.append(owned(workspace, item))
        if item.status is RunStatus.COMPLETED:
            completed += 1
            with_details += bool(item.details)
            workspace.lists_carry_costs |= item.charged_cost is not None
            if item.completed_at is not None and item.read_at - item.completed_at > DETAILS_BY:
                old += 1
                with_outputs += bool(item.outputs) or item.charged_cost is not None
    if completed:
        workspace.lists_carry_details = 2 * with_details >= completed
    if old:
        workspace.lists_carry_outputs = 2 * with_outputs >= old
    return taken


async def without_removed(db: Database, items: Sequence[Observation]) -> list[Observation]:
    """A page's items without those that retention has removed: they ended long ago, and are known
    no more because they need not be."""
    removed = await retention.removed(db, _ended(items))
    return [item for item in items if item.run_id not in removed]


async def counted_before(
    db: Database, records: Mapping[str, Record], items: Iterable[Observation]
) -> set[str]:
    """Those of the items that show the end of a run which was tracked again after retention had
    removed it: the hours and days of the tallies have it already."""

    def may_be_again(record: Record | None, item: Sighting) -> bool:
        return (
            record is not None
            and record.source is Source.TRACK
            and not record.run.standing.ended
            and record.first_seen_at - item.at > SEEN_WITHIN
        )

    ended = [one for one in _ended(items) if may_be_again(records.get(one.run_id), one)]
    return await retention.within_reach(db, ended) if ended else set()


def _ended(items: Iterable[Observation]) -> list[Sighting]:
    return [
        Sighting(
            item.run_id,
            item.workspace_id,
            item.created_at,
            "generation" if item.run_type == "generation" else "technique",
        )
        for item in items
        if item.created_at is not None and item.standing.ended
    ]


def owned(workspace: Workspace, seen: Observation) -> Observation:
    """What was read with the workspace's key, as its own where it names none."""
    if seen.workspace_id is not None or workspace.workspace_id is None:
        return seen
    return replace(seen, workspace_id=workspace.workspace_id)


def listable(records: Iterable[Record], workspace: Workspace) -> list[Record]:
    """The due runs that a page of technique runs can answer for.

    Where lists leave the details out, a page says nothing new about a run known to have ended.
    """

    def says_something(record: Record) -> bool:
        if record.run.settled:
            costs = record.cost_final or workspace.lists_carry_costs
            return costs and workspace.lists_carry_outputs
        return workspace.lists_carry_details or not record.run.standing.ended

    return [
        record
        for record in records
        if record.run.run_type != "generation" and says_something(record)
    ]


def answers_recheck(record: Record, item: Observation, workspace: Workspace) -> bool:
    """Whether a page's item tells as much of a settled run's cost and outputs as a single read.

    A cost or outputs that are not there yet are told apart from those that lists leave out by
    whether the list shows such things of other runs.
    """
    if item.status is not RunStatus.COMPLETED:
        return item.standing.ended
    if record.run.lacks_outputs and not item.outputs:
        return False
    return item.charged_cost is not None or (bool(item.outputs) and workspace.lists_carry_costs)


def pays(pages_away: Collection[int]) -> bool:
    """Whether to read on: some number of pages costs less than the due runs on them, read alone.

    `pages_away` tells of each run on which page from here it is expected, the next one being 1.
    """
    return any(due > pages for due, pages in enumerate(sorted(pages_away), start=1))


def leaves_open(item: Observation, workspace: Workspace, course: Round) -> bool:
    """Whether a page's item shows too little of a run that has ended, so that it is read alone.

    Of the settled runs of which the page shows outputs and no cost, one in each round is read alone
    all the same: does a single read show the cost, then lists leave costs out.
    """
    if not course.recheck:
        return item.standing.ended and not item.details
    record = course.open_runs.get(item.run_id)
    if record is None:
        return False
    if not answers_recheck(record, item, workspace):
        return True
    if item.status is RunStatus.COMPLETED and item.charged_cost is None:
        course.probe = course.probe or item.run_id
    return course.probe == item.run_id


def pages_away(wanted: Sequence[Record], course: Round, read: int) -> list[int]:
    """On which page after those that were read each wanted run is expected, where that is known.

    FLORA's list may hold runs that are not known here, so that it may be a later one: then the next
    is expected to show it.
    """
    places = course.places or {}
    return [
        max(1, math.ceil(places[one.run.run_id] / history.PAGE_SIZE) - read)
        for one in wanted
        if one.run.run_id in places
    ]
