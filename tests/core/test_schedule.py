"""When a run is polled next, and the reason that is stored with that time."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.strategies import START
from tracker.core.run import Details, Precedence, RunState
from tracker.core.schedule import (
    Durations,
    NextPoll,
    Policy,
    PollReason,
    next_poll,
    next_recheck,
    wait_after,
)

POLICY = Policy()
KNOWN = Durations(count=40, p50=8.0, p95=20.0)
FEW = Durations(count=19, p50=8.0, p95=20.0)
SLOW = Durations(count=40, p50=5000.0, p95=9000.0)


def following(
    run: RunState | None = None, *, now: datetime = START, policy: Policy = POLICY, **facts: Any
) -> NextPoll | None:
    """The next poll of a run that was first seen at the start."""
    given = {"first_seen": START, "polls": 0, "callback_expected": False} | facts
    return next_poll(run or RunState(run_id="run_1"), policy=policy, now=now, **given)


@pytest.mark.parametrize(
    ("expected", "known", "why", "wait"),
    [
        (True, None, PollReason.GRACE, 30),
        (True, FEW, PollReason.GRACE, 30),
        (True, KNOWN, PollReason.LEARNED_GRACE, 25),
        (True, SLOW, PollReason.LEARNED_GRACE, 300),
        (False, None, PollReason.INTERVAL, 5),
        (False, KNOWN, PollReason.LEARNED_INTERVAL, 8),
        (False, SLOW, PollReason.LEARNED_INTERVAL, 50),
    ],
)
def test_the_first_poll(
    expected: bool, known: Durations | None, why: PollReason, wait: float
) -> None:
    """The first poll comes after grace or interval, by the settings or by known durations."""
    found = following(callback_expected=expected, durations=known)
    assert found == (START + timedelta(seconds=wait), why)


@pytest.mark.parametrize(
    ("expected", "known", "seconds", "wait"),
    [
        (False, SLOW, 50, 300),
        (False, SLOW, 301, 600),
        (False, SLOW, 4900, 5000),
        (False, KNOWN, 5, 8),
        (True, SLOW, 300, 600),
        (True, KNOWN, 12, 25),
    ],
)
def test_polls_are_put_off_until_the_end_may_be_expected(
    expected: bool, known: Durations, seconds: float, wait: float
) -> None:
    """After a first poll that came too early the next ones come when half of the runs have ended,
    or nearly all where a callback is on its way, and never later than the longest wait."""
    found = following(
        now=START + timedelta(seconds=seconds),
        policy=Policy(interval=timedelta(seconds=1)),  # the wait that each poll doubles is shortest
        polls=1,
        callback_expected=expected,
        durations=known,
    )
    assert found == (START + timedelta(seconds=wait), PollReason.LEARNED_WAIT)


@given(
    polls=st.integers(1, 12),
    age=st.floats(0, 20_000),
    p50=st.floats(0, 10_000),
    callback_expected=st.booleans(),
)
def test_known_durations_put_a_poll_off_by_the_longest_wait_at_most(
    polls: int, age: float, p50: float, callback_expected: bool
) -> None:
    """They bring no poll forward, and none is later than the longest wait from now."""
    now = START + timedelta(seconds=age)
    known = Durations(count=200, p50=p50, p95=2 * p50)
    without, learned = (
        following(now=now, polls=polls, callback_expected=callback_expected, durations=durations)
        for durations in (None, known)
    )
    assert without is not None
    assert learned is not None
    assert without.at <= learned.at <= now + POLICY.interval_max
    assert (learned.why is PollReason.WAIT) is (learned.at == without.at)


@given(polls=st.integers(1, 40), run_id=st.text(min_size=1, max_size=8))
def test_each_poll_without_an_end_doubles_the_wait(polls: int, run_id: str) -> None:
    """Up to the longest, less a fifth at most, and the same for the same run and number."""
    now = START + timedelta(minutes=5)
    found = following(RunState(run_id=run_id), now=now, polls=polls, durations=KNOWN)
    wait = wait_after(POLICY, run_id, polls)
    assert found == (now + wait, PollReason.WAIT)
    whole = min(POLICY.interval * 2 ** (polls - 1), POLICY.interval_max)
    assert 0.8 * whole <= wait <= whole


def test_an_end_without_details_is_due_at_once() -> None:
    """What a callback ended is read for its details."""
    run = RunState(run_id="run_1", precedence=Precedence.CALLBACK_COMPLETED)
    now = START + timedelta(seconds=9)
    assert following(run, now=now, at_once=True) == (now, PollReason.ENDED)


def test_what_someone_asked_for_is_due_at_once() -> None:
    """A run that is tracked by its id is read now."""
    assert following(at_once=True) == (START, PollReason.ASKED)


def test_nothing_is_due_where_nothing_is_left_to_read() -> None:
    """A settled run is not polled."""
    run = RunState(run_id="run_1", precedence=Precedence.COMPLETED, details=Details.READ)
    assert following(run) is None


@given(since=st.timedeltas(timedelta(0), timedelta(days=90)), answered=st.booleans())
def test_no_bill_waits_longer_than_until_it_is_given_up(since: timedelta, answered: bool) -> None:
    """A longer one is taken for that of a clock that was set back, and ended every five minutes."""
    due = next_recheck(POLICY, since_end=since, now=START, was_answered=answered)
    assert due is None or START < due <= START + POLICY.cost_give_up
