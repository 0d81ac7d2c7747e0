"""What is sent again, when, and what is never sent again."""

import asyncio
from datetime import timedelta
from email.utils import format_datetime

import httpx
import pytest

from tests.flora.far_end import (
    NOON,
    FarEnd,
    Reply,
    VirtualTime,
    client,
    ok,
    refused,
    run_payload,
    settle,
)
from tracker.core.errors import (
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    KeyRefused,
    RateLimited,
    ServerFault,
    StartPending,
)
from tracker.core.observation import Observation
from tracker.flora.client import FloraClient, start_body

RUN = ok(run_payload())
CONNECT_ERRORS = [
    httpx.ConnectError("refused"),
    httpx.ConnectTimeout(""),
    httpx.PoolTimeout(""),
    httpx.ProxyError("407"),
]
CUTS = [
    httpx.ReadTimeout(""),
    httpx.ReadError(""),
    httpx.WriteError(""),
    httpx.WriteTimeout(""),
    httpx.RemoteProtocolError("Server disconnected without sending a response."),
]


async def start(flora: FloraClient) -> Observation:
    body = start_body([], idempotency_key="k")
    return await flora.start_run("tech_1", body=body, idempotency_key="k")


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504, 522])
async def test_reads_outlast_passing_faults(status: int) -> None:
    """A read is repeated after a gateway's or FLORA's own fault, with growing waits."""
    time = VirtualTime()
    page = httpx.Response(status, content=b"<html>bad gateway</html>")
    far_end = FarEnd(page, refused(status), RUN)
    async with client(far_end, time) as flora:
        assert (await time.run(flora.get_any_run("run_1"))).run_id == "run_1"
    assert len(far_end.requests) == 3
    first, second = time.slept
    assert 0.25 <= first <= 0.5 <= second <= 1


@pytest.mark.parametrize("error", CONNECT_ERRORS + CUTS, ids=lambda error: type(error).__name__)
async def test_reads_outlast_lost_connections(error: Exception) -> None:
    """A read is repeated however its connection failed."""
    time = VirtualTime()
    far_end = FarEnd(error, RUN)
    async with client(far_end, time) as flora:
        await time.run(flora.get_any_run("run_1"))
    assert len(far_end.requests) == 2


@pytest.mark.parametrize("error", CUTS, ids=lambda error: type(error).__name__)
async def test_a_start_that_was_cut_is_never_sent_again(error: Exception) -> None:
    """A start that may have reached FLORA goes out once, and the error says that it may have."""
    time = VirtualTime()
    far_end = FarEnd(error, RUN)
    async with client(far_end, time) as flora:
        with pytest.raises(FloraUnreachable) as caught:
            await time.run(start(flora))
    assert caught.value.may_have_acted
    assert caught.value.timed_out is isinstance(error, httpx.TimeoutException)
    assert len(far_end.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        *(httpx.Response(status, content=b"<html>") for status in (404, 429, 500, 502, 503, 504)),
        *(refused(status) for status in (500, 503)),
    ],
    ids=lambda reply: f"{reply.status_code}{'' if reply.content else '_html'}",
)
async def test_a_start_that_may_have_acted_is_sent_once(reply: httpx.Response) -> None:
    """What a gateway says is told from what FLORA says, and after any 5xx nothing is repeated."""
    time = VirtualTime()
    far_end = FarEnd(reply, RUN)
    async with client(far_end, time) as flora:
        with pytest.raises(FloraRefusal) as caught:
            await time.run(start(flora))
    assert caught.value.status == reply.status_code
    assert caught.value.from_flora is (reply.content[:1] == b"{")
    assert len(far_end.requests) == 1


async def test_an_unreadable_answer_to_a_start_is_final() -> None:
    """A start whose answer cannot be read is not sent again."""
    far_end = FarEnd(httpx.Response(200, content=b"{"), RUN)
    async with client(far_end, VirtualTime()) as flora:
        with pytest.raises(FloraUnreadable):
            await start(flora)
    assert len(far_end.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [*CONNECT_ERRORS, refused(429)],
    ids=lambda reply: getattr(reply, "status_code", type(reply).__name__),
)
async def test_a_start_is_repeated_where_that_is_safe(reply: Reply) -> None:
    """Without a connection, and after FLORA's own 429, the same start goes out again."""
    time = VirtualTime()
    far_end = FarEnd(reply, RUN)
    async with client(far_end, time) as flora:
        assert (await time.run(start(flora))).run_id == "run_1"
    first, second = far_end.requests
    assert first.content == second.content
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, 5),
        ({"retry_after": "12"}, 12),
        ({"retry_after_ms": "1500"}, 1.5),
        ({"retry_after": format_datetime(NOON + timedelta(seconds=9), usegmt=True)}, 9),
        ({"retry_after": "soon"}, 5),
    ],
)
async def test_a_429_says_how_long(headers: dict[str, str], wait: float) -> None:
    """The wait that FLORA asks for is kept, 5 s where it asks for none."""
    time = VirtualTime()
    far_end = FarEnd(refused(429, **headers), RUN)
    async with client(far_end, time) as flora:
        await time.run(flora.get_any_run("run_1"))
    assert time.elapsed == pytest.approx(wait)


