"""Up to which number the timeline is whole: a line that commits late is waited for, a hole is
not."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tracker.store.queries.changes import Moment
from tracker.web.stream.whole import HOLD, Whole


def test_lines_that_commit_in_order_are_passed_at_once() -> None:
    """Where the numbers say the order of commits, holes mean nothing."""
    whole = Whole(4)
    assert whole.take([5, 9, 10], None, now=0) == 3
    assert whole.upto == 10
    assert whole.take([], None, now=1) == 0
    assert not whole.waits


def test_a_gap_is_waited_for_until_its_transaction_has_ended() -> None:
    """What stands behind a gap goes out when the gap is filled, or can be filled no more."""
    whole = Whole(0)
    assert whole.take([1, 3], Moment(ended=70, begun=73), now=0) == 1
    assert whole.waits
    assert whole.take([3, 4], Moment(ended=72, begun=75), now=1) == 0
    assert whole.take([2, 3, 4], Moment(ended=73, begun=75), now=2) == 3
    assert not whole.waits
    assert whole.take([6], Moment(ended=75, begun=76), now=3) == 0
    assert whole.take([6], Moment(ended=76, begun=76), now=4) == 1


def test_a_transaction_that_began_later_cannot_fill_an_older_gap() -> None:
    """Only what was under way when the gap was seen counts; a new gap is waited for anew."""
    whole = Whole(0)
    assert whole.take([2], Moment(ended=10, begun=12), now=0) == 0
    assert whole.take([2, 4], Moment(ended=12, begun=14), now=1) == 1
    assert (whole.upto, whole.waits) == (2, True)
    assert whole.take([4], Moment(ended=14, begun=14), now=2) == 1


def test_nobody_elses_transaction_holds_the_stream_for_ever() -> None:
    """A transaction that is left open by somebody else delays what is behind a gap for a while."""
    whole = Whole(0)
    stuck = Moment(ended=5, begun=9)
    assert whole.take([2], stuck, now=0) == 0
    assert whole.take([2], stuck, now=HOLD - 1) == 0
    assert whole.take([2], stuck, now=HOLD) == 1


def test_lines_that_are_deleted_are_not_waited_for() -> None:
    """Where what stood behind a gap is gone, so is the wait."""
    whole = Whole(0)
    assert whole.take([2], Moment(ended=5, begun=9), now=0) == 0
    assert whole.take([], Moment(ended=0, begun=0), now=1) == 0
    assert not whole.waits


@given(seed=st.integers(0, 10**6))
@settings(max_examples=200)
def test_whatever_commits_when_nothing_is_lost_or_told_twice(seed: int) -> None:
    """Transactions that take numbers, commit or are rolled back in any order: each line that is
    ever committed is passed on once, in the order of the numbers."""
    chance = random.Random(seed)
    next_number, next_transaction = 1, 100
    under_way: dict[int, list[int]] = {}
    visible: set[int] = set()
    whole, told = Whole(0), []

    def look(limit: int) -> None:
        moment = Moment(ended=min(under_way, default=next_transaction), begun=next_transaction)
        page = sorted(number for number in visible if number > whole.upto)[:limit]
        told.extend(page[: whole.take(page, moment, now=0)])

    for _ in range(80):
        match chance.randrange(5):
            case 0:
                under_way[next_transaction] = []
                next_transaction += 1
            case 1 | 2 if under_way:
                under_way[chance.choice(sorted(under_way))].append(next_number)
                next_number += 1
            case 3 if under_way:
                numbers = under_way.pop(chance.choice(sorted(under_way)))
                if chance.random() < 0.8:
                    visible.update(numbers)
            case _:
                look(chance.choice([2, 100]))
    for numbers in under_way.values():
        visible.update(numbers)
    under_way.clear()
    for _ in range(100):
        look(chance.choice([2, 100]))
    assert told == sorted(visible)
