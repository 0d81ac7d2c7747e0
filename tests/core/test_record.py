"""The facts about receipt, and when a run is polled next."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.strategies import START, observations
from tests.support.started import of_start
from tracker.core.observation import Observation, Source
from tracker.core.record import Entry, FailedRead, Observed, Record, apply
from tracker.core.run import Output, RunState, RunStatus, Tracking
from tracker.core.schedule import Durations, Policy, first_wait, learned_wait, next_poll, wait_after

POLICY = Policy()
PICTURE = Output("output_1", "imageUrl", "https://media.example/1.png")


def unknown_durations(technique_id: str | None) -> Durations | None:
    return None


def after(entries: Sequence[Entry], record: Record | None = None) -> Record:
    for entry in entries:
        record = apply(record, entry, policy=POLICY, durations_of=unknown_durations)
    assert record is not None
    return record


def seen(
    source: Source, status: RunStatus = RunStatus.PENDING, *, at: float = 0, **shown: object
) -> Observation:
    moment = START + timedelta(seconds=at)
    return Observation(run_id="run_1", source=source, status=status, at=moment, **shown)  # type: ignore[arg-type]


def callback(status: RunStatus = RunStatus.COMPLETED, *, at: float) -> Observed:
    return Observed(observation=seen(Source.CALLBACK, status, at=at))


def started(*, at: float = 0, callback_expected: bool = True) -> Observed:
    return Observed(observation=seen(Source.START, at=at), callback_expected=callback_expected)


def polled(status: RunStatus, *, at: float, **shown: object) -> Observed:
    return Observed(observation=seen(Source.POLL, status, at=at, **shown), reads=1)


def denied(*, at: float) -> FailedRead:
    moment = START + timedelta(seconds=at)
    return FailedRead(run_id="run_1", at=moment, error="no such run", missing=True)


def seconds(moment: datetime | None) -> float:
    assert moment is not None
    return (moment - START).total_seconds()


def test_a_started_run_waits_for_its_callback() -> None:
    """A run with a callback on its way is first polled after the grace, one without sooner."""
    assert seconds(after([started()]).next_check_at) == 30
    assert seconds(after([started(callback_expected=False)]).next_check_at) == 5


def test_a_callback_makes_its_run_due_at_once() -> None:
    """A callback ends the run and makes it due in the same moment, whatever was planned."""
    record = after([started(), callback(at=7)])
    assert (record.run.status, record.ended_via) == (RunStatus.COMPLETED, Source.CALLBACK)
    assert seconds(record.callback_at) == seconds(record.next_check_at) == 7
    assert record.tracking is Tracking.ACTIVE


def test_what_a_start_reserved_stays_with_its_run() -> None:
    """It counts in the budgets of the period of its start, whatever is read later, and FLORA's
    clock says."""
    reserved = {"reserved_at": START - timedelta(days=1), "reserved_cost": Decimal("0.25")}
    start = of_start(started(), **reserved)
    record = after([start, polled(RunStatus.RUNNING, at=9, created_at=START)])
    assert (record.spent_at, record.reserved_cost) == (reserved["reserved_at"], Decimal("0.25"))


def test_our_own_start_is_the_source_even_behind_its_callback() -> None:
    """A callback that overtakes the answer to our start leaves `source` at start, the run due."""
    record = after([callback(at=1), started(at=2)])
    assert (record.source, record.ended_via) == (Source.START, Source.CALLBACK)
    assert seconds(record.first_seen_at) == seconds(record.next_check_at) == 1


def test_the_first_to_tell_of_an_end_stays_named() -> None:
    """`ended_via`, `callback_at` and `settled_at` keep the first value, whatever follows."""
    record = after(
        [
            started(),
            polled(RunStatus.COMPLETED, at=31),
            callback(at=40),
            polled(RunStatus.COMPLETED, at=50),
        ]
    )
    assert (record.ended_via, record.checks) == (Source.POLL, 2)
    assert (seconds(record.settled_at), seconds(record.callback_at)) == (31, 40)
    assert record.next_check_at is None


def test_waits_grow_while_nothing_happens() -> None:
    """Each look that finds the run still going doubles the wait, to the longest and no further."""
    record = after([started()])
    waits = []
    for _ in range(12):
        at = seconds(record.next_check_at)
        record = after([polled(RunStatus.RUNNING, at=at)], record)
        waits.append(seconds(record.next_check_at) - at)
    assert all(shorter < longer * 1.3 for shorter, longer in pairwise(waits))
    assert 4 <= waits[0] <= 5
    assert 240 <= waits[-1] <= 300
    assert record.checks == 12


def test_a_page_read_for_others_puts_no_poll_off() -> None:
    """A list that shows a run which is not due leaves its time and its count of polls alone."""
    record = after([started(), polled(RunStatus.RUNNING, at=30)])
    page = Observed(observation=seen(Source.HISTORY, RunStatus.RUNNING, at=31))
    assert after([page], record) is record
    due = seconds(record.next_check_at)
    late = Observed(observation=seen(Source.HISTORY, RunStatus.RUNNING, at=due + 1))
    assert seconds(after([late], record).next_check_at) > due


def test_lists_without_details_put_no_read_off() -> None:
    """A run that has ended stays due for its details, however many pages show it without them."""
    record = after([started(), callback(at=7)])
    for at in range(8, 20):
        item = Observed(observation=seen(Source.HISTORY, RunStatus.COMPLETED, at=at))
        record = after([item], record)
    assert seconds(record.next_check_at) <= 8


def test_what_was_read_before_a_callback_puts_no_read_off() -> None:
    """A read that began before the callback, and is answered or written after it, leaves the run
    due at once."""
    sent_at = START + timedelta(seconds=6.8)
    for at in (6.9, 7.1):
        read = polled(RunStatus.RUNNING, at=at, sent_at=sent_at)
        record = after([started(), callback(at=7), read])
        assert seconds(record.next_check_at) == 7
        assert record.checks == 1


def test_a_failed_read_of_a_settled_run_is_only_counted() -> None:
    """A read that failed after another way had settled the run leaves no error behind."""
    failed = FailedRead(
        run_id="run_1", at=START + timedelta(seconds=40), error="FLORA answered 503"
    )
    record = after([started(), polled(RunStatus.FAILED, at=31), failed])
    assert (record.checks, record.last_error, record.tracking) == (2, None, Tracking.SETTLED)


def test_an_end_without_details_is_read_at_once() -> None:
    """A history item that shows the end but not the details makes the run due now."""
    item = Observed(observation=seen(Source.HISTORY, RunStatus.COMPLETED, at=60))
    record = after([started(), polled(RunStatus.RUNNING, at=30), item])
    assert (seconds(record.next_check_at), record.checks) == (60, 1)


def test_a_history_item_with_details_settles_without_a_read() -> None:
    """An item that carries outputs and cost settles: nothing is left to look at."""
    item = Observed(
        observation=seen(
            Source.HISTORY, RunStatus.COMPLETED, at=9, outputs=(PICTURE,), charged_cost=Decimal(1)
        )
    )
    record = after([started(), item])
    assert (record.tracking, record.ended_via) == (Tracking.SETTLED, Source.HISTORY)
    assert (record.next_check_at, record.checks) == (None, 0)


def test_lost_needs_five_reads_and_an_hour() -> None:
    """A run is lost only after five denials over an hour, and active again once it is shown."""
    many_but_quick = after([started(), *(denied(at=30 + n) for n in range(9))])
    assert many_but_quick.tracking is Tracking.ACTIVE
    few_but_long = after([started(), *(denied(at=30 + 1800 * n) for n in range(4))])
    assert few_but_long.tracking is Tracking.ACTIVE
    lost = after([denied(at=7300)], few_but_long)
    assert (lost.tracking, lost.next_check_at) == (
        Tracking.LOST,
        START + timedelta(seconds=7300, days=1),
    )
    again = after([denied(at=7300 + 86_400)], lost)
    assert (again.tracking, again.next_check_at) == (
        Tracking.LOST,
        START + timedelta(seconds=7300, days=2),
    )
    found = after([Observed(observation=seen(Source.HISTORY, RunStatus.RUNNING, at=7400))], lost)
    assert found.tracking is Tracking.ACTIVE
    assert found.next_check_at is not None


def test_a_observation_between_denials_starts_the_count_anew() -> None:
    """Denials count only in a row."""
    record = after(
        [
            started(),
            *(denied(at=1000 * n) for n in range(1, 5)),
            polled(RunStatus.RUNNING, at=4500),
            denied(at=5000),
        ]
    )
    assert (record.tracking, record.missing) == (Tracking.ACTIVE, 1)


def test_a_failed_read_is_counted_and_kept() -> None:
    """A read that failed is counted, says why in `last_error`, and is tried again later."""
    failed = FailedRead(
        run_id="run_1", at=START + timedelta(seconds=30), error="FLORA answered 503"
    )
    record = after([started(), failed])
    assert (record.checks, record.last_error) == (1, "FLORA answered 503")
    assert 34 <= seconds(record.next_check_at) <= 35
    assert after([polled(RunStatus.RUNNING, at=35)], record).last_error is None


def test_a_tracked_run_is_read_at_once() -> None:
    """What someone says of a run is not believed: it is due the moment it is tracked."""
    record = after([Observed(observation=seen(Source.TRACK, at=3))])
    assert (record.source, seconds(record.next_check_at)) == (Source.TRACK, 3)


def test_only_the_holder_of_a_claim_gives_it_back() -> None:
    """A observation made under another claim, or under none, leaves the lease alone."""
    held = replace(after([started()]), lease_holder="w1", lease_until=START)
    other = Observed(observation=seen(Source.POLL, at=1), claim="w2")
    mine = Observed(observation=seen(Source.POLL, at=1), claim="w1")
    assert after([other], held).lease_holder == "w1"
    assert after([mine], held).lease_holder is None


def test_an_unseen_run_that_nobody_tracks_is_nothing() -> None:
    """A denial of a run that is not in the database creates none."""
    assert apply(None, denied(at=1), policy=POLICY, durations_of=unknown_durations) is None


@given(st.lists(observations(), min_size=1, max_size=8))
def test_every_unsettled_run_has_a_next_poll(observed: list[Observation]) -> None:
    """Whatever is seen in whatever order, a run is settled or has a time at which it is read."""
    record = after([Observed(observation=observation) for observation in observed])
    assert (record.next_check_at is None) is (record.tracking is Tracking.SETTLED)
    assert (record.settled_at is not None) is (record.tracking is Tracking.SETTLED)
    assert (record.ended_via is not None) is record.run.precedence.ended


@pytest.mark.parametrize(
    ("durations", "callback_expected", "wait"),
    [
        (None, True, 30),
        (Durations(count=19, p50=100, p95=120), True, 30),
        (Durations(count=20, p50=100, p95=120), True, 125),
        (Durations(count=20, p50=1000, p95=2000), True, 300),
        (Durations(count=20, p50=0.1, p95=0.2), True, 5.2),
        (Durations(count=20, p50=20, p95=90), False, 20),
        (Durations(count=20, p50=900, p95=999), False, 50),
        (Durations(count=20, p50=0, p95=0), False, 0.5),
    ],
)
def test_what_is_learned_moves_the_first_poll(
    durations: Durations | None, callback_expected: bool, wait: float
) -> None:
    """Twenty ended runs of a technique move the first look, by a factor of ten at most."""
    learned = first_wait(
        POLICY,
        learned_wait(durations, callback_expected=callback_expected),
        callback_expected=callback_expected,
    )
    assert learned.total_seconds() == pytest.approx(wait)


def test_jitter_drifts_runs_apart_and_repeats() -> None:
    """Runs polled together spread over a fifth of the wait; the same question answers alike."""
    waits = {wait_after(POLICY, f"run_{n}", 4).total_seconds() for n in range(50)}
    assert len(waits) == 50
    assert all(32 <= wait <= 40 for wait in waits)
    assert wait_after(POLICY, "run_1", 4) == wait_after(POLICY, "run_1", 4)


def test_flora_s_clock_does_not_move_the_first_poll() -> None:
    """A run that FLORA says was created tomorrow is first polled as any other."""
    tomorrow = replace(started().observation, created_at=START + timedelta(days=1))
    record = after([Observed(observation=tomorrow, callback_expected=True)])
    assert seconds(record.next_check_at) == 30


def billed(source: Source, at: float, *, reads: int = 0, **shown: object) -> Observed:
    """A read of the completed run, with its outputs."""
    facts = {"outputs": (PICTURE,), "completed_at": START} | shown
    return Observed(observation=seen(source, RunStatus.COMPLETED, at=at, **facts), reads=reads)


def test_a_cost_is_final_once_it_was_read_long_enough_after_the_end() -> None:
    """A minute, as the settings say: what was read before may still change, listed or single."""
    record = after([started(), billed(Source.POLL, 59, reads=1, charged_cost=Decimal(1))])
    assert (record.cost_final, record.tracking) == (False, Tracking.SETTLED)
    assert seconds(record.recheck_at) == 60
    listed = billed(Source.HISTORY, 60, charged_cost=Decimal(2))
    record = after([listed], record)
    assert (record.cost_final, record.recheck_at) == (True, None)
    assert record.run.charged_cost == Decimal(2)


def test_a_failed_run_with_a_cost_is_read_until_it_is_refunded() -> None:
    """FLORA may refund it late, after a cost that looks final."""

    def read(at: float, **shown: object) -> Observed:
        return polled(RunStatus.FAILED, at=at, completed_at=START, **shown)

    record = after([started(), read(70, charged_cost=Decimal(1))])
    assert (record.cost_final, seconds(record.recheck_at)) == (True, 200)
    record = after([read(200)], record)
    assert (record.cost_final, record.run.charged_cost, record.recheck_at) == (True, None, None)


def test_a_read_without_a_cost_makes_no_earlier_cost_final() -> None:
    """FLORA may leave it out: only a read that shows the cost, late enough, is the last."""
    record = after([started(), billed(Source.POLL, 10, reads=1, charged_cost=Decimal(1))])
    record = after([billed(Source.POLL, 100, reads=1)], record)
    assert (record.cost_final, record.run.charged_cost) == (False, Decimal(1))
    assert record.recheck_at is not None


def test_a_cost_that_was_read_again_outdates_what_was_read_in_between() -> None:
    """A page that was asked for before the second read, and came after it."""
    reads = [billed(Source.POLL, at, reads=1, charged_cost=Decimal(1)) for at in (10, 30)]
    asked = START + timedelta(seconds=20)
    between = billed(Source.HISTORY, 40, charged_cost=Decimal(2), sent_at=asked)
    record = after([started(), *reads, between])
    assert (record.run.charged_cost, seconds(record.run.cost_read_at)) == (Decimal(1), 30)


def test_a_callback_that_came_before_the_end_makes_no_cost_final() -> None:
    """The wait counts from FLORA's time of the end: a failed run still shows its quote then."""
    failed = {"charged_cost": Decimal(1), "completed_at": START + timedelta(seconds=70)}
    listed = Observed(observation=seen(Source.HISTORY, RunStatus.FAILED, at=71, **failed))
    record = after([started(), callback(RunStatus.FAILED, at=5), listed])
    assert (record.cost_final, seconds(record.recheck_at)) == (False, 130)


