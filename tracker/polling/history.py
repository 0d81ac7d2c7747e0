"""Reading the run history, newest first, without missing a run.

A list read by offsets has three pitfalls. A run that is deleted between two pages moves all older
runs up, one of them from the page that comes next to the page that was read. Runs of one creation
time may change places between two pages. And a page that cannot be read (one broken item, an answer
that is too large, an offset that is too deep) hides everything below it. If FLORA's cursors are
offsets, `HistoryWalk` makes its own: pages overlap, so that a shift shows and runs that change
places are on one of them, and unreadable items are skipped. Other cursors are followed as they are.
An item that shows no run leaves a hole in its page.

Sweeps and `verify` read around what they cannot read. The recovery of starts does not (`strict`): a
start whose run it does not find is paid again.
"""

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    ServerFault,
)
from tracker.core.observation import Observation
from tracker.flora.client import HistoryPage
from tracker.flora.parse import circular, cursor_at, offset_of

PAGE_SIZE: Final = 100
"""FLORA's largest page."""
OVERLAP: Final = 3
"""Items that two pages have in common at least, if offsets are known; of less than six, half, and
of one that one."""
EDGE: Final = 5
"""The last items of a page give its floor together, so that one wrong time does no harm."""
SKIPS: Final = 20
"""Attempts to get past unreadable items: ten steps of one item, then doubling ones."""
FIRST_SKIPS: Final = 3
"""The same while nothing of the list could be read."""
SHIFTS: Final = 8
"""Steps back in a row because the list shifted between two pages."""
_INSTANT: Final = timedelta(microseconds=1)
_NOTHING: Final = HistoryPage(items=[], next_cursor=None, unreadable={})

