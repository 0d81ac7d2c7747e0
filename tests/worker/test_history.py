"""Walking down a list of runs that changes, or shows less than it should."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.shares import shared
from tracker.core.errors import FloraError, FloraUnreadable
from tracker.core.observation import Observation, Source
from tracker.core.run import RunStatus
from tracker.flora.client import HistoryPage
from tracker.flora.parse import cursor_at, offset_of
from tracker.polling.history import HistoryWalk

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
NO_RUN = "the run has no run_id"


class ListOfRuns:
    """A list of runs, newest first: `run_0` is the newest, and each is a second older.

    `shows` is false of runs that a filter leaves out of a page after it was cut; `unreadable` are
    shown without an id.
    """

    def __init__(self, count: int, shows: Callable[[int], bool] = lambda _: True) -> None:
        self.runs = list(range(count))
        self.shows = shows
        self.unreadable: set[int] = set()
        self.largest = 100
        self.reads = 0

    async def read(self, cursor: str | None, limit: int) -> HistoryPage:
        self.reads += 1
        assert self.reads < 200, "the walk has no end"
        offset = 0 if cursor is None else offset_of(cursor)
        assert offset is not None
        end = offset + min(limit, self.largest)
        shown = [number for number in self.runs[offset:end] if self.shows(number)]
        return HistoryPage(
            items=[item(number) for number in shown if number not in self.unreadable],
            next_cursor=cursor_at(end) if end < len(self.runs) else None,
            unreadable={n: NO_RUN for n, number in enumerate(shown) if number in self.unreadable},
        )


def item(number: int) -> Observation:
    return Observation(
        run_id=f"run_{number}",
        source=Source.HISTORY,
        at=NOW,
        status=RunStatus.COMPLETED,
        created_at=NOW - timedelta(seconds=number),
    )


def ids(numbers: Sequence[int]) -> set[str]:
    return {f"run_{number}" for number in numbers}


@pytest.mark.parametrize("strict", [False, True])
async def test_a_list_that_is_cut_into_pages_before_it_is_filtered_has_an_end(strict: bool) -> None:
    """The next page need not begin with a run of the page before: that is no shift of the list."""
    listed = ListOfRuns(1000, lambda number: number % 100 == 7)
    pages = [page async for page in HistoryWalk(listed.read, strict=strict).pages()]
    assert {one.run_id for page in pages for one in page.items} == ids(range(7, 1000, 100))
    assert pages[-1].is_last
    assert listed.reads < 15


@pytest.mark.parametrize("largest", shared([2, 3, 50, 100], of=2))
async def test_a_strict_walk_misses_no_run_of_a_list_that_shifts(largest: int) -> None:
    """Also where FLORA's pages are smaller than asked for."""
    listed = ListOfRuns(6 * largest)
    listed.largest = largest
    found: set[str] = set()
    async for page in HistoryWalk(listed.read, strict=True).pages():
        found |= {one.run_id for one in page.items}
        if listed.reads in (2, 4):
            del listed.runs[: largest - 1]
    assert ids(listed.runs) <= found


@pytest.mark.parametrize("strict", [False, True])
async def test_a_shift_shows_where_pages_lack_some_of_their_runs(strict: bool) -> None:
    """Also the last ones of a page, with which the next one would begin."""

    def is_shown(number: int) -> bool:
        return number % 50 != 20 and not 195 <= number < 205

    listed = ListOfRuns(600, is_shown)
    found: set[str] = set()
    async for page in HistoryWalk(listed.read, strict=strict).pages():
        found |= {one.run_id for one in page.items}
        if listed.reads == 2:
            del listed.runs[:30]
    assert ids(list(filter(is_shown, listed.runs))) <= found


@pytest.mark.parametrize("unreadable", [{150}, {94, 95, 96, 130, 131}, {97, 98, 99, 150}])
async def test_a_shift_shows_although_an_item_cannot_be_read(unreadable: set[int]) -> None:
    """It may be one of those that both pages show, but not all of them; and if none of these can be
    read, the list need not have shifted."""
    listed = ListOfRuns(300)
    listed.unreadable = unreadable
    found: set[str] = set()
    async for page in HistoryWalk(listed.read).pages():
        found |= {one.run_id for one in page.items}
        if listed.reads == 1 and len(unreadable) == 1:
            del listed.runs[:30]
    assert ids(listed.runs) <= found | ids(sorted(unreadable))


