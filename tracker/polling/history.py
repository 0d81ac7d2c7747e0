"""The run history, newest first: its pages, and a walk that says what joins and what is missing.

A list by offset has two traps. A run that is deleted while pages are read pulls all older ones up,
and one of them over the edge between two pages, unseen. And a page that cannot be read (one broken
item, an answer that is too large, an offset too deep) hides all that lies behind it. Where FLORA's
cursors are offsets that can be read, the walk makes its own: pages overlap by a few items, so that
a slip shows, and a bad item is stepped over. Where they cannot be read it follows them as they are.
"""

import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Final, Literal

from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    ServerFault,
)
from tracker.core.observation import Observation, Source
from tracker.core.record import Record
from tracker.core.run import RunStatus
from tracker.flora import paging
from tracker.flora.client import FloraClient, HistoryPage
from tracker.flora.paging import cursor_at, offset_of
from tracker.polling.poll_round import Round
from tracker.polling.workspaces import Workspace
from tracker.store.engine import Database
from tracker.store.writing import retention
from tracker.store.writing.retention import Sighting

Kind = Literal["technique", "generation"]

PAGE_SIZE: Final = 100
"""FLORA's largest page: one request reads this many runs."""
OVERLAP: Final = 3
"""So many items two pages have in common, where the walk chooses its offsets."""
EDGE: Final = 5
"""A page ends where the last so many items say together: one with a senseless time says nothing."""
SKIPS: Final = 20
"""So many steps are tried to get behind what cannot be read: ten of one item, then doubling."""
FIRST_SKIPS: Final = 3
"""The same where nothing of the list could be read at all."""
SLIPS: Final = 8
"""So many steps back in a row are made for items that slipped between two pages."""
RETRY_SECONDS: Final = 10.0
"""How long a read may take, repetitions included, at a place where FLORA had failed before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """Items that could not be read: why, and the cursor of the first of them."""

    error: str
    cursor: str | None


class PageUnreadable(FloraError):
    """A page of the history that cannot be read, nor what lies behind it: `hole`."""

    def __init__(self, hole: Hole, cause: FloraError) -> None:
        super().__init__(hole.error)
        self.hole = hole
        self.cause = cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A page, and how it joins what was read before.

    All that is newer than `floor` has been read: from the list's top where `from_top`; from the
    moment `ceiling` where `hole` says what is missing above it; else from where the walk began.
    `cursor` leads to what lies below, `is_last` that nothing does. Times are FLORA's, UTC.
    """

    items: list[Observation]
    unreadable: list[str]
    floor: datetime | None
    from_top: bool = False
    ceiling: datetime | None = None
    hole: Hole | None = None
    cursor: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether the list ends with it."""
        return self.cursor is None


def pages(
    client: FloraClient,
    kind: Kind,
    *,
    technique_id: str | None = None,
    deadline: Callable[[], float] | None = None,
) -> AsyncGenerator[HistoryPage, None]:
    """Every page of the history from the newest run on, until the list ends.

    No filter on a status is ever set: runs that leave the filter while pages are read would pull
    others past the reader. `deadline` says before each page how many seconds it may take. Raises
    `FloraUnreadable` where the list goes round in a circle, and whatever the client raises.
    """
    read = partial(client.history, kind=kind, limit=PAGE_SIZE, technique_id=technique_id)
    return paging.pages(
        lambda cursor: read(cursor=cursor, deadline=None if deadline is None else deadline())
    )


def oldest(items: Sequence[Observation]) -> datetime | None:
    """The creation time of the oldest item, UTC; `None` where no item has one."""
    return min((item.created_at for item in items if item.created_at), default=None)


class Walk:
    """Walks down one kind's history. `pages_read` counts what FLORA answered.

    `stubborn` treats a 5xx or a time-out like a page that cannot be read: for a place at which the
    same was met again and again, while the list's top can be read.
    """

    def __init__(self, client: FloraClient, kind: Kind, *, stubborn: bool = False) -> None:
        self.pages_read = 0
        self._client = client
        self._kind: Kind = kind
        self._stubborn = stubborn
        self._cursor: str | None = None
        self._offset: int | None = 0  # of the next page; None where cursors cannot be read

    async def pages(
        self, *, below: datetime | None = None, cursor: str | None = None
    ) -> AsyncGenerator[Stretch, None]:
        """Each page from the list's top down, or from those runs on that are older than `below`,
        to which `cursor` led once.

        Raises `PageUnreadable` where it comes to no end, `FloraUnreadable` where the list goes
        round in a circle or changes faster than it can be read, and whatever the client raises.
        """
        placed = below is not None and await self._go_to(below, cursor)
        from_top, limit, skips, slips = not placed, PAGE_SIZE, 0, 0
        tail: deque[datetime] = deque(maxlen=EDGE)
        hole: Hole | None = None
        shared: set[str] = set()  # of the page before, where this one must overlap it
        seen: set[str] = set()
        any_read = False
        while True:
            try:
                page = await self._read(limit)
            except FloraError as error:
                if not self._is_of_the_page(error):
                    raise
                if placed and self._offset is None:
                    self._offset, self._cursor = 0, None  # the cursor is refused: from the top
                    placed, from_top = False, True
                elif limit > 1:
                    limit //= 2
                else:
                    hole = hole or Hole(error=str(error), cursor=self._cursor)
                    if self._offset is None or skips == (SKIPS if any_read else FIRST_SKIPS):
                        raise PageUnreadable(hole, error) from error
                    skips += 1
                    self._move_to(self._offset + (1 if skips <= 10 else 2 ** (skips - 10)))
                    from_top = False
                    shared.clear()
                    tail.clear()
                continue
            times = [item.created_at for item in page.items if item.created_at]
            if placed and below and self._offset and times and min(times[:EDGE]) < below:
                self._move_to(0)  # it begins too low after all
                placed, from_top = False, True
                continue
            ids = {item.run_id for item in page.items}
            fresh = [item for item in page.items if item.run_id not in shared]
            if shared and self._offset and shared.isdisjoint(ids) and not page.unreadable:
                slips += 1
                if slips > SLIPS:
                    raise FloraUnreadable("the list changes faster than it can be read")
                self._move_to(max(0, self._offset - PAGE_SIZE * 2 ** (slips - 1)))
                continue
            placed, any_read = False, True
            tail.extend(times)
            ceiling = min(times[:EDGE]) - _INSTANT if hole and times else None
            yield Stretch(
                items=fresh,
                unreadable=page.unreadable,
                floor=max(tail, default=None),
                from_top=from_top,
                ceiling=ceiling,
                hole=hole,
                cursor=page.next_cursor,
            )
            if page.next_cursor is None:
                return
            hole, skips, slips, shared = None, 0, 0, set()
            following = offset_of(page.next_cursor)
            if following is None or self._offset is None:
                if page.next_cursor in seen:
                    raise paging.circular()
                seen.add(page.next_cursor)
                self._offset, self._cursor = None, page.next_cursor
            elif following <= self._offset:
                raise paging.circular()
            else:
                overlaps = limit > 2 * OVERLAP and following - OVERLAP > self._offset
                shared = ids if overlaps else set()
                self._move_to(following - OVERLAP if overlaps else following)
            limit = min(2 * limit, PAGE_SIZE)

    async def _go_to(self, below: datetime, cursor: str | None) -> bool:
        """Find the place of the newest run older than `below`; false where it has to be looked for
        from the list's top. `cursor` led there when the list was shorter, or longer."""
        guess = 0 if cursor is None else offset_of(cursor)
        if guess is None:
            self._offset, self._cursor = None, cursor
            return True
        low, high, step = 0, None, PAGE_SIZE
        at = max(0, guess - 2 * EDGE)
        try:
            while high is None or high - low > PAGE_SIZE:
                if at == 0 or await self._is_newer(at, below):
                    low = at
                    at = at + step if high is None else (low + high) // 2
                else:
                    high = at
                    at = max(0, at - step) if low == 0 else (low + high) // 2
                step *= 2
        except FloraError as error:
            if not self._is_of_the_page(error):
                raise
            if cursor is None:
                low = 0  # offsets may not be what FLORA's cursors are
        self._move_to(max(0, low - EDGE))
        return self._offset != 0

    async def _is_newer(self, offset: int, moment: datetime) -> bool:
        self._move_to(offset)
        page = await self._read(1)
        created_at = page.items[0].created_at if page.items else None
        return created_at is not None and created_at > moment

    def _move_to(self, offset: int) -> None:
        self._offset, self._cursor = offset, cursor_at(offset)

    async def _read(self, limit: int) -> HistoryPage:
        page = await self._client.history(
            kind=self._kind,
            cursor=self._cursor,
            limit=limit,
            deadline=RETRY_SECONDS if self._stubborn else None,
        )
        self.pages_read += 1
        return page

    def _is_of_the_page(self, error: FloraError) -> bool:
        """Whether an error is about what was to be read, so that less of it may be readable."""
        if isinstance(error, FloraRefusal) and error.status in (400, 413, 414, 422):
            return True
        stubborn = isinstance(error, ServerFault | FloraUnreachable) and self._stubborn
        return isinstance(error, FloraUnreadable) or stubborn


_INSTANT: Final = timedelta(microseconds=1)


# What a history page tells of its workspace, and when reading one is cheaper than single reads.


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
        max(1, math.ceil(places[one.run.run_id] / PAGE_SIZE) - read)
        for one in wanted
        if one.run.run_id in places
    ]
