"""PollReason the next look is when it is: the schedule's own decisions, read back."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.strategies import START
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import Details, Precedence, Run
from tracker.core.schedule import Durations, Policy, next_check, wait_after
from tracker.explaining.next_poll import NextPoll, PollReason, next_poll

POLICY = Policy()
KNOWN = Durations(count=40, p50=8.0, p95=20.0)
FEW = Durations(count=19, p50=8.0, p95=20.0)
SLOW = Durations(count=40, p50=5000.0, p95=9000.0)


def record(**facts: object) -> Record:
    given: dict[str, object] = {
        "run": Run(run_id="run_1"),
        "source": Source.START,
        "first_seen_at": START,
    }
    return Record(**(given | facts))  # type: ignore[arg-type]


def scheduled(one: Record, *, now: datetime = START, known: Durations | None = None) -> Record:
    """The record with the time that the schedule itself gives it."""
    at = next_check(
        one.run,
        policy=POLICY,
        now=now,
        first_seen=one.first_seen_at,
        polls=one.polls,
        callback_expected=one.callback_expected,
        durations=known,
    )
    return replace(one, next_check_at=at)


@pytest.mark.parametrize(
    ("expected", "known", "why", "wait", "bounded"),
    [
        (True, None, PollReason.GRACE, 30, False),
        (True, FEW, PollReason.GRACE, 30, False),
        (True, KNOWN, PollReason.LEARNED_GRACE, 25, False),
        (True, SLOW, PollReason.LEARNED_GRACE, 300, True),
        (False, None, PollReason.INTERVAL, 5, False),
        (False, KNOWN, PollReason.LEARNED_INTERVAL, 8, False),
        (False, SLOW, PollReason.LEARNED_INTERVAL, 50, True),
    ],
)
def test_the_first_poll_is_explained(
    expected: bool, known: Durations | None, why: PollReason, wait: float, bounded: bool
) -> None:
    """Grace or interval, by the settings or by what was learned, and how far that may go."""
    one = scheduled(record(callback_expected=expected), known=known)
    look = next_poll(one, policy=POLICY, durations=known)
    assert (look.why, look.wait, look.bounded) == (why, timedelta(seconds=wait), bounded)
    assert look.since == START
    learned = why in (PollReason.LEARNED_GRACE, PollReason.LEARNED_INTERVAL)
    assert look.durations == (known if learned else None)


def test_what_was_learned_since_does_not_explain_an_older_decision() -> None:
    """A look that the settings gave stays theirs after durations have become known."""
    one = scheduled(record(callback_expected=True))
    assert next_poll(one, policy=POLICY, durations=KNOWN).why is PollReason.GRACE


def test_another_decision_is_reported_as_such() -> None:
    """Where neither the settings nor the durations of now give the moment, nothing is made up."""
    one = scheduled(record(callback_expected=True), known=SLOW)
    look = next_poll(one, policy=POLICY, durations=KNOWN)
    assert (look.why, look.wait) == (PollReason.BEFORE, timedelta(seconds=300))


@pytest.mark.parametrize(
    ("expected", "known", "seconds", "wait", "bounded"),
    [
        (False, SLOW, 50, 300, True),
        (False, SLOW, 301, 600, True),
        (False, SLOW, 4900, 5000, False),
        (False, KNOWN, 5, 8, False),
        (True, SLOW, 300, 600, True),
        (True, KNOWN, 12, 25, False),
    ],
)
def test_polls_are_put_off_until_the_end_may_be_expected(
    expected: bool, known: Durations, seconds: float, wait: float, bounded: bool
) -> None:
    """After a first look that came too early the next ones come when half of the runs have ended,
    or nearly all where a callback is on its way, and never later than the longest wait; that is
    told."""
    # The wait that each look doubles is the shortest one here.
    one = record(callback_expected=expected, polls=1)
    now = START + timedelta(seconds=seconds)
    policy = replace(POLICY, interval=timedelta(seconds=1))
    at = next_check(
        one.run,
        policy=policy,
        now=now,
        first_seen=START,
        polls=1,
        callback_expected=expected,
        durations=known,
    )
    assert at == START + timedelta(seconds=wait)
    look = next_poll(replace(one, next_check_at=at), policy=policy, durations=known)
    assert (look.why, look.wait, look.bounded) == (
        PollReason.LEARNED_WAIT,
        timedelta(seconds=wait),
        bounded,
    )
    assert look.durations == known


@given(
    polls=st.integers(1, 12),
    age=st.floats(0, 20_000),
    p50=st.floats(0, 10_000),
    callback_expected=st.booleans(),
)
def test_what_was_learned_puts_off_by_the_longest_wait_at_most(
    polls: int, age: float, p50: float, callback_expected: bool
) -> None:
    """It brings no look forward, and none is later than the longest wait from now."""
    now = START + timedelta(seconds=age)
    at: dict[bool, datetime] = {}
    for learned in (False, True):
        found = next_check(
            Run(run_id="run_1"),
            policy=POLICY,
            now=now,
            first_seen=START,
            polls=polls,
            callback_expected=callback_expected,
            durations=Durations(count=200, p50=p50, p95=2 * p50) if learned else None,
        )
        assert found is not None
        at[learned] = found
    assert at[False] <= at[True] <= now + POLICY.interval_max


@given(polls=st.integers(1, 40), run_id=st.text(min_size=1, max_size=8))
def test_a_doubled_wait_is_taken_apart(polls: int, run_id: str) -> None:
    """Of the k-th wait it is told since when it runs, and what the jitter took off."""
    now = START + timedelta(minutes=5)
    one = scheduled(record(run=Run(run_id=run_id), polls=polls), now=now)
    look = next_poll(one, policy=POLICY, durations=KNOWN)
    assert (look.why, look.number, look.since) == (PollReason.WAIT, polls, now)
    assert look.wait == wait_after(POLICY, run_id, polls)
    whole = (look.wait or timedelta()) + (look.jitter or timedelta())
    assert whole == min(POLICY.interval * 2 ** (polls - 1), POLICY.interval_max)


def test_an_end_without_details_is_due_at_once() -> None:
    """What a callback ended is read for its details."""
    run = Run(run_id="run_1", precedence=Precedence.CALLBACK_COMPLETED)
    now = START + timedelta(seconds=9)
    look = next_poll(scheduled(record(run=run), now=now), policy=POLICY, durations=None)
    assert (look.why, look.at) == (PollReason.ENDED, now)


def test_what_someone_asked_for_is_due_at_once() -> None:
    """A run that is tracked by its id is read now."""
    one = record(source=Source.TRACK, next_check_at=START)
    assert next_poll(one, policy=POLICY, durations=None).why is PollReason.ASKED


def test_nothing_is_due_where_nothing_is_left_to_read() -> None:
    """Settled and lost runs are not looked at."""
    run = Run(run_id="run_1", precedence=Precedence.COMPLETED, details=Details.READ)
    assert next_poll(record(run=run), policy=POLICY, durations=None) == NextPoll(
        why=PollReason.SETTLED
    )
    assert next_poll(record(lost=True), policy=POLICY, durations=None).why is PollReason.LOST
