"""The calls of the client: what goes out, and what becomes of the answer."""

import gzip
import json
import traceback
from datetime import timedelta
from decimal import Decimal
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from tests.flora.far_end import (
    BASE,
    KEY,
    NOON,
    FarEnd,
    VirtualTime,
    client,
    ok,
    refused,
    run_payload,
)
from tracker import __version__
from tracker.core.contact import Trouble
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreadable,
    Forbidden,
    InvalidRequest,
    KeyRefused,
    NotFound,
    PlanRequired,
    SettingsError,
    TrackerError,
)
from tracker.core.observation import Source
from tracker.core.run import RunStatus
from tracker.flora.client import FloraClient, PollUrlRefused, start_body

INPUTS = [{"id": "prompt", "type": "text", "value": "caf\N{LATIN SMALL LETTER E WITH ACUTE}"}]


async def test_start() -> None:
    """A start sends its inputs, asks for a callback, and carries its key in both known forms."""
    time = VirtualTime()
    far_end = FarEnd(ok(run_payload(status="pending"), idempotent_replayed="true"))
    async with client(far_end, time) as flora:
        body = start_body(INPUTS, idempotency_key="key 1", callback_url="https://t.test/c")
        seen = await flora.start_run("tech_1", body=body, idempotency_key="key 1")
    [request] = far_end.requests
    assert (request.method, str(request.url)) == ("POST", f"{BASE}/techniques/tech_1/runs")
    assert request.headers["idempotency-key"] == "key 1"
    assert json.loads(request.content) == {
        "inputs": INPUTS,
        "mode": "async",
        "idempotency_key": "key 1",
        "callback_url": "https://t.test/c",
    }
    assert (seen.run_id, seen.source, seen.at) == ("run_1", Source.START, NOON)
    assert (seen.technique_id, seen.run_type) == ("tech_1", "technique")


async def test_cookies_are_not_kept() -> None:
    """A gateway may set as many as it likes: none is kept, and none is sent."""
    far_end = FarEnd(ok(run_payload(), set_cookie="lb=1; Path=/"))
    async with client(far_end, VirtualTime()) as flora:
        for _ in range(2):
            await flora.get_any_run("run_1")
    assert ["cookie" in request.headers for request in far_end.requests] == [False, False]


async def test_a_start_by_slug() -> None:
    """A slug is never taken for a technique's id; without an address no callback is asked for."""
    far_end = FarEnd(ok(run_payload()))
    async with client(far_end, VirtualTime()) as flora:
        seen = await flora.start_run(
            "cctv-cam", body=start_body(INPUTS, idempotency_key="k"), idempotency_key="k"
        )
    assert seen.technique_id is None
    assert "callback_url" not in json.loads(far_end.requests[0].content)


@pytest.mark.parametrize(
    "key", ["", " k", "k\n", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "k" * 256]
)
async def test_a_key_that_no_header_carries(key: str) -> None:
    """An idempotency key that cannot be sent in a header is the caller's fault; nothing is sent."""
    far_end = FarEnd(ok(run_payload()))
    async with client(far_end, VirtualTime()) as flora:
        with pytest.raises(InvalidRequest) as caught:
            await flora.start_run("tech_1", body="{}", idempotency_key=key)
    assert caught.value.fields[0].field == "idempotency_key"
    assert far_end.requests == []


async def test_reads_of_one_run() -> None:
    """A run is read by its technique, by its id alone, or by its poll_url: each time a poll."""
    far_end = FarEnd(ok(run_payload(status="completed", charged_cost=0.2)))
    async with client(far_end, VirtualTime()) as flora:
        seen = [
            await flora.get_run("tech_1", "run_1"),
            await flora.get_any_run("run_1"),
            await flora.follow(f"{BASE}/techniques/tech_1/runs/run_1?x=1", "run_1"),
        ]
    assert far_end.paths == [
        "/api/v1/techniques/tech_1/runs/run_1",
        "/api/v1/runs/run_1",
        "/api/v1/techniques/tech_1/runs/run_1?x=1",
    ]
    assert {(o.source, o.status, o.charged_cost) for o in seen} == {
        (Source.POLL, RunStatus.COMPLETED, Decimal("0.2"))
    }
    assert [o.technique_id for o in seen] == [None, None, None], "the path is our word, not FLORA's"


async def test_a_poll_url_elsewhere_gets_nothing() -> None:
    """Nothing is sent to a poll_url on another origin."""
    far_end = FarEnd(ok(run_payload()))
    async with client(far_end, VirtualTime()) as flora:
        with pytest.raises(PollUrlRefused):
            await flora.follow("https://evil.test/api/v1/runs/run_1", "run_1")
    assert far_end.requests == []


