"""Gaps in the numbers of events: one that may still be filled is waited for, others are not."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tracker.polling.changes import GAP_SECONDS, GapTracker
from tracker.store.queries.runs import Snapshot


def test_events_that_appear_in_order_are_ready_at_once() -> None:
    """Where numbers follow the order of commits, gaps mean nothing."""
    gaps = GapTracker(4)
    assert gaps.advance([5, 9, 10], None, now=0) == 3
    assert gaps.position == 10
    assert gaps.advance([], None, now=1) == 0
    assert not gaps.waiting


def test_a_gap_is_waited_for_until_its_transaction_has_ended() -> None:
    """What is behind a gap is ready when the gap is filled, or can no longer be filled."""
    gaps = GapTracker(0)
    assert gaps.advance([1, 3], Snapshot(ended=70, begun=73), now=0) == 1
    assert gaps.waiting
    assert gaps.advance([3, 4], Snapshot(ended=72, begun=75), now=1) == 0
    assert gaps.advance([2, 3, 4], Snapshot(ended=73, begun=75), now=2) == 3
    assert not gaps.waiting
    assert gaps.advance([6], Snapshot(ended=75, begun=76), now=3) == 0
    assert gaps.advance([6], Snapshot(ended=76, begun=76), now=4) == 1


def test_a_transaction_that_began_later_cannot_fill_an_older_gap() -> None:
    """Only transactions open when the gap was seen count; each gap is waited for by itself."""
    gaps = GapTracker(0)
    assert gaps.advance([2], Snapshot(ended=10, begun=12), now=0) == 0
    assert gaps.advance([2, 4], Snapshot(ended=12, begun=14), now=1) == 1
    assert (gaps.position, gaps.waiting) == (2, True)
    assert gaps.advance([4], Snapshot(ended=14, begun=14), now=2) == 1


def test_a_foreign_transaction_does_not_hold_the_stream_for_ever() -> None:
    """A transaction that someone else leaves open delays what is behind a gap for a while."""
    gaps = GapTracker(0)
    stuck = Snapshot(ended=5, begun=9)
    assert gaps.advance([2], stuck, now=0) == 0
    assert gaps.advance([2], stuck, now=GAP_SECONDS - 1) == 0
    assert gaps.advance([2], stuck, now=GAP_SECONDS) == 1


def test_deleted_events_are_not_waited_for() -> None:
    """When what was behind a gap is deleted, nothing waits."""
    gaps = GapTracker(0)
    assert gaps.advance([2], Snapshot(ended=5, begun=9), now=0) == 0
    assert gaps.advance([], Snapshot(ended=0, begun=0), now=1) == 0
    assert not gaps.waiting


@given(seed=st.integers(0, 10**6))
@settings(max_examples=200)
def test_whatever_commits_when_nothing_is_lost_or_sent_twice(seed: int) -> None:
    """Transactions that take numbers, commit or are rolled back in any order: each event that is
    ever committed is sent once, in the order of the numbers."""
    chance = random.Random(seed)
    next_number, next_transaction = 1, 100
    under_way: dict[int, list[int]] = {}
    visible: set[int] = set()
    gaps, sent = GapTracker(0), []

    def read(limit: int) -> None:
        snapshot = Snapshot(ended=min(under_way, default=next_transaction), begun=next_transaction)
        page = sorted(number for number in visible if number > gaps.position)[:limit]
        sent.extend(page[: gaps.advance(page, snapshot, now=0)])

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
                read(chance.choice([2, 100]))
    for numbers in under_way.values():
        visible.update(numbers)
    under_way.clear()
    for _ in range(100):
        read(chance.choice([2, 100]))
    assert sent == sorted(visible)
