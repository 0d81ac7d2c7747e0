"""The merge is a join: proved over permutations, then pinned by example."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import reduce
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.strategies import START, observations
from tracker.core.observation import Observation, Source, merge
from tracker.core.run import (
    Details,
    Output,
    Precedence,
    RunError,
    RunState,
    RunStatus,
    Status,
)

PICTURE = Output("output_1", "imageUrl", "https://media.example/1.png")


def merged(seen: Iterable[Observation]) -> RunState:
    run = reduce(merge, seen, None)
    assert run is not None
    return run


def observe(source: Source, status: Status, **shown: object) -> Observation:
    return Observation(run_id="run_1", source=source, status=status, at=START, **shown)  # type: ignore[arg-type]


@given(st.lists(observations(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_order_never_matters(seen: list[Observation], random: Random) -> None:
    """Any permutation of any observations, contradictory ones too, gives the same run."""
    shuffled = list(seen)
    random.shuffle(shuffled)
    assert merged(shuffled) == merged(seen)


@given(
    st.lists(observations(), min_size=1, max_size=5),
    st.lists(st.integers(min_value=0, max_value=4), max_size=5),
)
def test_repetition_never_matters(seen: list[Observation], again: Sequence[int]) -> None:
    """Seeing anything a second time, however late, changes nothing: not even the object."""
    run = merged(seen)
    for position in again:
        assert merge(run, seen[position % len(seen)]) is run


@given(st.lists(observations(), min_size=2, max_size=6))
def test_only_news_is_needed(seen: list[Observation]) -> None:
    """Folding only the observations that changed something gives the same run."""
    run, news = None, []
    for observation in seen:
        after = merge(run, observation)
        if after is not run:
            news.append(observation)
        run = after
    assert merged(news or seen[:1]) == run


@given(st.lists(observations(), min_size=1, max_size=5), observations())
def test_a_run_never_falls_back(seen: list[Observation], late: Observation) -> None:
    """Nothing that arrives later lowers status or progress, or empties what is known."""
    before = merged(seen)
    after = merge(before, late)
    assert after.precedence >= before.precedence
    assert after.progress >= before.progress
    assert after.conflict >= before.conflict
    for register in ("outputs", "quoted_cost", "started_at", "completed_at", "created_at"):
        assert getattr(before, register) is None or getattr(after, register) is not None


@given(observations())
def test_an_observation_survives_its_json(seen: Observation) -> None:
    """What stands in `run_events.detail` reads back as the observation that was seen, also where a
    newer version stored more of it."""
    stored = json.loads(json.dumps(seen.to_json()))
    assert Observation.from_json(stored) == seen
    assert Observation.from_json(stored | {"mood": "fine"}) == seen


def test_a_callback_ends_a_run_without_details() -> None:
    """A callback's word ends a run, but only a read of the API settles it."""
    run = merged([observe(Source.CALLBACK, RunStatus.COMPLETED)])
    assert (run.status, run.precedence) == (RunStatus.COMPLETED, Precedence.CALLBACK_COMPLETED)
    assert not run.settled


def test_the_api_has_the_last_word() -> None:
    """Where callback and API disagree about the end, the API's stands, as a conflict."""
    callback = observe(Source.CALLBACK, RunStatus.COMPLETED)
    api = observe(Source.POLL, RunStatus.FAILED, error=RunError("model_timeout", "Too slow"))
    run = merged([callback, api])
    assert run == merged([api, callback])
    assert (run.status, run.error) == (RunStatus.FAILED, RunError("model_timeout", "Too slow"))
    assert run.conflict


def test_a_completed_run_has_no_error() -> None:
    """A callback's error is dropped once the API says that the run completed."""
    callback = observe(Source.CALLBACK, RunStatus.FAILED, error=RunError("provider_error"))
    run = merged([callback, observe(Source.POLL, RunStatus.COMPLETED, outputs=(PICTURE,))])
    assert (run.status, run.error, run.conflict) == (RunStatus.COMPLETED, None, True)


def test_completed_beats_failed_between_equals() -> None:
    """Two reads that disagree about the end: completed stands, in either order, as a conflict."""
    failed = observe(Source.POLL, RunStatus.FAILED)
    completed = observe(Source.HISTORY, RunStatus.COMPLETED, charged_cost=LATER_BILL, sent_at=SOON)
    for order in ([failed, completed], [completed, failed]):
        run = merged(order)
        assert (run.status, run.charged_cost) == (RunStatus.COMPLETED, Decimal("0.5"))
        assert run.conflict