@pytest.mark.parametrize(
    ("kind", "path", "key"),
    [
        ("technique", "technique-runs", "technique_runs"),
        ("generation", "generations", "generations"),
    ],
)
async def test_history(kind: Any, path: str, key: str) -> None:
    """A page of either history is read without a status filter, and its bad items are told."""
    page = {key: [run_payload(), {"status": "running"}], "meta": {"next_cursor": "next"}}
    far_end = FarEnd(ok(page))
    async with client(far_end, VirtualTime()) as flora:
        read = await flora.history(kind=kind, cursor="a=&b", technique_id="tech_1", limit=50)
    [request] = far_end.requests
    assert request.url.path == f"/api/v1/{path}"
    assert dict(request.url.params) == {"cursor": "a=&b", "limit": "50", "technique_id": "tech_1"}
    assert [(o.run_id, o.source, o.run_type) for o in read.items] == [
        ("run_1", Source.HISTORY, kind)
    ]
    assert read.next_cursor == "next"
    assert read.unreadable == {1: "the run has no run_id"}


async def test_techniques() -> None:
    """The catalogue is read page by page, a technique by its slug."""
    technique = {"technique_id": "tech_1", "name": "One"}
    far_end = FarEnd(ok({"techniques": [technique]}), ok(technique))
    async with client(far_end, VirtualTime()) as flora:
        page = await flora.list_techniques(cursor="next")
        assert page.items == [await flora.get_technique("cctv/cam")]
    assert far_end.paths == [
        "/api/v1/techniques?cursor=next&limit=100",
        "/api/v1/techniques/cctv%2Fcam",
    ]


async def test_every_request_says_who_asks() -> None:
    """The key goes out as a bearer token, and the user agent names tracker and version."""
    far_end = FarEnd(ok(run_payload()))
    async with client(far_end, VirtualTime()) as flora:
        await flora.get_any_run("run_1")
    headers = far_end.requests[0].headers
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["user-agent"] == f"flora-run-tracker/{__version__}"


@pytest.mark.parametrize("run_id", ["..", "", "x" * 300])
async def test_ids_that_are_none(run_id: str) -> None:
    """What can be no run's id does not exist; FLORA is not asked."""
    far_end = FarEnd(ok(run_payload()))
    async with client(far_end, VirtualTime()) as flora:
        with pytest.raises(NotFound):
            await flora.get_run("tech_1", run_id)
    assert far_end.requests == []


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(200, content=b"<html>"),
        httpx.Response(200, content=b""),
        httpx.Response(204),
        httpx.Response(200, content=b'{"run_id": "run_1", "sta'),
        httpx.Response(200, content=b"[" * 10_000),
        ok([run_payload()]),
        ok(run_payload("run_2")),
        ok(run_payload(status=None)),
    ],
    ids=["html", "empty", "none", "cut", "deep", "list", "another", "status"],
)
async def test_unreadable_answers(reply: httpx.Response) -> None:
    """A 200 that is not the run asked for is unreadable, and the error names the request."""
    reply.headers["request-id"] = "req_7"
    far_end = FarEnd(reply)
    async with client(far_end, VirtualTime()) as flora:
        with pytest.raises(FloraUnreadable) as caught:
            await flora.get_any_run("run_1")
    assert caught.value.request_id == "req_7"
    assert "GET /runs/{id}" in str(caught.value)
    assert "req_7" in str(caught.value)
    assert len(far_end.requests) == 1


async def test_garbled_compression() -> None:
    """A body that cannot be unpacked is unreadable."""

    async def garbled(_: httpx.Request) -> httpx.Response:
        stream = httpx.ByteStream(b"not gzip")
        return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=stream)

    async with client(FarEnd(garbled), VirtualTime()) as flora:
        with pytest.raises(FloraUnreadable, match="garbled"):
            await flora.get_any_run("run_1")


@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "zstd"])
async def test_what_is_packed_twice_or_anew_is_not_unpacked(encoding: str) -> None:
    """Its size could not be told before it is in memory."""

    async def bomb(_: httpx.Request) -> httpx.Response:
        stream = httpx.ByteStream(gzip.compress(gzip.compress(bytes(1_000_000))))
        return httpx.Response(200, headers={"content-encoding": encoding}, stream=stream)

    async with client(far := FarEnd(bomb), VirtualTime()) as flora:
        with pytest.raises(FloraUnreadable, match="unsupported content encoding"):
            await flora.get_any_run("run_1")
    assert far.requests[0].headers["accept-encoding"] == "gzip, deflate"


