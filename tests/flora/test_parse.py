"""FLORA's words in ours: what is read, what is passed over, and what cannot be done without."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.core.errors import (
    FieldFault,
    FloraRefusal,
    FloraUnreadable,
    Forbidden,
    KeyRefused,
    NotFound,
    RateLimited,
    ServerFault,
)
from tracker.core.observation import Observation, Source, merge
from tracker.core.record import Delivery
from tracker.core.run import Output, RunError, RunStatus
from tracker.core.starts import Port
from tracker.flora import parse
from tracker.flora.callback import delivery_of, observation_of
from tracker.flora.parse import decode, ports, technique

AT = datetime(2026, 6, 11, 12, tzinfo=UTC)
read_run = partial(parse.run, source=Source.POLL, at=AT)
read_item = partial(parse.run, source=Source.HISTORY, at=AT, run_type="technique")

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.sampled_from(["completed", "failed", "run.completed", "run_1", "", "text", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def some_of(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects in which any of these fields holds any JSON value."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, ANY_JSON))


ANY_OUTPUT = ANY_JSON | some_of("output_id", "type", "url")
ANY_RUN = ANY_JSON | st.builds(
    lambda base, odd, outputs: {**base, **odd, **outputs},
    st.sampled_from([{}, {"run_id": "run_1", "status": "completed"}]),
    some_of(
        "run_id", "status", "progress", "created_at", "started_at", "completed_at", "charged_cost",
        "error_code", "error_message", "outputs", "poll_url", "technique_run_id", "workspace_id",
        "project_id", "technique", "generation_id", "run_type", "model",
    ),
    st.fixed_dictionaries({}, optional={"outputs": st.lists(ANY_OUTPUT, max_size=3)}),
)  # fmt: skip


def test_a_whole_run() -> None:
    """Every field of a run finds its place."""
    seen = read_run(
        {
            "run_id": "run_abc123",
            "status": "completed",
            "progress": 100,
            "created_at": 1_750_000_000,
            "started_at": 1_750_000_001.5,
            "completed_at": 1_750_000_060_123,
            "charged_cost": 0.1,
            "outputs": [
                {"output_id": "a", "type": "imageUrl", "url": "https://media.test/a.png"},
                {"output_id": "b", "type": "text", "url": "two\nlines"},
                {"output_id": "c", "type": "hologramUrl", "url": "https://media.test/c", "x": 1},
            ],
            "poll_url": "https://flora.test/api/v1/techniques/tech_1/runs/run_abc123",
            "something_new": {"deep": [1, 2, 3]},
        },
        expect_run_id="run_abc123",
        technique_id="tech_1",
    )
    assert seen == Observation(
        run_id="run_abc123",
        source=Source.POLL,
        at=AT,
        status=RunStatus.COMPLETED,
        progress=100,
        technique_id="tech_1",
        poll_url="https://flora.test/api/v1/techniques/tech_1/runs/run_abc123",
        created_at=datetime.fromtimestamp(1_750_000_000, UTC),
        started_at=datetime(2025, 6, 15, 15, 6, 41, 500_000, UTC),
        completed_at=datetime(2025, 6, 15, 15, 7, 40, 123_000, UTC),
        charged_cost=Decimal("0.1"),
        outputs=(
            Output("a", "imageUrl", "https://media.test/a.png"),
            Output("b", "text", "two\nlines"),
            Output("c", "hologramUrl", "https://media.test/c"),
        ),
    )


def test_items_of_both_histories() -> None:
    """A technique's run names its technique; a generation has no technique, and its own id."""
    item = {
        "run_id": "run_1",
        "technique_run_id": "run_1",
        "status": "failed",
        "error_code": "model_timeout",
        "workspace_id": "ws_1",
        "project_id": "prj_1",
        "technique": {"technique_id": "tech_1", "name": "CCTV Cam"},
    }
    seen = read_item(item)
    assert (seen.workspace_id, seen.project_id) == ("ws_1", "prj_1")
    assert (seen.technique_id, seen.technique_name) == ("tech_1", "CCTV Cam")
    assert seen.error == RunError("model_timeout", "")
    generation = {"generation_id": "run_2", "status": "running", "model": "m"}
    made = parse.run(generation, source=Source.HISTORY, at=AT, run_type="generation")
    assert (made.run_id, made.run_type, made.technique_id) == ("run_2", "generation", None)


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (None, "not a JSON object"),
        ([], "not a JSON object"),
        ({"status": "running"}, "run_id"),
        ({"run_id": "", "status": "running"}, "run_id"),
        ({"run_id": "r" * 256, "status": "running"}, "run_id"),
        ({"run_id": 7, "status": "running"}, "run_id"),
        ({"run_id": "run_1"}, "status"),
        ({"run_id": "run_1", "status": ""}, "status"),
        ({"run_id": "run_1", "status": ["running"]}, "status"),
        ({"run_id": "run_2", "status": "running"}, "another run"),
    ],
)
def test_what_cannot_be_done_without(payload: object, named: str) -> None:
    """A run without its id or a status, or another run, is unreadable, and it says which."""
    with pytest.raises(FloraUnreadable, match=named):
        read_run(payload, expect_run_id="run_1" if "another" in named else None)