@pytest.mark.parametrize("sizes", [{1}, {2, 3, 4, 5, 6}])
async def test_a_shift_shows_where_a_page_is_read_in_small_parts(sizes: set[int]) -> None:
    """As around a run that spoils every page that has it: one run at a time, too."""
    listed, is_shifted = ListOfRuns(300), False

    async def spoiled(cursor: str | None, limit: int) -> HistoryPage:
        nonlocal is_shifted
        page = await listed.read(cursor, limit)
        if "run_60" in {one.run_id for one in page.items}:
            raise FloraUnreadable("the answer is too large")
        if limit in sizes and not is_shifted:
            del listed.runs[:20]
            is_shifted = True
        return page

    found: set[str] = set()
    async for walked in HistoryWalk(spoiled).pages():
        found |= {one.run_id for one in walked.items}
    assert is_shifted
    assert ids(listed.runs) - found == {"run_60"}


async def test_a_list_of_whole_pages_alone_is_not_read_for_ever() -> None:
    """FLORA goes on to the next whole page, so that none begins with runs of the one before."""
    listed = ListOfRuns(600)

    async def whole(cursor: str | None, limit: int) -> HistoryPage:
        offset = 0 if cursor is None else offset_of(cursor) or 0
        return await listed.read(cursor_at(-(-offset // limit) * limit), limit)

    with pytest.raises(FloraUnreadable, match="changes faster"):
        async for _ in HistoryWalk(whole, strict=True).pages():
            pass


async def test_a_strict_walk_reads_around_no_error() -> None:
    """Whoever has to know that a run is not there is told at once that a page cannot be read."""
    listed, asked = ListOfRuns(300), 0

    async def fails(cursor: str | None, limit: int) -> HistoryPage:
        nonlocal asked
        asked += 1
        if cursor is not None:
            raise FloraUnreadable("the answer is too large")
        return await listed.read(cursor, limit)

    with pytest.raises(FloraError, match="too large"):
        async for _ in HistoryWalk(fails, strict=True).pages():
            pass
    assert asked == 2


async def test_a_strict_walk_tells_of_every_unreadable_item() -> None:
    """An item may have been put between runs of the page before, above which it was not: it is no
    known one for that."""
    listed = ListOfRuns(150)
    holes = []
    async for page in HistoryWalk(listed.read, strict=True).pages():
        holes.append(page.hole)
        listed.runs[97:101] = [97, 100, 98, 99]
        listed.unreadable = {100}
    assert [hole is not None for hole in holes] == [False, False, True]


@pytest.mark.parametrize("place", [0, 40])
async def test_a_list_of_which_nothing_can_be_read_fails(place: int) -> None:
    """From the top, that is no hole; below what was read, it is one without an end."""

    async def fails(cursor: str | None, limit: int) -> HistoryPage:
        raise FloraUnreadable("no JSON")

    walk = HistoryWalk(fails)
    if place == 0:
        with pytest.raises(FloraUnreadable, match="no JSON"):
            await anext(walk.pages())
        return
    pages = walk.pages(below=NOW - timedelta(seconds=place), cursor=cursor_at(place))
    [page] = [page async for page in pages]
    assert page.hole is not None
    assert (page.items, page.is_last, page.hole.end) == ([], True, None)


async def test_a_hole_goes_on_until_a_time_is_known() -> None:
    """Items without a creation time below it do not show where it ends."""
    listed = ListOfRuns(10)
    listed.unreadable = {3, 6}

    async def untimed(cursor: str | None, limit: int) -> HistoryPage:
        page = await listed.read(cursor, limit)
        lacking = ids((4, 5))
        return replace(
            page,
            items=[
                replace(one, created_at=None) if one.run_id in lacking else one
                for one in page.items
            ],
        )

    pages = [page async for page in HistoryWalk(untimed).pages()]
    assert [len(page.items) for page in pages] == [3, 2, 3]
    assert [page.from_top for page in pages] == [True, False, False]
    assert [page.floor is None for page in pages] == [False, True, False]
    assert pages[0].hole is pages[1].hole is None
    hole = pages[2].hole
    assert hole is not None
    assert hole.end == NOW - timedelta(seconds=9, microseconds=1), "one wrong time does no harm"
