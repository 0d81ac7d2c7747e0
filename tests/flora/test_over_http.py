"""The client over real connections: cuts, refusals, slow answers, and how many at a time."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.flora.far_end import run_payload, settle
from tests.support.waiting import cancelled_at, eventually, free_port, let_pass
from tracker.core.errors import FloraRefusal, FloraUnreachable
from tracker.flora.client import FloraClient

RUN = json.dumps(run_payload()).encode()
Serve = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes, *, length: int | None = None, status: str = "200 OK") -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\ncontent-length: {size}\r\n\r\n".encode() + body


@asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Lets `serve(number, writer)` answer each request; gives the base URL and the requests."""
    requests: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[16:]) for line in head.lower().split(b"\r\n")
                     if line.startswith(b"content-length: ")),
                    0,
                )  # fmt: skip
                await reader.readexactly(length)
                requests.append(head)
                await serve(len(requests), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/api/v1", requests


async def no_wait(_: float) -> None:
    await asyncio.sleep(0)


def flora_at(base: str, **settings: float) -> FloraClient:
    return FloraClient(base_url=base, api_key="sk_test_1", sleep=no_wait, **settings)  # type: ignore[arg-type]


async def start(flora: FloraClient) -> None:
    await flora.start_run("tech_1", body="{}", idempotency_key="k")


def cut_first(reply: bytes) -> Serve:
    """Answers the first request with `reply` and a closed connection, all others well."""

    async def serve(number: int, writer: asyncio.StreamWriter) -> None:
        writer.write(reply if number == 1 else answer(RUN))
        if number == 1:
            writer.close()

    return serve


CUTS = {
    "before": b"",
    "head": b"HTTP/1.1 200 OK\r\ncont",
    "body": answer(RUN[:20], length=len(RUN)),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
async def test_a_cut_read_is_repeated(cut: bytes) -> None:
    """A read whose connection is cut, wherever, is made again."""
    async with server(cut_first(cut)) as (base, requests), flora_at(base) as flora:
        assert (await flora.get_any_run("run_1")).run_id == "run_1"
    assert len(requests) == 2


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
async def test_a_cut_start_is_not(cut: bytes) -> None:
    """A start whose connection is cut, wherever, is in doubt and not made again."""
    async with server(cut_first(cut)) as (base, requests), flora_at(base) as flora:
        with pytest.raises(FloraUnreachable) as caught:
            await start(flora)
    assert caught.value.may_have_acted
    assert len(requests) == 1


async def test_a_start_meets_no_connection_that_closes() -> None:
    """Neither one that was idle for a while, nor while the database takes its time before it."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(number: int, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(RUN))
        writers.append(writer)
        if number == 1:
            asyncio.get_running_loop().call_later(3.3, writer.close)

    async def slow_fence() -> None:
        await asyncio.sleep(1.5)

    async with server(serve) as (base, requests), flora_at(base) as flora:
        await flora.get_run("tech_1", "run_1")
        await asyncio.sleep(2.2)
        await flora.start_run("tech_1", body="{}", idempotency_key="k", fence=slow_fence)
        await flora.get_run("tech_1", "run_1")
        assert len(requests) == 3
        assert writers[1] is writers[2]  # what is not idle is used again


async def test_nobody_listens() -> None:
    """Where no connection can be made, a start has certainly not acted."""
    async with flora_at(f"http://127.0.0.1:{free_port()}", deadline=30) as flora:
        with pytest.raises(FloraUnreachable) as caught:
            await start(flora)
    assert not caught.value.may_have_acted


async def test_the_time_of_an_answer_begins_with_its_request() -> None:
    """A host that takes no connection has got no request, however short an answer is waited for."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        with socket.create_connection(address):  # the one connection that waits to be accepted
            async with flora_at(f"http://127.0.0.1:{address[1]}/api/v1") as flora:
                with pytest.raises(FloraUnreachable) as caught:
                    await flora.get_run("tech_1", "run_1", answer_seconds=0.1, deadline=0.5)
    assert not caught.value.may_have_acted


async def test_a_slow_answer() -> None:
    """An answer that takes longer than the deadline is given up, and the next one is not hurt."""

    async def serve(number: int, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(RUN[:9], length=len(RUN)) if number == 1 else answer(RUN))
        if number == 1:
            let_pass(11)

    async with server(serve) as (base, requests), flora_at(base, concurrency=1) as flora:
        with pytest.raises(FloraUnreachable, match="within 10 s") as caught:
            await flora.get_any_run("run_1", deadline=10)
        assert caught.value.timed_out
        await flora.get_any_run("run_1")
    assert len(requests) == 2


async def test_an_answer_that_drips() -> None:
    """An answer whose bytes come one by one, always in time for the next read, ends all the same at
    the call's deadline."""

    async def serve(number: int, writer: asyncio.StreamWriter) -> None:
        for place, byte in enumerate(answer(RUN)):
            writer.write(bytes([byte]))
            await writer.drain()
            await settle()
            if place == 60:  # in the body
                let_pass(11)

    async with server(serve) as (base, requests), flora_at(base) as flora:
        with pytest.raises(FloraUnreachable, match="within 10 s") as caught:
            await flora.get_any_run("run_1", deadline=10)
    assert caught.value.timed_out
    assert len(requests) == 1


async def test_no_more_requests_at_a_time_than_allowed() -> None:
    """Thirty calls at once reach FLORA two at a time, over two connections."""
    going = most = 0
    connections = set()

    async def serve(_: int, writer: asyncio.StreamWriter) -> None:
        nonlocal going, most
        connections.add(writer.get_extra_info("peername"))
        going += 1
        most = max(most, going)
        await settle()  # long enough for a third, were one on its way
        going -= 1
        writer.write(answer(RUN))

    async with server(serve) as (base, requests), flora_at(base, concurrency=2) as flora:
        await asyncio.gather(*(flora.get_any_run("run_1") for _ in range(30)))
    assert (len(requests), most, len(connections)) == (30, 2, 2)


async def test_a_redirect_gets_no_key() -> None:
    """A redirect to another server is not followed: it sees no request at all."""

    async def fine(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(RUN))

    async with server(fine) as (elsewhere, asked):

        async def away(_: int, writer: asyncio.StreamWriter) -> None:
            writer.write(answer(b"", status=f"302 Found\r\nlocation: {elsewhere}/runs/run_1"))

        async with server(away) as (base, _), flora_at(base) as flora:
            with pytest.raises(FloraRefusal):
                await flora.get_any_run("run_1")
    assert asked == []


async def test_no_proxy_sees_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment is not used for a FLORA on this machine."""
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")

    async def fine(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(RUN))

    async with server(fine) as (base, requests), flora_at(base) as flora:
        await flora.get_any_run("run_1")
    assert len(requests) == 1


async def test_a_cancelled_request_leaves_room_for_others() -> None:
    """At whatever moment it was cancelled, no connection counts as busy for ever, and the key and
    the hooks stay."""
    hooked = []

    async def hook(request: httpx.Request) -> None:
        hooked.append(request.headers["authorization"])

    async def serve(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(RUN))

    async def read(number: int) -> None:
        await cancelled_at(number, flora.get_run("tech_1", "run_1"))

    async with server(serve) as (base, _), flora_at(base, concurrency=1) as flora:
        flora.http.event_hooks = {"request": [hook]}
        for number in range(1, 40):
            reading = asyncio.create_task(read(number))
            await asyncio.wait([reading])
            async with asyncio.timeout(5):
                await flora.get_run("tech_1", "run_1")
            if not reading.cancelled():
                break
        assert 5 < number < 39
    assert set(hooked) == {"Bearer sk_test_1"}


async def test_a_request_that_is_cancelled_twice_leaves_no_connection() -> None:
    """The second time while the connections are closed, which were used before."""
    together, never, writers = asyncio.Barrier(4), asyncio.Event(), list[asyncio.StreamWriter]()

    async def serve(number: int, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await (together if number < 5 else never).wait()
        writer.write(answer(RUN))

    async with server(serve) as (base, requests), flora_at(base, concurrency=4) as flora:
        await asyncio.gather(*(flora.get_run("tech_1", "run_1") for _ in range(4)))
        old, reading = flora.http, asyncio.create_task(flora.get_run("tech_1", "run_1"))
        await eventually(lambda: len(requests) == 5)
        reading.cancel()
        await eventually(lambda: old.is_closed, interval=0)
        reading.cancel()
        await asyncio.wait([reading])
        never.set()
        try:
            await eventually(lambda: all(writer.is_closing() for writer in writers), timeout=5)
        finally:
            for writer in writers:
                writer.close()