async def test_bodies_are_bounded() -> None:
    """An answer without end is given up."""
    sent = 0

    async def endless(_: httpx.Request) -> httpx.Response:
        async def chunks():  # type: ignore[no-untyped-def]
            nonlocal sent
            while True:
                sent += 400
                yield b" " * 400

        return httpx.Response(200, content=chunks())

    async with client(FarEnd(endless), VirtualTime(), largest_answer=1000) as flora:
        with pytest.raises(FloraUnreadable, match="larger"):
            await flora.get_any_run("run_1")
    assert sent == 1200


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_refused(status: int) -> None:
    """A redirect is never followed, and the message says what to check."""
    far_end = FarEnd(httpx.Response(status, headers={"location": "https://evil.test/"}))
    async with client(far_end, VirtualTime()) as flora:
        with pytest.raises(FloraRefusal, match="FLORA_BASE_URL") as caught:
            await flora.get_any_run("run_1")
    assert (caught.value.status, caught.value.code) == (status, "redirect")
    assert len(far_end.requests) == 1


@pytest.mark.parametrize("status", [400, 402, 404, 409, 422])
async def test_refusals_are_not_repeated(status: int) -> None:
    """What FLORA refuses for good is refused at once, with its code and request id."""
    far_end = FarEnd(refused(status, "a_code", request_id="req_9"))
    async with client(far_end, VirtualTime()) as flora:
        with pytest.raises(FloraRefusal) as caught:
            await flora.start_run("tech_1", body="{}", idempotency_key="k")
    assert (caught.value.status, caught.value.code) == (status, "a_code")
    assert caught.value.request_id == "req_9"
    assert len(far_end.requests) == 1


async def test_floras_clock() -> None:
    """How far FLORA's clock is from ours is known from the first answer on, a refusal too."""
    date = format_datetime(NOON + timedelta(seconds=90), usegmt=True)
    async with client(FarEnd(refused(404, date=date)), VirtualTime()) as flora:
        assert flora.clock_offset is None
        with pytest.raises(NotFound):
            await flora.get_any_run("run_1")
        assert flora.clock_offset == timedelta(seconds=90)


async def test_requests_are_counted() -> None:
    """Each request is told with its endpoint and status, and one without an answer with none."""
    time = VirtualTime()
    seen: list[tuple[str, int | None]] = []
    far_end = FarEnd(httpx.ConnectError("refused"), refused(500), ok(run_payload()))
    flora = client(far_end, time, on_request=lambda *told: seen.append(told[:2]))
    async with flora:
        await time.run(flora.get_any_run("run_1"))
    assert seen == [("GET /runs/{id}", status) for status in (None, 500, 200)]


async def test_a_refused_key_opens_the_breaker() -> None:
    """After a 401 calls fail at once; a probe each half minute closes the breaker when it may."""
    time = VirtualTime()
    far_end = FarEnd(refused(401), refused(401), ok(run_payload()))
    async with client(far_end, time) as flora:
        for at, requests in [(0, 1), (29, 1), (31, 2), (60, 2)]:
            time.elapsed = at
            with pytest.raises(KeyRefused):
                await flora.get_any_run("run_1")
            assert len(far_end.requests) == requests
            assert flora.breaker.open
            assert flora.breaker.since == NOON
        time.elapsed = 62
        await flora.get_any_run("run_1")
        assert not flora.breaker.open
        await flora.get_any_run("run_1")
    assert len(far_end.requests) == 4


async def test_a_403_holds_for_what_was_asked() -> None:
    """It stops nothing else; of a list that any key may read it is told after half a minute, until
    something else can be read."""
    time = VirtualTime()
    far_end = FarEnd(*(refused(403) for _ in range(4)), ok(run_payload()))
    async with client(far_end, time) as flora:
        for call in (flora.get_any_run("run_1"), flora.history(kind="generation")):
            with pytest.raises(Forbidden):
                await call
        assert not flora.contact.failing
        for time.elapsed in (0, 31):
            with pytest.raises(Forbidden):
                await flora.history()
        assert flora.contact.found is not None
        assert (flora.contact.found.trouble, flora.contact.found.since) == (
            Trouble.LISTS_REFUSED,
            NOON,
        )
        assert not flora.breaker.open
        await flora.get_any_run("run_1")
        assert flora.contact.found is None


