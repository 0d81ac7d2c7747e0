"""The run history, newest first: its pages, and a walk that says what joins and what is missing.

A list by offset has two traps. A run that is deleted while pages are read pulls all older ones up,
and one of them over the edge between two pages, unseen. And a page that cannot be read (one broken
item, an answer that is too large, an offset too deep) hides all that lies behind it. Where FLORA's
cursors are offsets that can be read, the walk makes its own: pages overlap by a few items, so that
a slip shows, and a bad item is stepped over. Where they cannot be read it follows them as they are.
"""

from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
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
from tracker.core.observation import Observation
from tracker.flora import paging
from tracker.flora.client import FloraClient, HistoryPage
from tracker.flora.paging import cursor_at, offset_of

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