@given(payload=ANY_RUN, expected=st.none() | st.just("run_1"))
def test_any_value_in_any_field(payload: object, expected: str | None) -> None:
    """Whatever stands in a run, it is read or `FloraUnreadable`, and what is read can be stored."""
    try:
        seen = read_run(payload, expect_run_id=expected)
    except FloraUnreadable:
        return
    stored = json.loads(json.dumps(seen.to_json()))
    assert Observation.from_json(stored) == seen
    json.dumps(stored, ensure_ascii=False).encode()
    assert seen.progress is None or 0 <= seen.progress <= 100
    assert seen.charged_cost is None or seen.charged_cost >= 0
    known = merge(None, seen)
    assert merge(known, seen) is known


@pytest.mark.parametrize("odd", [True, "half", [1], {}, float("nan"), float("inf"), 10**400])
def test_odd_numbers_are_not_shown(odd: object) -> None:
    """A truth value, a text, a NaN or a monstrous number is no progress, no time and no cost."""
    fields = dict.fromkeys(["progress", "created_at", "charged_cost"], odd)
    seen = read_run({"run_id": "run_1", "status": "running", **fields})
    assert (seen.progress, seen.created_at, seen.charged_cost) == (None, None, None)


def test_a_progress_is_a_number() -> None:
    """A number as text is no progress: only costs are read from text."""
    assert read_run({"run_id": "r", "status": "running", "progress": "50"}).progress is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, None),
        (-1, None),
        (1, datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)),
        (99_999_999_999, datetime(5138, 11, 16, 9, 46, 39, tzinfo=UTC)),
        (100_000_000_000, datetime(1973, 3, 3, 9, 46, 40, tzinfo=UTC)),
        (1_750_000_000_001, datetime(2025, 6, 15, 15, 6, 40, 1_000, UTC)),
        (999_000_000_000_000, None),
    ],
)
def test_seconds_and_milliseconds(value: int, expected: datetime | None) -> None:
    """From 1e11 on a time is in milliseconds; 0 is none, and so is what no calendar holds."""
    seen = read_run({"run_id": "run_1", "status": "running", "created_at": value})
    assert seen.created_at == expected


@pytest.mark.parametrize(("value", "expected"), [(-5, 0), (0, 0), (42.5, 42.5), (250, 100)])
def test_progress_is_clamped(value: float, expected: float) -> None:
    """Progress lies between 0 and 100, whatever FLORA counts."""
    payload = {"run_id": "run_1", "status": "running", "progress": value}
    assert read_run(payload).progress == expected