def test_rechecks_wait_twice_as_long_each_time_until_they_are_given_up() -> None:
    """A cost that never comes: 60 s after the end, then 120 s later, 240 s, … for a day."""
    record = after([started(), billed(Source.POLL, 10, reads=1)])
    times = []
    while record.recheck_at is not None:
        times.append(seconds(record.recheck_at))
        record = after([billed(Source.POLL, times[-1], reads=1)], record)
    assert times[:5] == [60, 180, 420, 900, 1860]
    assert times[-1] == 86_400
    assert (record.cost_final, record.run.charged_cost, record.tracking) == (
        *(False, None, Tracking.SETTLED),
    )


def test_a_page_read_for_others_puts_no_recheck_off() -> None:
    """It may leave costs out, so that it says nothing about when to look again."""
    record = after([started(), billed(Source.POLL, 10, reads=1)])
    assert seconds(after([billed(Source.HISTORY, 70)], record).recheck_at) == 60


def test_a_recheck_that_fails_is_tried_again_later() -> None:
    """FLORA gave no answer: the next wait is as long as after an answer without a cost."""
    record = after([started(), billed(Source.POLL, 10, reads=1)])
    failed = FailedRead(
        run_id="run_1", at=START + timedelta(seconds=60), error="FLORA answered 503"
    )
    record = after([failed], record)
    assert seconds(record.recheck_at) == 180
    assert (record.tracking, record.last_error) == (Tracking.SETTLED, None)


