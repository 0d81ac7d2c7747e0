"""What happens often is said seldom, and its number is exact."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tracker.core.log import LogRateLimit


def test_the_first_is_said_at_once_and_the_next_when_it_is_time() -> None:
    """Those between are not said, and the next line counts them."""
    seldom = LogRateLimit(10)
    assert seldom.count("down", now=100.0) == 1
    assert [seldom.count("down", now=100.0 + second) for second in range(1, 10)] == [0] * 9
    assert seldom.count("down", now=110.0) == 10
    assert seldom.count("down", now=119.9) == 0


def test_one_kind_does_not_silence_another() -> None:
    """Each has a number and a time of its own."""
    seldom = LogRateLimit(10)
    assert seldom.count("down", now=0.0) == 1
    assert seldom.count("refused", now=1.0) == 1
    assert seldom.count("refused", now=10.5) == 0
    assert seldom.count("down", now=10.5) == 1


def test_a_clock_may_begin_anywhere() -> None:
    """Below zero too, as clocks that only go forward may."""
    assert LogRateLimit(10).count("down", now=-1000.0) == 1


@given(st.lists(st.integers(0, 5), max_size=50))
def test_none_is_said_twice_or_too_soon(steps: list[int]) -> None:
    """What was said, with what still waits to be said, is all that was counted."""
    seldom, now, said, times = LogRateLimit(10), 0, 0, []
    for step in steps:
        now += step
        count = seldom.count("down", now=now)
        if count:
            said += count
            times.append(now)
    assert said + seldom.count("down", now=now + 10) == len(steps) + 1
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(times))
