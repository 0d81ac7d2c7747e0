"""What a run counts for follows from its record alone."""

from datetime import timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from tests.store.making import NOW, POLICY, callback, observations, seen, started
from tests.support.deliveries import Delivered
from tracker.core.record import Entry, Observed, Record, apply
from tracker.core.rollup import (
    ALWAYS,
    BEYOND,
    COST,
    EDGES,
    END,
    FAILURE,
    FINAL,
    MEASURES,
    OPEN,
    QUOTE,
    QUOTED,
    SPENT,
    STATE,
    TAGGED,
    UNPRICED,
    billionths,
    bucket_of,
    dollars,
    facts,
    lag_ms,
    same,
)
from tracker.core.run import RunError, RunStatus


def after(*entries: Entry | Delivered) -> Record:
    """The record that the entries make."""
    record = None
    for entry in entries:
        record = apply(record, as_seen(entry), policy=POLICY, durations_of=lambda _: None)
    assert record is not None
    return record


def as_seen(entry: Entry | Delivered) -> Entry:
    """What a delivery says of its run."""
    if not isinstance(entry, Delivered):
        return entry
    assert entry.observation is not None
    return Observed(observation=entry.observation)


def test_a_run_that_goes_on_counts_for_its_state_alone() -> None:
    """Hours, days and times begin to count when the end is known."""
    ((key, amount),) = facts(after(started("run_1", facts={"workspace_id": "ws_1"})))
    assert key[:4] == (STATE, ALWAYS, "ws_1", "")
    assert (key.status, key.word, amount) == ("pending", "active", 0)


def test_a_settled_run_counts_once_in_each_measure() -> None:
    """Whatever there is to say of it is said once."""
    ended = {"completed_at": NOW - timedelta(seconds=3), "charged_cost": Decimal("0.5")}
    record = after(
        started("run_1"),
        callback("run_1"),
        seen("run_1", RunStatus.COMPLETED, at=NOW + timedelta(seconds=2), facts=ended),
    )
    found = facts(record)
    assert sorted(key.measure for key, _ in found) == sorted(
        set(MEASURES) - {QUOTE, FAILURE, TAGGED}
    )
    assert {amount for _, amount in found} == {0, 3000, 5000, 500_000_000}


def test_a_bill_is_open_until_it_is_final_or_given_up() -> None:
    """A settled run without a final bill counts as open, its quote beside it; one whose cost never
    came as unpriced; a failed one counts for its retry advice."""
    quoted = started("run_1", facts={"charged_cost": Decimal("0.25")})

    def costs(*entries: Entry | Delivered) -> list[tuple[str, str, int]]:
        found = facts(after(quoted, *entries))
        return [
            (key.measure, key.word, amount)
            for key, amount in found
            if key.measure in (COST, QUOTE, FAILURE)
        ]

    day = timedelta(days=1)
    ended = seen("run_1", RunStatus.COMPLETED)
    billed = {"charged_cost": Decimal("0.5")}
    again = seen("run_1", RunStatus.COMPLETED, at=NOW + day, facts=billed, reads=1)
    quote = 250_000_000
    assert costs(ended) == [(COST, OPEN, 0), (QUOTE, OPEN, quote)]
    assert costs(ended, again) == [(COST, FINAL, 500_000_000)]
    given_up = seen("run_1", RunStatus.COMPLETED, at=NOW + day, reads=1)
    assert costs(ended, given_up) == [(COST, UNPRICED, 0), (QUOTE, UNPRICED, quote)]
    assert [key.status for key, _ in facts(after(quoted, ended)) if key.measure == SPENT] == [
        QUOTED
    ]
    assert [
        (key.status, amount)
        for key, amount in facts(after(quoted, ended, given_up))
        if key.measure == SPENT
    ] == [(UNPRICED, quote)]
    failed = {"error": RunError("model_timeout")}
    assert costs(seen("run_1", RunStatus.FAILED, at=NOW + day, facts=failed)) == [
        *((COST, OPEN, 0), (QUOTE, OPEN, quote), (FAILURE, "retry_now", 0)),
    ]


def test_the_hour_of_an_end_stays() -> None:
    """An end counts where it was first known, whatever is heard later."""
    later = NOW + timedelta(hours=5)
    record = after(
        callback("run_1"), seen("run_1", RunStatus.FAILED, at=later), callback("run_1", at=later)
    )
    assert record.end_seen_at == NOW
    ((hour, status),) = [(key.since, key.status) for key, _ in facts(record) if key.measure == END]
    assert (hour, status) == (NOW.replace(minute=0, second=0, microsecond=0), "failed")


@given(
    st.lists(observations("run_1"), min_size=1, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_what_is_the_same_counts_for_the_same(observed: list, expected: list[bool]) -> None:
    """The quick look never overlooks a change."""
    record = None
    for observation, with_callback in zip(observed, expected, strict=False):
        entry = Observed(observation=observation, callback_expected=with_callback)
        new = apply(record, entry, policy=POLICY, durations_of=lambda _: None)
        assert new is not None
        if record is not None and same(record, new):
            assert facts(record) == facts(new)
        record = new


def test_times_and_costs_stay_within_bounds() -> None:
    """Clocks that disagree, absurd waits and absurd costs make no sum impossible."""
    assert lag_ms(NOW, NOW - timedelta(seconds=1)) == 0
    assert lag_ms(NOW, NOW + timedelta(days=9999)) == BEYOND
    assert [bucket_of(ms) for ms in (0, 100, 101, EDGES[-1], EDGES[-1] + 1)] == [
        *(100, 100, 200, EDGES[-1], BEYOND),
    ]
    assert billionths(Decimal("1e30")) == 10**15
    assert billionths(Decimal("-1")) == 0
    assert dollars(billionths(Decimal("0.123456789"))) == Decimal("0.123456789")