def test_a_final_bill_that_is_shown_again_changes_nothing() -> None:
    """Not even the object, so that a sweep writes nothing; another cost is taken all the same."""
    record = after([started(), billed(Source.POLL, 61, reads=1, charged_cost=Decimal(1))])
    again = billed(Source.HISTORY, 3600, charged_cost=Decimal(1))
    assert after([again], record) is record
    lower = after([billed(Source.HISTORY, 3600, charged_cost=Decimal("0.5"))], record)
    assert lower.run.charged_cost == Decimal("0.5")


@given(st.lists(observations(), min_size=1, max_size=6))
def test_only_what_is_settled_is_read_again(observed: list[Observation]) -> None:
    """Whatever is seen, a recheck is due only of a settled run that lacks something."""
    record = after([Observed(observation=observation) for observation in observed])
    if record.recheck_at is not None:
        assert record.run.settled
        assert not record.billed_whole
    if record.cost_final:
        assert record.run.charged_cost is not None or record.run.status is RunStatus.FAILED


@pytest.mark.parametrize("cut", [0.0, 0.9, 20.0])
@pytest.mark.parametrize("skew", [-86_400.0, -1200.0, 1200.0])
def test_clocks_that_disagree_make_no_bill_final_too_early(skew: float, cut: float) -> None:
    """How long ago the run ended is told by FLORA's clock: ours may be hours off. Of its `Date` a
    part of a second is cut, and the time of the answer is missing."""
    end = START + timedelta(seconds=skew)  # as FLORA's clock has it

    def read(at: float, cost: int) -> Observed:
        facts = {"completed_at": end, "clock_skew": skew - cut, "charged_cost": Decimal(cost)}
        return billed(Source.POLL, at, reads=1, **facts)

    record = after([started(), read(1, 1)])
    assert (record.cost_final, seconds(record.recheck_at)) == (False, 60 + min(cut, 1))
    record = after([read(60 + cut, 2)], record)
    assert (record.cost_final, record.run.charged_cost) == (True, Decimal(2))