def test_money_is_exact() -> None:
    """A cost keeps the digits that FLORA wrote; a negative one is not shown."""
    costs = [0.1, 0.30000000000000004, 1e-7, 12, 0]
    read = [read_run({"run_id": "r", "status": "failed", "charged_cost": c}) for c in costs]
    assert [seen.charged_cost for seen in read] == [Decimal(str(cost)) for cost in costs]
    refund = {"run_id": "r", "status": "failed", "charged_cost": -0.5}
    assert read_run(refund).charged_cost is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.05", "0.05"),
        ("12", "12"),
        ("0.30", "0.3"),
        ("0", "0"),
        *((odd, None) for odd in ("", "-0.5", "1e3", "NaN", "Infinity", ".5", "5.", " 1", "1_0")),
        *((odd, None) for odd in ("$1", "0,05", "1" * 16, "0." + "1" * 31, "\u0661", "0x1")),
    ],
)
def test_a_cost_may_be_text(text: str, expected: str | None) -> None:
    """A plain decimal number counts also where FLORA writes it as text, and nothing else does."""
    seen = read_run({"run_id": "r", "status": "completed", "charged_cost": text})
    assert seen.charged_cost == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025-06-15T15:06:40Z", datetime(2025, 6, 15, 15, 6, 40, tzinfo=UTC)),
        ("2025-06-15T17:06:40.123456+02:00", datetime(2025, 6, 15, 15, 6, 40, 123456, UTC)),
        *((odd, None) for odd in ("2025-06-15T15:06:40", "2025-06-15", "soon", "1750000000")),
        *((odd, None) for odd in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59-01:00")),
        ("0001-01-01T00:00:00+01:00", None),
    ],
)
def test_a_time_may_be_iso_8601(text: str, expected: datetime | None) -> None:
    """A time with a zone counts, as UTC; one without a zone says nothing, nor does a zero time."""
    names = ("created_at", "started_at", "completed_at")
    seen = read_run({"run_id": "r", "status": "completed", **dict.fromkeys(names, text)})
    assert {seen.created_at, seen.started_at, seen.completed_at} == {expected}


def test_what_no_database_holds_is_replaced() -> None:
    """NUL and halves of a surrogate pair become U+FFFD, in ids and in text; whole pairs stay."""
    body = rb'{"run_id":"run_\u0000","status":"failed","error_message":"cut \ud83d, \ud83d\ude00"}'
    seen = read_run(decode(body))
    assert seen.run_id == "run_\N{REPLACEMENT CHARACTER}"
    assert seen.error == RunError("", "cut \N{REPLACEMENT CHARACTER}, \N{GRINNING FACE}")


def test_outputs_that_are_none() -> None:
    """An output without its url is passed over; an empty text is an output; without a list
    there is no observation."""
    outputs = [None, {}, {"url": 7}, {"output_id": "o", "type": "text", "url": ""}, {"url": "u"}]
    seen = read_run({"run_id": "r", "status": "completed", "outputs": outputs})
    assert seen.outputs == (Output("o", "text", ""), Output("", "", "u"))
    assert read_run({"run_id": "r", "status": "completed", "outputs": {}}).outputs is None


def test_a_technique_keeps_unknown_fields() -> None:
    """A technique's inputs and outputs stay as FLORA wrote them."""
    inputs = [{"id": "p", "type": "text", "accepts_element": True, "new": [1]}, "junk"]
    read = technique({"technique_id": "tech_1", "run_cost": 0.25, "inputs": inputs})
    assert (read.name, read.description, read.run_cost) == ("tech_1", None, Decimal("0.25"))
    assert (read.inputs, read.outputs) == ((inputs[0],), ())


@given(payload=ANY_JSON | some_of("technique_id", "name", "run_cost", "inputs", "outputs"))
def test_any_technique(payload: object) -> None:
    """Whatever stands in a technique, it is read or `FloraUnreadable`."""
    with suppress(FloraUnreadable):
        assert ports(technique(payload).inputs) is not None


