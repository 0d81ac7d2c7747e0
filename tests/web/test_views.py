"""What a run looks like from outside."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from tracker.core.formatting import iso_time
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import Output, Precedence, RunError, RunState
from tracker.store.queries.runs import TimelineEvent
from tracker.store.schema import run_events, run_outputs, runs
from tracker.views import event_json, number_json, run_json
from tracker.web.http.responses import Json

AT = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
EMPTY = Record(run=RunState(run_id="run_1"), source=Source.CALLBACK, first_seen_at=AT)
FULL = Record(
    run=RunState(
        run_id="run_2",
        precedence=Precedence.FAILED,
        progress=62.5,
        charged_cost=Decimal("0.123456"),
        created_at=AT - timedelta(seconds=5),
        error=RunError("model_timeout", "took too long"),
        outputs=(Output("a", "text", "the text itself"), Output("b", "imageUrl", "https://x/y")),
    ),
    source=Source.START,
    first_seen_at=AT,
    ended_via=Source.POLL,
    inputs=[{"id": "prompt", "type": "text", "value": "tools"}],
)


def test_a_run_has_the_columns_that_are_public_and_its_outputs() -> None:
    """Every name of the view is one of the table's, but `outputs`."""
    names = set(run_json(EMPTY))
    assert names == set(run_json(FULL))
    assert names - {"outputs"} <= set(runs.columns.keys())
    assert set(run_json(FULL)["outputs"][0]) | {"run_id"} == set(run_outputs.columns.keys())


def test_what_is_known_is_shown_as_plain_values() -> None:
    """States as their words, times with Z, cost as a number, outputs in order."""
    shown = run_json(FULL)
    assert shown["status"] == "failed"
    assert shown["created_at"] == "2026-07-01T11:59:55.000000Z"
    assert shown["charged_cost"] == 0.123456
    assert (shown["error_code"], shown["error_message"]) == ("model_timeout", "took too long")
    assert (shown["source"], shown["ended_via"]) == ("start", "poll")
    assert [output["position"] for output in shown["outputs"]] == [0, 1]
    assert shown["outputs"][0]["url"] == "the text itself"


def test_what_is_not_known_is_null() -> None:
    """Only a creation time is always there: until FLORA's is known, when the run was first seen."""
    shown = run_json(EMPTY)
    assert shown["created_at"] == shown["first_seen_at"] == "2026-07-01T12:00:00.000000Z"
    assert shown["progress"] == 0
    assert shown["outputs"] == []
    unknown = ("charged_cost", "error_code", "completed_at", "ended_via", "inputs", "settled_at")
    assert {shown[name] for name in unknown} == {None}
    blank = replace(FULL, run=replace(FULL.run, error=RunError()))
    assert run_json(blank)["error_code"] is None


def test_an_event_has_its_public_columns() -> None:
    """The timeline shows what was seen, whole."""
    event = TimelineEvent(
        id=7,
        run_id="run_1",
        at=AT,
        source=Source.POLL,
        status="running",
        progress=50.0,
        detail={"a": 1},
    )
    shown = event_json(event)
    assert set(shown) == set(run_events.columns.keys())
    assert shown == {
        "id": 7,
        "run_id": "run_1",
        "at": "2026-07-01T12:00:00.000000Z",
        "source": "poll",
        "status": "running",
        "progress": 50,
        "detail": {"a": 1},
    }


def test_times_sort_as_text() -> None:
    """Whatever their zone and fraction."""
    east = timezone(timedelta(hours=9))
    times = [AT, AT + timedelta(microseconds=1), (AT + timedelta(seconds=1)).astimezone(east)]
    assert sorted(map(iso_time, times)) == list(map(iso_time, times))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, None), (100.0, 100), (99.5, 99.5), (Decimal("0"), 0), (1e300, 1e300)],
)
def test_numbers_are_shown_as_people_write_them(value: float | None, shown: float | None) -> None:
    """A whole number has no fraction."""
    assert (number_json(value), type(number_json(value))) == (shown, type(shown))


def test_text_that_utf8_cannot_hold_is_still_answered() -> None:
    """Other people's text never makes an answer impossible."""
    assert Json({"a": "\ud800"}).body == b'{"a":"\\ud800"}'