def test_a_status_that_is_not_known_is_kept_as_it_is() -> None:
    """It counts as running, or with a time of its end as an end that one read settles, below
    failed; what is documented stands above it."""
    queued, running = (observe(Source.POLL, each) for each in ("queued", RunStatus.RUNNING))
    error = RunError("GENERATION_CANCELLED", "by a person")
    cancelled = observe(Source.POLL, "cancelled", completed_at=START, error=error)
    listed = observe(Source.HISTORY, "cancelled", completed_at=START)
    assert (merged([queued]).status, merged([queued]).precedence) == ("queued", Precedence.RUNNING)
    assert merged([running, queued]).status is merged([queued, running]).status is RunStatus.RUNNING
    assert merged([cancelled, running]).status == merged([running, cancelled]).status == "cancelled"
    run = merged([queued, cancelled])
    assert (run.status, run.error, run.settled, run.conflict) == ("cancelled", error, True, False)
    assert not merged([listed]).settled
    failed = merged([cancelled, observe(Source.POLL, RunStatus.FAILED)])
    assert (failed.status, failed.conflict) == (RunStatus.FAILED, True)
    assert Observation.from_json(cancelled.to_json()) == cancelled


@pytest.mark.parametrize(
    ("source", "status"),
    [(Source.POLL, RunStatus.RUNNING), (Source.CALLBACK, RunStatus.COMPLETED)],
)
def test_only_a_failed_run_has_an_error(source: Source, status: RunStatus) -> None:
    """FLORA's examples carry error fields on runs that have not failed."""
    assert merged([observe(source, status, error=RunError("provider_error"))]).error is None


QUOTE, BILL, LATER_BILL = Decimal("0.253"), Decimal("0.873"), Decimal("0.5")
SOON, LATE = START + timedelta(seconds=1), START + timedelta(seconds=61)