def test_what_a_start_has_to_know_of_an_input() -> None:
    """Marks of the wrong kind count as not given, and a duration of 0 is none."""
    full = {
        "id": "clip",
        "name": "Clip",
        "type": "videoUrl",
        "description": "A clip.",
        "specified_aspect_ratio": "16:9",
        "specified_duration": 5,
        "allow_multiple": True,
        "accepts_element": True,
        "optional": True,
    }
    odd = {"id": "b", "type": 7, "specified_duration": 0, "allow_multiple": 1, "optional": "yes"}
    assert ports([full, odd]) == (
        Port(
            id="clip",
            type="videoUrl",
            name="Clip",
            description="A clip.",
            optional=True,
            several=True,
            element=True,
            aspect_ratio="16:9",
            duration=5,
        ),
        Port(id="b"),
    )


def test_an_input_without_an_id_leaves_the_definition_unread() -> None:
    """What is understood in part must not refuse what FLORA takes."""
    assert ports([{"id": "a", "type": "text"}, {"type": "text"}]) == ()


@pytest.mark.parametrize(
    ("fields", "optional"),
    [
        ({}, False),
        ({"optional": True}, True),
        ({"required": False}, True),
        ({"required": True, "description": "Optional."}, False),
        ({"optional": False, "description": "Optional."}, False),
        ({"description": "A style (optional)."}, True),
        ({"description": "Optionally, a logo."}, True),
        ({"description": "May be left empty."}, True),
        ({"description": "Not required."}, True),
        ({"description": "This is not optional."}, False),
        ({"description": "The image on the left."}, False),
        ({"description": 5}, False),
    ],
)
def test_what_may_be_left_out(fields: dict[str, Any], optional: bool) -> None:
    """A mark decides; without one the description may say it, and silence means needed."""
    (port,) = ports([{"id": "a"} | fields])
    assert port.optional is optional


def test_a_bad_item_does_not_spoil_its_page() -> None:
    """The good items of a page are read, and the bad ones are told with their places."""
    items = [{"run_id": "run_1", "status": "running"}, 7, {"run_id": "run_3", "status": 3}]
    items.append({"run_id": None, "status": "running"})
    payload = {"technique_runs": items, "meta": {"next_cursor": "abc", "total_estimate": None}}
    page = parse.page(payload, "technique_runs", read_item)
    assert [(seen.run_id, seen.lacks_status) for seen in page.items] == [
        ("run_1", None),
        ("run_3", True),
    ]
    assert page.next_cursor == "abc"
    assert page.unreadable == {
        1: "the run is not a JSON object",
        3: "the run has no run_id",
    }


@pytest.mark.parametrize(
    "payload",
    [
        {"technique_runs": [], "meta": {"next_cursor": "abc"}},
        {"technique_runs": [{}], "meta": {"next_cursor": None}},
        {"technique_runs": [{}], "meta": {"next_cursor": ""}},
        {"technique_runs": [{}], "meta": {}},
        {"technique_runs": [{}, {}], "meta": {"next_cursor": None}},
        {"technique_runs": [{}], "meta": None},
        {"technique_runs": [{}]},
        {"technique_runs": []},
    ],
)
def test_the_last_page(payload: object) -> None:
    """A page without items or a cursor is the last, and so is one without `meta` that is not
    full."""
    assert parse.page(payload, "technique_runs", read_item, limit=2).next_cursor is None


@pytest.mark.parametrize(
    "meta",
    [
        *({}, {"meta": None}, {"meta": 7}, {"meta": [{"next_cursor": None}]}),
        *({"meta": {"next_cursor": odd}} for odd in (1.0, True, False, {"offset": 2}, ["2"])),
    ],
)
def test_a_page_that_may_not_be_the_last(meta: dict[str, object]) -> None:
    """A full page without `meta`, or any page with an odd cursor, does not end the list."""
    payload = {"technique_runs": [{}, {}], **meta}
    with pytest.raises(FloraUnreadable, match="the page"):
        parse.page(payload, "technique_runs", read_item, limit=2)


