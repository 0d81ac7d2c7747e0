"""Which events a change of a run causes, and when a failed attempt is repeated."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from tracker.core.events import (
    WAITS,
    EventType,
    RunFilter,
    event_id,
    events_between,
    next_attempt,
    still_holds,
)
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import Details, Output, Precedence, RunError, RunState

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ACTIVE = Record(run=RunState(run_id="run_1"), source=Source.START, first_seen_at=NOW)
LOST = replace(ACTIVE, lost=True)


def settled(cost: str | None = None, **more: object) -> Record:
    """A settled record with this bill."""
    charged = None if cost is None else Decimal(cost)
    run = replace(
        ACTIVE.run, precedence=Precedence.COMPLETED, details=Details.READ, charged_cost=charged
    )
    return replace(ACTIVE, run=run, **more)  # type: ignore[arg-type]


def with_outputs(count: int, url: str = "link") -> Record:
    """A settled record with so many outputs."""
    record = settled()
    outputs = tuple(Output(f"out_{number}", "imageUrl", url) for number in range(count))
    return replace(record, run=replace(record.run, outputs=outputs))


def failed(code: str) -> Record:
    """A settled record of a failed run."""
    record = settled()
    error = RunError(code)
    return replace(record, run=replace(record.run, precedence=Precedence.FAILED, error=error))


def test_only_real_changes_are_events() -> None:
    """A run is settled, lost, or billed otherwise; everything else is no event."""
    settles, loses, costs = EventType.SETTLED, EventType.LOST, EventType.COST_CHANGED
    for before, after, events in (
        (None, ACTIVE, []),
        (None, settled("0.1"), [settles]),
        (ACTIVE, ACTIVE, []),
        (ACTIVE, settled(), [settles]),
        (ACTIVE, LOST, [loses]),
        (LOST, ACTIVE, []),
        (LOST, settled(), [settles]),
        (settled("0.1"), ACTIVE, []),
        (settled("0.1"), settled("0.10", checks=7), []),
        (settled("0.1"), settled("0.1000000000000000001"), []),
        (settled(), settled("0.1"), [costs]),
        (settled("0.1"), settled(), [costs]),
        (settled("0.1"), settled("0.2"), [costs]),
        (settled(), with_outputs(1), [settles]),
        (with_outputs(1), with_outputs(2), [settles]),
        (with_outputs(2), with_outputs(1), []),  # they are back with the next read
        (with_outputs(1), with_outputs(1, "new"), []),
        (failed("a"), failed("b"), [settles]),
        (failed("a"), settled("0.1"), [settles, costs]),
        (settled(), settled(tags={"a": "b"}), [settles]),
        (ACTIVE, replace(ACTIVE, tags={"a": "b"}), []),
    ):
        assert events_between(before, after) == events, (before, after)
        assert all(still_holds(event, after) for event in events)
        assert not any(still_holds(event, ACTIVE) for event in events)


def test_a_run_that_is_settled_is_one_event_while_it_reports_the_same() -> None:
    """Tags, the bill and new links leave its identity alone; another end, other outputs and being
    settled anew do not. Each loss and each bill is an event of its own."""
    first = settled("0.1", settled_at=NOW)
    told = event_id(EventType.SETTLED, first)
    for same in (settled("0.2", settled_at=NOW, tags={"a": "b"}), replace(first, checks=3)):
        assert event_id(EventType.SETTLED, same) == told
    for other in (
        replace(first, settled_at=NOW + timedelta(seconds=1)),
        replace(with_outputs(1), settled_at=NOW),
        replace(failed("a"), settled_at=NOW),
        replace(first, run=replace(first.run, run_id="run_2")),
    ):
        assert event_id(EventType.SETTLED, other) != told
    for kind in (EventType.LOST, EventType.COST_CHANGED):
        assert event_id(kind, first) != event_id(kind, first)


def test_a_filter_matches_what_it_names() -> None:
    """All fields that are set have to match; the database's form of a filter means the same."""
    run = settled()
    mine = replace(
        run,
        run=replace(run.run, workspace_id="ws_1", technique_id="tech_1"),
        tags={"team": "a=b", "n": "1"},
    )
    right = {
        "workspace_id": "ws_1",
        "technique_id": "tech_1",
        "status": "completed",
        "tag": ("team", "a=b"),
    }
    for fields in ({}, right, *({name: value} for name, value in right.items())):
        one = RunFilter(**fields)  # type: ignore[arg-type]
        assert one.matches(mine)
        assert RunFilter.from_json(one.to_json()) == one
    for name in right:
        wrong = right | {name: ("team", "b") if name == "tag" else "other"}
        assert not RunFilter(**wrong).matches(mine)  # type: ignore[arg-type]
    assert not RunFilter(tag=("team", "a")).matches(run)


def test_failures_wait_by_the_schedule() -> None:
    """Ten attempts over three days: after 5 s, 5 min, 30 min, … 24 h, up to a tenth later."""
    first = now = NOW
    waits = []
    while (following := next_attempt("msg_1", since=first, now=now)) is not None:
        waits.append(following - now)
        now = following
    assert len(waits) == len(WAITS)
    for wait, planned in zip(waits, WAITS, strict=True):
        assert 0.89 * planned < wait <= 1.1 * planned
    assert timedelta(days=3) < now - first < timedelta(days=3.5)


@given(st.integers(0, 400_000), st.floats(0, 1e6) | st.none(), st.text(max_size=5))
def test_the_next_attempt_is_ahead(age: int, retry_after: float | None, message_id: str) -> None:
    """It is at least 5 s and what the endpoint asked for ahead, of which an hour counts."""
    now = NOW + timedelta(seconds=age)
    due = next_attempt(message_id, since=NOW, now=now, retry_after=retry_after)
    if due is None:
        assert age > (sum(WAITS, timedelta()) - WAITS[0]).total_seconds()
        return
    wait = (due - now).total_seconds()
    assert wait >= max(5, min(retry_after or 0, 3600))
    assert due == next_attempt(message_id, since=NOW, now=now, retry_after=retry_after)


def test_messages_spread_out() -> None:
    """What failed at one moment is not repeated at one moment."""
    due = {next_attempt(f"msg_{n}", since=NOW, now=NOW + timedelta(minutes=1)) for n in range(100)}
    assert len(due) > 90