async def test_a_429_may_ask_for_no_wait() -> None:
    """A wait of zero seconds is a wait that FLORA has named: only the backoff is left."""
    time = VirtualTime()
    far_end = FarEnd(refused(429, retry_after="0"), RUN)
    async with client(far_end, time) as flora:
        await time.run(flora.get_any_run("run_1"))
    assert time.elapsed < 2


async def test_a_wait_is_everybodys() -> None:
    """While FLORA asks one caller to wait no other sends anything."""
    time = VirtualTime()
    far_end = FarEnd(refused(429, retry_after="20"), RUN)
    async with client(far_end, time) as flora:
        first = asyncio.ensure_future(flora.get_any_run("run_1"))
        await settle()
        second = asyncio.ensure_future(flora.get_any_run("run_1"))
        await settle()
        assert len(far_end.requests) == 1
        assert flora.request_limit.state().paused == 20
        await time.run(asyncio.wait([first, second]))
    assert len(far_end.requests) == 3
    assert time.elapsed >= 20


async def test_a_503_that_asks_for_a_wait_gets_it() -> None:
    """`Retry-After` counts on a 503 as well, for everybody."""
    time = VirtualTime()
    async with client(FarEnd(refused(503, retry_after="7"), RUN), time) as flora:
        await time.run(flora.get_any_run("run_1"))
        assert flora.request_limit.state().rate is None
    assert time.elapsed == pytest.approx(7)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (refused(429), RateLimited),
        (refused(429, retry_after="600"), RateLimited),
        (refused(503), ServerFault),
        (httpx.ConnectError("refused"), FloraUnreachable),
    ],
)
async def test_patience_ends_with_the_deadline(reply: Reply, error: type[Exception]) -> None:
    """A call never waits beyond its deadline; the last error is raised as soon as that is clear."""
    time = VirtualTime()
    far_end = FarEnd(reply)
    async with client(far_end, time, deadline=25) as flora:
        with pytest.raises(error):
            await time.run(flora.get_any_run("run_1"))
    assert time.elapsed <= 25
    assert 1 <= len(far_end.requests) < 20


async def test_a_deadline_of_its_own() -> None:
    """A single call may bring its own, shorter deadline."""
    time = VirtualTime()
    far_end = FarEnd(refused(429, retry_after="10"))
    async with client(far_end, time) as flora:
        with pytest.raises(RateLimited) as caught:
            await time.run(flora.get_any_run("run_1", deadline=9))
    assert caught.value.retry_after == 10
    assert (time.elapsed, len(far_end.requests)) == (0, 1)


async def test_a_pause_that_outlasts_the_deadline_is_not_waited_for() -> None:
    """A call that may not take as long as everybody waits ends at once, having sent nothing."""
    time = VirtualTime()
    far_end = FarEnd(refused(429, retry_after="40"), RUN)
    async with client(far_end, time) as flora:
        with pytest.raises(RateLimited):
            await time.run(flora.get_any_run("run_1", deadline=30))
        with pytest.raises(RateLimited) as caught:
            await time.run(flora.get_any_run("run_1", deadline=30))
    assert caught.value.retry_after == pytest.approx(40)
    assert len(far_end.requests) == 1


@pytest.mark.parametrize("acts", [True, False], ids=["start", "read"])
async def test_no_answer_in_time(acts: bool) -> None:
    """An answer that does not come in time is given up, and may have acted. A start's is waited for
    longer than its deadline."""

    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    waits = {"deadline": 0.05, "start_seconds": 0.1}
    async with client(FarEnd(never), VirtualTime(), **waits) as flora:
        with pytest.raises(FloraUnreachable, match=r"within 0\.\d+ s") as caught:
            await (start(flora) if acts else flora.get_any_run("run_1"))
        assert flora.request_limit.state().in_flight == 0
    assert caught.value.may_have_acted
    assert caught.value.timed_out


