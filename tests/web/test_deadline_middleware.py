"""What is only looked at is there in time, or the client is told that it is not."""

import asyncio

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tracker.web.app import DeadlineMiddleware, ResponseMiddleware
from tracker.web.http import Limits


async def _after_a_while(scope: Scope, receive: Receive, send: Send) -> None:
    """An answer that takes longer than these tests let it."""
    await asyncio.sleep(0.2)
    await _answer(scope, receive, send)


async def _in_two_parts(scope: Scope, receive: Receive, send: Send) -> None:
    """An answer that begins at once and takes its time to end."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.sleep(0.2)
    await send({"type": "http.response.body", "body": b"all of it"})


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"all of it"})


async def _times_out(scope: Scope, receive: Receive, send: Send) -> None:
    """A time-out of someone else's, which nobody caught."""
    raise TimeoutError


def _client(app: object) -> httpx.AsyncClient:
    inner = DeadlineMiddleware(app, seconds=0.05)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(ResponseMiddleware(inner, limits=Limits()))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize("path", ["/", "/api/runs", "/metrics"])
async def test_a_check_that_takes_too_long_is_a_503(path: str) -> None:
    """With `Retry-After`, in the shape of every error."""
    async with _client(_after_a_while) as client:
        answer = await client.get(path)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_unavailable"
    assert int(answer.headers["Retry-After"]) > 0


async def test_what_changes_something_has_waits_of_its_own() -> None:
    """It is not broken off: whoever asked would not know whether it was done."""
    async with _client(_after_a_while) as client:
        assert (await client.post("/api/runs")).text == "all of it"


async def test_a_stream_goes_on() -> None:
    """It is there to be waited for."""
    async with _client(_after_a_while) as client:
        assert (await client.get("/api/stream")).text == "all of it"


async def test_an_answer_that_has_begun_is_not_broken_off() -> None:
    """How long the client takes to read it is the client's affair."""
    async with _client(_in_two_parts) as client:
        assert (await client.get("/api/runs")).text == "all of it"


async def test_the_timeout_of_another_is_not_mistaken_for_this_one() -> None:
    """It is a fault of ours, and shows as one."""
    async with _client(_times_out) as client:
        answer = await client.get("/api/runs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