def test_a_cursor_may_be_a_number() -> None:
    """A whole number is sent back as the text that stands for it."""
    payload = {"technique_runs": [{}], "meta": {"next_cursor": 100}}
    assert parse.page(payload, "technique_runs", read_item).next_cursor == "100"


@given(payload=ANY_JSON | some_of("technique_runs", "meta"))
def test_any_page(payload: object) -> None:
    """Whatever a page holds, it is read or `FloraUnreadable`."""
    with suppress(FloraUnreadable):
        parse.page(payload, "technique_runs", read_item)


def event(**changes: Any) -> dict[str, Any]:
    data = {"run_id": "run_1", "run_type": "technique", "workspace_id": "ws_1"}
    data |= {"status": "completed"} | changes.pop("data", {})
    return {
        "id": "whd_1",
        "type": "run.completed",
        "api_version": "2026-06-11",
        "created_at": 1_750_000_000_000,
        "data": data,
    } | changes


def read_callback(value: object) -> Observation | str:
    return observation_of(json.dumps(value).encode(), at=AT)


def delivery(value: object, webhook_id: str | None = None) -> Delivery:
    return delivery_of(json.dumps(value).encode(), at=AT, webhook_id=webhook_id)


def test_a_callback() -> None:
    """A callback says which run ended, and how; nothing is made up beside it."""
    assert read_callback(event()) == Observation(
        run_id="run_1",
        source=Source.CALLBACK,
        at=AT,
        status=RunStatus.COMPLETED,
        run_type="technique",
        workspace_id="ws_1",
    )
    assert delivery(event()) == Delivery(
        delivery_id="whd_1",
        received_at=AT,
        body=json.dumps(event()).encode(),
        event_type="run.completed",
        api_version="2026-06-11",
        created_at=datetime.fromtimestamp(1_750_000_000, UTC),
        run_id="run_1",
        workspace_id="ws_1",
    )


def test_a_failed_run_brings_its_error() -> None:
    """The error of a failed run is read, without a message, too."""
    data = {"status": "failed", "error_code": "safety_blocked"}
    read = read_callback(event(type="run.failed", data=data))
    assert isinstance(read, Observation)
    assert read.error == RunError("safety_blocked", "")


def test_new_versions_and_kinds_are_applied() -> None:
    """An unknown version, an unknown kind of run and unknown fields do not matter."""
    read = read_callback(event(api_version="2031-01-01", data={"run_type": "opera"}, more=[1]))
    assert isinstance(read, Observation)
    assert read.run_type == "opera"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "not a JSON object"),
        (event(type="run.started"), "type"),
        (event(type=None), "type"),
        (event(type=["run.completed"]), "type"),
        (event() | {"data": None}, "data is not"),
        (event(data={"run_id": None}), "run_id"),
        (event(data={"run_id": ""}), "run_id"),
        (event(data={"run_id": "r" * 256}), "run_id"),
        (event(data={"status": "failed"}), "agree"),
        (event(data={"status": None}), "agree"),
        (event(data={"status": {}}), "agree"),
    ],
)
def test_what_is_not_understood(value: object, reason: str) -> None:
    """A callback that is not understood says why, and keeps its ids where it has them."""
    read = read_callback(value)
    assert isinstance(read, str)
    assert reason in read
    if isinstance(value, dict):
        assert delivery(value).delivery_id == "whd_1"