ReadPage = Callable[[str | None, int], Awaitable[HistoryPage]]
"""Reads the page to which a cursor leads, of at most so many items. Raises `FloraError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """Items that could not be read: the error, and the cursor of the first of them.

    Items of the time `end` and older are below the hole; `None` if none could be read.
    """

    error: FloraError
    cursor: str | None
    end: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkedPage:
    """A page, or the part of one above or below a hole in it, and how it joins what was read.

    Everything newer than `floor` has been read: from the top of the list if `from_top`; from the
    end of the `hole` above the page if there is one; else from where the walk began. `cursor` leads
    to what is below, if known; below the page that `is_last` is nothing, or nothing that can be
    read. Times are FLORA's, in UTC.
    """

    items: list[Observation]
    unreadable: list[str]
    floor: datetime | None
    from_top: bool
    is_last: bool
    hole: Hole | None
    cursor: str | None


def oldest(items: Sequence[Observation]) -> datetime | None:
    """The creation time of the oldest item, UTC; `None` if no item has one."""
    return min(_times(items), default=None)


class _Position:
    """Where the next page begins, and how many items are asked for.

    `is_placed` until something is read where a walk began below the top of the list; `any_read`
    once anything was read.
    """

    def __init__(self) -> None:
        self.cursor: str | None = None
        self.offset: int | None = 0  # None if FLORA's cursors are no offsets
        self.limit = PAGE_SIZE
        self.is_placed = self.any_read = False
        self.shared: set[str] = set()
        """Ids of the page before, if the next one must overlap it."""
        self._overlap = 0
        """With how many items of that page the next one begins, unless the list shifts."""
        self._skips = self._shifts = 0
        self._passed: set[str] = set()
        """Cursors that were followed, so that a circle shows."""
        self._passed_before = 0
        """How many there were when a cursor was refused."""

    def move_to(self, offset: int) -> None:
        self.cursor, self.offset = cursor_at(offset), offset

    def follow(self, cursor: str | None) -> None:
        self.cursor, self.offset = cursor, None

    def may_have_expired(self, error: FloraError) -> bool:
        """Whether FLORA refuses the cursor itself; twice in one place, the page is bad."""
        if self.offset is not None:
            return False
        return self.is_placed or (
            len(self._passed) > self._passed_before
            and isinstance(error, FloraRefusal)
            and any(one.field == "cursor" for one in error.fields)
        )

    def restart(self) -> None:
        self.move_to(0)
        self.is_placed = False
        self.limit = PAGE_SIZE
        self._passed_before = len(self._passed)
        self._passed.clear()

    @property
    def _known(self) -> int:
        """With how many items of the page before the next one begins, unless the list shifts."""
        return self._overlap if self.shared else 0

    def ask_for_less(self) -> bool:
        """Ask for half of the items that are new; false if that is one already."""
        new = self.limit - self._known
        if new <= 1:
            return False
        self.limit = self._known + new // 2
        return True

    def skip_items(self) -> bool:
        """Go past an unreadable item; false where there is no way, or after too many in a row."""
        if self.offset is None or self._skips == (SKIPS if self.any_read else FIRST_SKIPS):
            return False
        self._skips += 1
        step = 1 if self._skips <= 10 else 2 ** (self._skips - 10)
        self.move_to(self.offset + self._known + step)
        self.limit = 1
        self.shared = set()
        return True

    def has_shifted(self, page: HistoryPage) -> bool:
        """Whether the page lacks all that it must have in common with the page before."""
        if not self.offset or not self.shared.isdisjoint(item.run_id for item in page.items):
            return False
        # Those in common may be what cannot be read.
        unreadable, shown = len(page.unreadable), len(page.items) + len(page.unreadable)
        return bool(self.shared) and (not unreadable or unreadable < min(self._overlap, shown))

    def step_back(self) -> None:
        """Go up to where the items of the page before are now that the list has shifted."""
        self._shifts += 1
        if self._shifts > SHIFTS:
            raise FloraUnreadable("the list changes faster than it can be read")
        self.move_to(max(0, (self.offset or 0) - PAGE_SIZE * 2 ** (self._shifts - 1)))

    def advance(self, page: HistoryPage, next_cursor: str) -> None:
        """Go to what follows a page, or to its last items where the next page can overlap it: all
        of the last creation time, of which others may come first then, unless the page has no more.
        """
        if not self.shared.issuperset(item.run_id for item in page.items):
            self._shifts = 0  # it shows more than the page before
        self._skips, self.shared = 0, set()
        following = offset_of(next_cursor)
        if following is None or self.offset is None:
            if next_cursor in self._passed:
                raise circular()
            self._passed.add(next_cursor)
            self.follow(next_cursor)
        elif following <= self.offset:
            raise circular()
        else:
            covered, shown = following - self.offset, len(page.items) + len(page.unreadable)
            tied = sum(item.created_at == page.items[-1].created_at for item in page.items)
            overlap = max(min(OVERLAP, covered // 2), tied if tied < len(page.items) else 0)
            most = covered - 1
            if covered == self.limit == len(page.items) == 1:  # of the next two, one is new
                overlap = most = 1
            # FLORA may cut a page before it leaves items out, and these may be its last ones.
            left_out = max(0, min(covered, self.limit) - shown)
            is_overlapped = most > 0 and (not left_out or 2 * (overlap + left_out) <= covered)
            self._overlap = min(overlap, most)
            if is_overlapped:
                self.shared = {item.run_id for item in page.items}
                overlap += left_out
            self.move_to(following - min(overlap, most))
        self.limit = min(2 * self.limit, PAGE_SIZE)


class _Seam:
    """How the next items join what was read."""

    def __init__(self, *, from_top: bool) -> None:
        self._from_top = from_top
        self._edge: deque[datetime] = deque(maxlen=EDGE)
        self._hole: Hole | None = None
        self._unreadable: list[str] = []

    def open_hole(self, error: FloraError, cursor: str | None) -> None:
        """Something between what was read and what follows cannot be read."""
        self._hole = self._hole or Hole(error=error, cursor=cursor)
        self._from_top = False
        self._edge.clear()

    def join(self, page: HistoryPage, shared: set[str], cursor: str | None) -> Iterator[WalkedPage]:
        """The parts of the page to which `cursor` led, parted at what is unreadable."""
        for part, reason in _parts(page, shared):
            is_last = reason is None and page.next_cursor is None
            if part or is_last:
                times, hole = _times(part), None
                self._edge.extend(times)
                if times or is_last:  # else a hole goes on, until a time is known
                    hole, self._hole = self._hole, None
                if hole is not None and times:
                    hole = replace(hole, end=min(times[:EDGE]) - _INSTANT)
                yield WalkedPage(
                    items=part,
                    unreadable=self._unreadable,
                    floor=max(self._edge, default=None),
                    from_top=self._from_top,
                    is_last=is_last,
                    hole=hole,
                    cursor=cursor if reason else page.next_cursor,
                )
                self._unreadable = []
            if reason is not None:
                self._unreadable.append(reason)
                unreadable = FloraUnreadable(f"an item of the list cannot be read: {reason}")
                self.open_hole(unreadable, cursor)


class HistoryWalk:
    """Walks down a list of runs of which `read` reads a page.

    `stubborn` treats a 5xx or a time-out like an unreadable page: for a place that has failed in
    this way repeatedly while the top of the list could be read. `strict` reads around no error, and
    leaves nothing out of a page because the one before may have shown it.
    """

    def __init__(self, read: ReadPage, *, stubborn: bool = False, strict: bool = False) -> None:
        self._read = read
        self._stubborn = stubborn
        self._strict = strict
        self._position = _Position()
        self._seam = _Seam(from_top=True)

    async def pages(
        self, *, below: datetime | None = None, cursor: str | None = None
    ) -> AsyncGenerator[WalkedPage, None]:
        """The pages from the top down, or from the newest run older than `below` down, to which
        `cursor` led at some time.

        Raises `FloraUnreadable` if cursors form a circle or the list changes faster than it is
        read, what `read` raises, and its first error if nothing can be read from the top down.
        """
        position = self._position
        if below is not None:
            await self._go_to(below, cursor)
        while True:
            try:
                page = await self._read(position.cursor, position.limit)
            except FloraError as error:
                if not self._concerns_page(error):
                    raise
                if self._get_past(error):
                    continue
                break
            first = _times(page.items)[:EDGE]
            if position.is_placed and below and position.offset and first and min(first) < below:
                self._restart()  # it begins too far down after all
            elif position.has_shifted(page):
                position.step_back()  # the list has shifted
            else:
                position.is_placed, position.any_read = False, True
                seen = set[str]() if self._strict else position.shared
                for part in self._seam.join(page, seen, position.cursor):
                    yield part
                if page.next_cursor is None:
                    return
                position.advance(page, page.next_cursor)
        [end] = self._seam.join(_NOTHING, set(), None)
        if end.hole is not None and below is None and not position.any_read:
            raise end.hole.error
        yield end

    def _get_past(self, error: FloraError) -> bool:
        """Ask for less of what could not be read, or for what is below one item of it; begin at the
        top if the cursor may be the fault. False if nothing helps."""
        position = self._position
        if position.may_have_expired(error):
            self._restart()
        elif not position.ask_for_less():
            self._seam.open_hole(error, position.cursor)
            return position.skip_items()
        return True

    def _restart(self) -> None:
        self._position.restart()
        self._seam = _Seam(from_top=True)

    async def _go_to(self, below: datetime, cursor: str | None) -> None:
        """Go to the newest run older than `below`, or to the top if it cannot be found.

        `cursor` led there when the list was shorter or longer.
        """
        position = self._position
        guess = 0 if cursor is None else offset_of(cursor)
        if guess is None:
            position.follow(cursor)
        else:
            position.move_to(await self._offset_above(below, guess))
        position.is_placed = position.cursor is not None
        self._seam = _Seam(from_top=not position.is_placed)

    async def _offset_above(self, below: datetime, guess: int) -> int:
        """An offset at most about a page above the newest run older than `below`."""
        low, high, step = 0, None, PAGE_SIZE
        offset = max(0, guess - 2 * EDGE)
        try:
            while high is None or high - low > PAGE_SIZE:
                if offset == 0 or await self._is_newer(offset, below):
                    low = offset
                    offset = offset + step if high is None else (low + high) // 2
                else:
                    high = offset
                    offset = max(0, offset - step) if low == 0 else (low + high) // 2
                step *= 2
        except FloraError as error:
            if not self._concerns_page(error):
                raise
            if guess == 0:
                low = 0  # FLORA's cursors may not be offsets
        return max(0, low - EDGE)

    async def _is_newer(self, offset: int, moment: datetime) -> bool:
        page = await self._read(cursor_at(offset), 1)
        created_at = page.items[0].created_at if page.items else None
        return created_at is not None and created_at > moment

    def _concerns_page(self, error: FloraError) -> bool:
        """Whether the error is about what was asked for, so that less of it may be readable."""
        if self._strict:
            return False
        if isinstance(error, ServerFault | FloraUnreachable):
            return self._stubborn
        is_refused = isinstance(error, FloraRefusal) and error.status in (400, 413, 414, 422)
        return is_refused or isinstance(error, FloraUnreadable)


def _times(items: Iterable[Observation]) -> list[datetime]:
    return [item.created_at for item in items if item.created_at]


def _parts(page: HistoryPage, shared: set[str]) -> list[tuple[list[Observation], str | None]]:
    """The items of a page that are not `shared` with the page before it, parted where an item
    cannot be read; with each part the reason for what follows it, and `None` with the last.

    What is unreadable above a shared item was met on the page before.
    """
    items = iter(page.items)
    parts: list[tuple[list[Observation], str | None]] = []
    part: list[Observation] = []
    for position in range(len(page.items) + len(page.unreadable)):
        if (reason := page.unreadable.get(position)) is not None:
            parts.append((part, reason))
            part = []
        elif (item := next(items)).run_id not in shared:
            part.append(item)
        else:
            part = [*(one for before, _ in parts for one in before), *part]
            parts.clear()
    return [*parts, (part, None)]