async def test_the_limit_of_an_answer_ends_with_it() -> None:
    """What FLORA asks for before the next attempt is no part of it: the deadline holds again."""
    time = VirtualTime()

    async def takes_longer(seconds: float) -> None:
        time.elapsed += seconds
        await asyncio.sleep(0.1)

    flora = FloraClient(
        base_url="https://flora.test",
        api_key="k",
        monotonic=time.monotonic,
        sleep=takes_longer,
        transport=FarEnd(refused(429, "rate_limited", retry_after_ms="10"), RUN),
    )
    async with flora:
        run = await flora.get_run("tech_1", "run_1", answer_seconds=0.05, deadline=30)
    assert run.run_id == "run_1"


async def test_no_turn_in_time() -> None:
    """A start that did not get its turn within the deadline has certainly not acted."""

    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with client(FarEnd(never), VirtualTime(), concurrency=1) as flora:
        blocking = asyncio.ensure_future(flora.get_any_run("run_1"))
        await settle()
        with pytest.raises(FloraUnreachable) as caught:
            await flora.start_run("tech_1", body="{}", idempotency_key="k", deadline=0.05)
        assert not caught.value.may_have_acted
        blocking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await blocking
        assert flora.request_limit.state().in_flight == 0


async def test_time_up_between_two_attempts() -> None:
    """Where time runs out in a wait, the error that was waited for is raised, not a time-out."""

    async def forever(_: float) -> None:
        await asyncio.Event().wait()

    time = VirtualTime()
    flora = FloraClient(
        base_url="https://flora.test",
        api_key="k",
        deadline=0.05,
        monotonic=time.monotonic,
        sleep=forever,
        transport=FarEnd(refused(503, "service_unavailable", retry_after_ms="10")),
    )
    async with flora:
        with pytest.raises(ServerFault) as caught:
            await flora.get_any_run("run_1")
    assert caught.value.code == "service_unavailable"


async def test_waiting_callers_meet_a_refused_key() -> None:
    """Callers that wait for their turn when the key is refused do not all try it, too."""
    time = VirtualTime()
    far_end = FarEnd(refused(401))
    async with client(far_end, time, concurrency=1) as flora:
        results = await time.run(
            asyncio.gather(*(flora.get_any_run("run_1") for _ in range(10)), return_exceptions=True)
        )
        assert all(isinstance(result, KeyRefused) for result in results)
        assert len(far_end.requests) == 1
        time.elapsed = 40
        await time.run(
            asyncio.gather(*(flora.get_any_run("run_1") for _ in range(10)), return_exceptions=True)
        )
    assert len(far_end.requests) == 2


async def test_a_limit_slows_everything_down() -> None:
    """After a 429 the requests are spaced, and each answer brings them closer again."""
    time = VirtualTime()
    far_end = FarEnd(*[RUN] * 19, refused(429, retry_after="1"), RUN)
    async with client(far_end, time, concurrency=2) as flora:
        for _ in range(20):
            await time.run(flora.get_any_run("run_1"))
        slow = flora.request_limit.state().rate
        assert slow is not None
        assert slow == pytest.approx(1.05)
        await time.run(flora.get_any_run("run_1"))
        assert flora.request_limit.state().rate == pytest.approx(1.1)


async def test_a_refusal_of_another_kind_keeps_its_type() -> None:
    """After repetitions the error is the last one, not the first."""
    time = VirtualTime()
    far_end = FarEnd(refused(429, retry_after="1"), refused(402, "no_credits"))
    async with client(far_end, time) as flora:
        with pytest.raises(FloraRefusal) as caught:
            await time.run(start(flora))
    assert (caught.value.status, caught.value.code) == (402, "no_credits")


async def test_a_fence_is_the_last_thing_before_a_request() -> None:
    """It is asked before each attempt, and what it raises keeps the request from being sent."""
    time = VirtualTime()
    far_end = FarEnd(httpx.ConnectError("refused"), refused(429), RUN)
    asked: list[int] = []

    async def fence() -> None:
        asked.append(len(far_end.requests))
        if len(asked) == 3:
            raise StartPending("taken over")

    async with client(far_end, time) as flora:
        with pytest.raises(StartPending):
            await time.run(flora.start_run("tech_1", body="{}", idempotency_key="k", fence=fence))
    assert asked == [0, 1, 2]
    assert len(far_end.requests) == 2