@pytest.mark.parametrize("no_id", [None, "", 7, "x" * 256, ["whd_1"]])
def test_a_delivery_always_has_an_id(no_id: object) -> None:
    """Without an id in the body the header's counts, and without either the body's digest."""
    value = event(id=no_id)
    assert delivery(value, webhook_id="whd_header").delivery_id == "whd_header"
    digest = sha256(json.dumps(value).encode()).hexdigest()
    assert delivery(value).delivery_id == f"sha256:{digest}"
    assert delivery(value, webhook_id="").delivery_id == f"sha256:{digest}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe{}",
        b'{"id": "whd_1"',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b"[" * 1_000 + b"]" * 1_000,
        b'{"a":' * 2_000 + b"1" + b"}" * 2_000,
        b"9" * 10_000,
        b'{"created_at": 1e999}',
        b'{"created_at": NaN}',
        json.dumps({"id": "whd_1"}).encode("utf-16"),
    ],
)
def test_hostile_bodies(body: bytes) -> None:
    """No bytes whatever make a reader raise, and every delivery has an id."""
    assert delivery_of(body, at=AT).delivery_id
    assert isinstance(observation_of(body, at=AT), str)


@given(body=st.binary())
def test_any_bytes(body: bytes) -> None:
    """No bytes whatever make a reader raise, and every delivery has an id."""
    assert delivery_of(body, at=AT).delivery_id
    assert observation_of(body, at=AT)


@given(
    value=ANY_JSON | some_of("id", "type", "api_version", "created_at", "data"),
    data=some_of("run_id", "run_type", "workspace_id", "status", "error_code", "error_message"),
)
def test_any_callback(value: Any, data: dict[str, Any]) -> None:
    """Any JSON is read as a callback: it is an observation, or a reason why it is none."""
    for told in (value, event(data=data)):
        assert delivery(told).delivery_id
        assert read_callback(told)


def test_of_a_doubled_key_the_last_counts() -> None:
    """A key that stands twice in an object has its last value, whichever reader reads it."""
    body = rb'{"run_id":"a","run_id":"run_1","status":"failed"%s}'
    assert read_run(decode(body % b"")).run_id == "run_1"
    assert read_run(decode(body % rb',"error_code":"\ud800"')).run_id == "run_1"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, FloraRefusal),
        (401, KeyRefused),
        (402, FloraRefusal),
        (403, Forbidden),
        (404, NotFound),
        (409, FloraRefusal),
        (422, FloraRefusal),
        (429, RateLimited),
        (500, ServerFault),
        (599, ServerFault),
    ],
)
def test_refusals(status: int, kind: type[FloraRefusal]) -> None:
    """FLORA's error keeps its status, code, message, fields and request id."""
    error = {
        "code": "input_validation_error",
        "message": "no such input",
        "fields": [{"field": "inputs.0.id", "message": "unknown"}, 7],
    }
    body = json.dumps({"error": error}).encode()
    refusal = parse.refusal(status, body, request_id="req_1", retry_after=3)
    assert type(refusal) is kind
    assert (refusal.status, refusal.code) == (status, "input_validation_error")
    assert refusal.message == "no such input"
    assert refusal.fields == (FieldFault("inputs.0.id", "unknown"),)
    assert (refusal.request_id, refusal.retry_after) == ("req_1", 3)
    assert "req_1" in str(refusal)


@pytest.mark.parametrize("body", [b"<html>", b"", b"7", b"[]", b'{"error": "no"}'])
def test_a_gateways_page(body: bytes) -> None:
    """An error that is not in FLORA's shape is told by its status."""
    refusal = parse.refusal(502, body)
    assert isinstance(refusal, ServerFault)
    assert (refusal.code, refusal.message) == ("http_502", "Bad Gateway")


@given(status=st.integers(400, 599), value=ANY_JSON | st.builds(lambda e: {"error": e}, some_of(
    "code", "message", "fields")))  # fmt: skip
def test_any_error_answer(status: int, value: object) -> None:
    """Whatever an error answer holds, it becomes a refusal."""
    refusal = parse.refusal(status, json.dumps(value).encode())
    assert refusal.code
    str(refusal).encode()