@given(
    st.lists(
        st.builds(
            lambda source, status, cost, sent_at, outputs: observe(
                source, status, charged_cost=cost, sent_at=sent_at, outputs=outputs
            ),
            st.sampled_from([Source.START, Source.POLL, Source.HISTORY]),
            st.sampled_from([RunStatus.RUNNING, RunStatus.COMPLETED, RunStatus.FAILED]),
            st.sampled_from([None, Decimal(0), QUOTE, BILL, LATER_BILL]),
            st.sampled_from([None, START, SOON, LATE]),
            st.sampled_from([None, (), (PICTURE,)]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_the_latest_bill_counts_in_any_order(seen: list[Observation], random: Random) -> None:
    """With quotes, lists, reads and refunds mixed: the bill is what the latest read of the ended
    run showed, of two at once the single read, then the greater; the quote is the greatest."""
    shuffled = list(seen)
    random.shuffle(shuffled)
    run = merged(shuffled)
    assert run == merged(seen)
    reads = [one for one in seen if one.source is not Source.START and one.precedence.ended]
    bills = [one for one in reads if one.charged_cost is not None or one.status is RunStatus.FAILED]
    bill = max(bills, key=_lateness, default=None)
    assert run.charged_cost == (bill and bill.charged_cost)
    assert run.cost_read_at == (bill and (bill.sent_at or bill.at))
    quotes = [one.charged_cost for one in seen if one not in reads and one.charged_cost is not None]
    assert run.quoted_cost == max(quotes, default=None)


def _lateness(one: Observation) -> tuple[object, ...]:
    shown = one.charged_cost is not None
    return (one.sent_at or one.at, one.source is Source.POLL, shown, one.charged_cost or 0)


def test_a_quote_is_never_a_bill() -> None:
    """What a start or a running run shows is a quote, and a bill that differs is no conflict."""
    start = observe(Source.START, RunStatus.PENDING, charged_cost=QUOTE)
    running = observe(Source.HISTORY, RunStatus.RUNNING, charged_cost=Decimal(0))
    end = observe(Source.POLL, RunStatus.COMPLETED)
    billed = observe(Source.HISTORY, RunStatus.COMPLETED, charged_cost=BILL, sent_at=LATE)
    for order in ([start, running, end], [end, running, start]):
        run = merged(order)
        assert (run.quoted_cost, run.charged_cost) == (QUOTE, None)
        run = merge(run, billed)
        assert (run.quoted_cost, run.charged_cost, run.conflict) == (QUOTE, BILL, False)
    assert run.cost_read_at == LATE


def test_a_replayed_start_shows_a_quote() -> None:
    """A start that FLORA answers again shows an old cost, even where it says that the run ended."""
    run = merged(
        [observe(Source.START, RunStatus.COMPLETED, charged_cost=QUOTE, outputs=(PICTURE,))]
    )
    assert (run.quoted_cost, run.charged_cost, run.outputs) == (QUOTE, None, (PICTURE,))


@pytest.mark.parametrize("source", [Source.POLL, Source.HISTORY])
def test_a_later_read_lowers_a_cost(source: Source) -> None:
    """A bill that FLORA corrects downwards is seen, single or listed, in whatever order."""
    first = observe(Source.POLL, RunStatus.COMPLETED, charged_cost=BILL, sent_at=SOON)
    later = observe(source, RunStatus.COMPLETED, charged_cost=LATER_BILL, sent_at=LATE)
    assert merged([first, later]).charged_cost == merged([later, first]).charged_cost == LATER_BILL
    assert not merged([first, later]).conflict


def test_a_refund_clears_the_cost_of_a_failed_run() -> None:
    """A failed run that a later read shows without a cost was billed nothing."""
    failed = observe(Source.POLL, RunStatus.FAILED, charged_cost=QUOTE, sent_at=SOON)
    refunded = observe(Source.HISTORY, RunStatus.FAILED, sent_at=LATE)
    for order in ([failed, refunded], [refunded, failed]):
        run = merged(order)
        assert (run.charged_cost, run.cost_read_at, run.quoted_cost) == (None, LATE, None)


def test_a_completed_read_without_a_cost_takes_none_away() -> None:
    """Of a completed run a cost that is absent says nothing: it may not be billed yet."""
    billed = observe(Source.POLL, RunStatus.COMPLETED, charged_cost=BILL, sent_at=SOON)
    run = merged([billed, observe(Source.POLL, RunStatus.COMPLETED, sent_at=LATE)])
    assert (run.charged_cost, run.cost_read_at) == (BILL, SOON)


def test_links_signed_anew_replace_older_ones() -> None:
    """The links of the latest read are kept, however they compare, and in any order."""
    older = Output("output_1", "imageUrl", PICTURE.url + "?sig=9")
    newer = Output("output_1", "imageUrl", PICTURE.url + "?sig=1")
    one = observe(Source.POLL, RunStatus.COMPLETED, outputs=(older,), sent_at=SOON)
    two = observe(Source.HISTORY, RunStatus.COMPLETED, outputs=(newer,), sent_at=LATE)
    for order in ([one, two], [two, one]):
        run = merged(order)
        assert (run.outputs, run.outputs_read_at, run.conflict) == ((newer,), LATE, False)


def test_of_two_reads_at_once_the_single_one_has_the_outputs() -> None:
    """However they compare; and of runs in progress those that are further."""
    greater = (replace(PICTURE, url=PICTURE.url + "?sig=9"),)
    for less, more in [
        ((Source.HISTORY, RunStatus.COMPLETED), (Source.POLL, RunStatus.COMPLETED)),
        ((Source.START, RunStatus.PENDING), (Source.POLL, RunStatus.RUNNING)),
    ]:
        one, two = observe(*less, outputs=greater), observe(*more, outputs=(PICTURE,))
        for order in ([one, two], [two, one]):
            assert merged(order).outputs == (PICTURE,)


def test_a_stale_page_empties_nothing() -> None:
    """A history item that leaves its outputs out takes none away."""
    end = observe(
        Source.POLL, RunStatus.COMPLETED, outputs=(PICTURE,), charged_cost=Decimal("0.25")
    )
    for stale in (
        observe(Source.HISTORY, RunStatus.COMPLETED, outputs=()),
        observe(Source.HISTORY, RunStatus.RUNNING, progress=40.0),
    ):
        run = merged([end, stale])
        assert run.outputs == (PICTURE,)
        assert run.settled
        assert not run.conflict


@pytest.mark.parametrize(
    ("status", "shown", "settles"),
    [
        (RunStatus.FAILED, {}, True),
        (RunStatus.COMPLETED, {"outputs": (PICTURE,), "charged_cost": Decimal(0)}, True),
        (RunStatus.COMPLETED, {"outputs": (PICTURE,)}, False),
        (RunStatus.COMPLETED, {"charged_cost": Decimal(1)}, False),
        (RunStatus.RUNNING, {"outputs": (PICTURE,), "charged_cost": Decimal(0)}, False),
    ],
)
def test_which_history_items_settle(
    status: RunStatus, shown: dict[str, object], settles: bool
) -> None:
    """A history item settles a failed run, and a completed one if it has both outputs and cost."""
    assert merged([observe(Source.HISTORY, status, **shown)]).settled is settles


def test_a_single_read_settles_always() -> None:
    """A single read of an ended run settles it, even where it shows no outputs and no cost."""
    assert merged([observe(Source.POLL, RunStatus.COMPLETED)]).details is Details.READ


def test_a_contradiction_after_settling_is_read_again() -> None:
    """A failed item settles; a completed one without details unsettles until it is read."""
    run = merged(
        [observe(Source.HISTORY, RunStatus.FAILED), observe(Source.HISTORY, RunStatus.COMPLETED)]
    )
    assert run.status is RunStatus.COMPLETED
    assert not run.settled
    assert merge(run, observe(Source.POLL, RunStatus.COMPLETED)).settled


def test_times_in_seconds_and_milliseconds_agree() -> None:
    """The same moment at two precisions is no conflict, and the finer one is kept."""
    coarse = observe(Source.HISTORY, RunStatus.COMPLETED, completed_at=START)
    fine = observe(
        Source.POLL, RunStatus.COMPLETED, completed_at=START + timedelta(milliseconds=250)
    )
    run = merged([fine, coarse])
    assert run.completed_at == START + timedelta(milliseconds=250)
    assert not run.conflict


@pytest.mark.parametrize(
    "others",
    [
        (replace(PICTURE, url=PICTURE.url + "?sig=2"),),
        (replace(PICTURE, url="https://media.example/2.png"),),
        (PICTURE, Output("output_2", "text", "a second one")),
        (replace(PICTURE, output_id="output_3"),),
    ],
)
def test_other_outputs_are_no_conflict(others: tuple[Output, ...]) -> None:
    """`conflict` is about the end: of outputs the latest count, whatever an earlier read showed."""
    first = observe(Source.POLL, RunStatus.COMPLETED, outputs=(PICTURE,), sent_at=SOON)
    later = observe(Source.POLL, RunStatus.COMPLETED, outputs=others, sent_at=LATE)
    for order in ([first, later], [later, first]):
        run = merged(order)
        assert (run.outputs, run.conflict) == (others, False)


def precedence_of(run: RunState, field: str) -> Precedence:
    """The precedence of the observation that `field` has its value from."""
    return Precedence(getattr(run.precedences, field))


def test_each_value_remembers_its_rank() -> None:
    """A value from a higher observation replaces one from a lower, however the two compare."""
    start = observe(Source.START, RunStatus.PENDING, technique_id="tech_z", created_at=START)
    end = observe(Source.HISTORY, RunStatus.COMPLETED, technique_id="tech_a")
    run = merged([end, start])
    assert run.technique_id == "tech_a"
    assert precedence_of(run, "technique_id") is Precedence.COMPLETED
    assert precedence_of(run, "created_at") is Precedence.PENDING


@pytest.mark.parametrize("source", [Source.CALLBACK, Source.TRACK])
def test_flora_shows_whose_a_run_is(source: Source) -> None:
    """A run that still runs at FLORA is of the workspace whose key showed it, whatever a callback
    or a person claimed, before or after."""
    claim = observe(source, RunStatus.COMPLETED, workspace_id="ws_z")
    shown = observe(Source.HISTORY, RunStatus.RUNNING, workspace_id="ws_a")
    assert not merged([claim]).workspace_is_confirmed
    for seen in ([claim, shown], [shown, claim]):
        run = merged(seen)
        assert (run.workspace_id, run.workspace_is_confirmed) == ("ws_a", True)


def test_two_runs_never_merge() -> None:
    """A observation of another run is refused, not joined."""
    with pytest.raises(ValueError, match="run_2"):
        merge(RunState(run_id="run_2"), observe(Source.POLL, RunStatus.RUNNING))
