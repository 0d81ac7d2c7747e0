"""Coverage: which stretches of the history have been read, what is missing, what was verified."""

from datetime import timedelta
from typing import Any

from tests.store.making import NOW
from tracker.store.engine import Database
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.sweeps import Interval

DAY = timedelta(days=1)


def at(first: float, last: float, **more: Any) -> Interval:
    """An interval in days from now."""
    given: dict[str, Any] = {"read_at": NOW} | more
    return Interval(from_at=NOW + first * DAY, to_at=NOW + last * DAY, **given)


def test_intervals_that_touch_are_one() -> None:
    """However pages overlap, coverage is the same; below an interval counts what was tried last."""
    assert coverage.merged([at(0, 1), at(3, 4), at(1, 2), at(3.5, 5)]) == [at(3, 5), at(0, 2)]
    [one] = coverage.merged([at(0, 5, cursor="x"), at(0, 0, error="bad")])
    assert (one.to_at, one.error) == (NOW + 5 * DAY, "bad")
    [one] = coverage.merged([at(0, 5, error="bad"), at(-1, 2, cursor="y")])
    assert (one.error, one.cursor) == (None, "y")
    assert coverage.merged([at(2, 2, error="bad"), at(0, 1)])[0].error == "bad"
    assert coverage.merged([at(2, 3), at(1, 1, error="bad")]) == [at(2, 3)]


def test_what_is_missing_and_what_is_verified() -> None:
    """Gaps lie between intervals, above and below them; verified is what reaches back far enough;
    the very moment at which an interval begins is not part of it."""
    two = [at(3, 5), at(0, 2)]
    found = coverage.gaps(two, since=NOW - DAY, until=NOW + 6 * DAY)
    days = [((gap.bottom - NOW) / DAY, (gap.top - NOW) / DAY) for gap in found]
    assert days == [(5, 6), (2, 3), (-1, 0)]
    assert [gap.above for gap in found] == [None, *two]
    assert coverage.gaps(two, since=NOW + DAY, until=NOW + 5 * DAY)[0].bottom == NOW + 2 * DAY
    assert coverage.verified(two, since=NOW) == NOW + 2 * DAY
    assert coverage.verified(two, since=NOW + 4 * DAY) == NOW + 5 * DAY
    assert coverage.verified(two, since=NOW - DAY) is None
    covers = [coverage.covers(two, NOW + n * DAY) for n in (0, 1, 2, 2.5, 3, 5)]
    assert covers == [False, True, True, False, False, True]


async def test_coverage_is_kept_by_workspace_and_kind(db: Database) -> None:
    """What is added joins what is there, of its own workspace and kind alone, and what a wrong
    clock had claimed can be taken back."""
    later = {"cursor": "c", "error": "400", "failures": 2, "retry_at": NOW + DAY}
    await coverage.add(db, "ws_1", "technique", at(0, 1), at(2, 3, **later))
    await coverage.add(db, "ws_1", "generation", at(0, 9))
    await coverage.add(db, "ws_2", "technique", at(0, 9))
    after = await coverage.add(db, "ws_1", "technique", at(1, 1.5))
    assert after == await coverage.of(db, "ws_1", "technique") == [at(2, 3, **later), at(0, 1.5)]
    everything = await coverage.everything(db)
    assert {key: len(of) for key, of in everything.items()} == {
        ("ws_1", "technique"): 2,
        ("ws_1", "generation"): 1,
        ("ws_2", "technique"): 1,
    }
    [gap] = coverage.unread(everything)
    assert (gap.workspace_id, gap.run_type, gap.error) == ("ws_1", "technique", "400")
    assert (gap.from_at, gap.to_at) == (NOW + 1.5 * DAY, NOW + 2 * DAY)
    await coverage.forget_after(db, "ws_1", "technique", NOW + 2 * DAY)
    assert await coverage.of(db, "ws_1", "technique") == [at(0, 1.5)]