@pytest.mark.parametrize("off", [-86_400.0, 86_400.0])
def test_an_end_that_no_clock_has_ends_the_rechecks_all_the_same(off: float) -> None:
    """FLORA dates it before the run, or in what is the future for its own clock."""
    facts = {"created_at": START, "completed_at": START + timedelta(seconds=off)}
    early = billed(Source.POLL, 1, reads=1, charged_cost=Decimal(1), **facts)
    record = after([started(), early])
    assert not record.cost_final
    record = after([billed(Source.POLL, 62, reads=1, charged_cost=Decimal(2), **facts)], record)
    assert (record.cost_final, record.run.charged_cost) == (True, Decimal(2))


def test_a_clock_of_flora_by_which_the_run_goes_on_delays_no_final_cost() -> None:
    """It is an hour behind the end that FLORA names."""
    facts = {"completed_at": START, "clock_skew": -3600.0, "charged_cost": Decimal(1)}
    record = after([started(), billed(Source.POLL, 62, reads=1, **facts)])
    assert (record.cost_final, record.recheck_at) == (True, None)


@pytest.mark.parametrize("polls", [0, 1, 20])
@pytest.mark.parametrize("known", [None, Durations(count=50, p50=3000, p95=9000)])
def test_no_poll_lies_further_ahead_than_the_longest_wait(
    polls: int, known: Durations | None
) -> None:
    """Also where the clock was set back, so that the run was first seen in what is the future."""
    policy = Policy()
    for ahead in (timedelta(), timedelta(hours=6)):
        due = next_poll(
            RunState(run_id="run_1"),
            policy=policy,
            now=START,
            first_seen=START + ahead,
            polls=polls,
            callback_expected=True,
            durations=known,
        )
        assert due is not None
        assert START <= due.at <= START + policy.longest_wait


def test_a_link_that_was_read_for_its_run_replaces_the_one_before() -> None:
    """Whatever differs, in either order. A page that was read for other runs does not write a run
    again for the queries of its links, which may be signatures."""
    first, second = (
        polled(
            RunStatus.COMPLETED,
            at=at,
            completed_at=START,
            charged_cost=Decimal(1),
            outputs=(replace(PICTURE, url=f"{PICTURE.url}?signature={at}"),),
        )
        for at in (7200, 9000)
    )
    settled = after([started(), first])
    assert settled.cost_final
    assert after([second], settled).run.outputs == second.observation.outputs
    assert after([started(), second, first]).run.outputs == second.observation.outputs
    assert after([replace(second, reads=0, incidental=True)], settled) is settled