async def test_what_is_not_floras_is_no_answer() -> None:
    """A gateway's 401, 403 and 404, its pages and a redirect say nothing of the key or the run; an
    answer of FLORA's, a refusal too, ends what they began; and who stops asking knows nothing."""
    time = VirtualTime()
    pages = [httpx.Response(status, content=b"<html>") for status in (401, 403, 404, 302, 200)]
    far_end = FarEnd(*pages, httpx.Response(200), refused(404), *pages[:1], *pages[:1])
    async with client(far_end, time) as flora:
        for time.elapsed in range(0, 36, 6):
            with pytest.raises(FloraError) as caught:
                await flora.get_any_run("run_1")
            assert caught.value.silent
            assert not isinstance(caught.value, KeyRefused | Forbidden | NotFound)
        assert not flora.breaker.open
        found = flora.contact.found
        assert found is not None
        assert (found.trouble, found.since) == (Trouble.NOT_FLORA, NOON)
        with pytest.raises(NotFound):
            await flora.get_any_run("run_1")
        assert flora.contact.found is None
        for time.elapsed in (40, 75):
            with pytest.raises(FloraError):
                await flora.get_any_run("run_1")
        assert flora.contact.found is not None
        time.elapsed = 300
        assert flora.contact.found is None


async def test_a_plan_that_lacks_something_is_no_refused_key() -> None:
    """403 `paid_plan_required` is about the workspace's plan: it is told as that, the breaker stays
    closed, and a key that was refused before counts as taken."""
    plan = refused(403, "paid_plan_required")
    async with client(FarEnd(refused(401), plan), VirtualTime()) as flora:
        with pytest.raises(KeyRefused):
            await flora.history()
        flora.breaker._next_probe = 0
        for call in (flora.history(), flora.get_any_run("run_1")):
            with pytest.raises(PlanRequired, match="403 paid_plan_required: some words"):
                await call
            assert not flora.breaker.open
    async with client(FarEnd(refused(402, "insufficient_credits")), VirtualTime()) as flora:
        with pytest.raises(FloraRefusal, match="402 insufficient_credits"):
            await flora.start_run("tech_1", body="{}", idempotency_key="k")
        assert not flora.breaker.open


async def test_a_field_s_valid_values_are_reported() -> None:
    """What FLORA says that a field takes stands in the error, as values and in words."""
    fault = {"field": "inputs.0.value", "message": "is not a style", "code": "invalid_value"}
    values = {"valid_values": ["photo", "sketch", 3, None, {"a": 1}]}
    body = {"error": {"code": "input_validation_error", "message": "wrong", "fields": []}}
    body["error"]["fields"] = [fault | values, fault | {"valid_values": "photo"}]  # type: ignore[index]
    async with client(FarEnd(httpx.Response(400, json=body)), VirtualTime()) as flora:
        with pytest.raises(FloraRefusal) as caught:
            await flora.start_run("tech_1", body="{}", idempotency_key="k")
    assert [one.valid_values for one in caught.value.fields] == [("photo", "sketch", "3"), ()]
    assert "inputs.0.value: is not a style (one of photo, sketch, 3)" in str(caught.value)


async def test_an_empty_text_is_left_out_of_a_start() -> None:
    """FLORA refuses an empty string; an optional text that says nothing is not sent."""
    far_end = FarEnd(ok(run_payload()))
    inputs = [*INPUTS, {"id": "style", "type": "text", "value": ""}]
    async with client(far_end, VirtualTime()) as flora:
        body = start_body(inputs, idempotency_key="k")
        await flora.start_run("tech_1", body=body, idempotency_key="k")
    assert json.loads(far_end.requests[0].content)["inputs"] == INPUTS


async def test_each_observation_has_the_time_of_its_request() -> None:
    """Not when the answer came: of two reads that overlap the one sent later is the later one."""
    time = VirtualTime()

    async def slow(request: httpx.Request) -> httpx.Response:
        await time.sleep(3)
        return ok(run_payload())

    async with client(FarEnd(slow), time) as flora:
        seen = await time.run(flora.get_any_run("run_1"))
    assert (seen.sent_at, seen.at) == (NOON, NOON + timedelta(seconds=3))


async def test_the_key_is_disclosed_to_no_one() -> None:
    """The key stands in no repr, no error and no traceback."""
    told = []
    for reply in (refused(401), refused(404), httpx.Response(200), httpx.ReadError("cut")):
        flora = client(FarEnd(reply), VirtualTime())
        try:
            await flora.start_run("tech_1", body="{}", idempotency_key="k")
        except FloraError as exc:
            told += [repr(flora), repr(exc), str(exc), *traceback.format_exception(exc)]
    assert len(told) > 12
    assert not [words for words in told if KEY in words]


@pytest.mark.parametrize(
    "key", ["", "sk live", "sk_live\n", "sk_l\N{LATIN SMALL LETTER I WITH ACUTE}ve"]
)
def test_keys_that_are_none(key: str) -> None:
    """A key that no header can carry is a wrong setting, and is not repeated."""
    with pytest.raises(SettingsError, match="FLORA_API_KEY") as caught:
        FloraClient(base_url=BASE, api_key=key)
    assert not key or key not in str(caught.value)
    assert isinstance(caught.value, TrackerError)
