"""One attempt: what is sent, where it may lead, and how an answer is read."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest

from tests.delivering.conftest import endpoint
from tests.delivering.far_end import FarEnd, far_end
from tests.delivering.far_end import answer as ok
from tests.delivering.test_addresses import fixed
from tests.deploy.tls import certificate_for_localhost
from tests.support.endpoint import SECRET, Receiver
from tests.support.waiting import cancelled_at, close_server, eventually, let_pass
from tracker.core.clock import utc_now
from tracker.core.waiting import cancel
from tracker.delivering import addresses
from tracker.delivering.addresses import Address
from tracker.delivering.endpoints import EndpointClient, EndpointResolver
from tracker.store.writing.messages import Attempt, Claim


@asynccontextmanager
async def client(receiver: Receiver, **changes: object) -> AsyncIterator[EndpointClient]:
    """A client of the receiver's endpoint."""
    options = {name: changes.pop(name) for name in ("answer_seconds", "resolver") & changes.keys()}
    one = EndpointClient(endpoint(receiver, **changes), clock=utc_now, **options)  # type: ignore[arg-type]
    try:
        yield one
    finally:
        await one.aclose()


async def test_a_request_is_standard_and_connections_are_kept() -> None:
    """`standardwebhooks` verifies it by the raw body, whatever that holds; requests to one endpoint
    share a connection."""
    async with Receiver() as receiver, client(receiver) as one:
        for number in range(3):
            body = '{"type":"run.settled","data":{"run_id":"Größe 猫 \\u0000"}}'
            attempt = await one.send(Claim(f"msg_{number}", body, utc_now()))
            assert (attempt.status, attempt.delivered) == (200, True)
        assert [got.verified for got in receiver.got] == [True] * 3
        assert [got.message_id for got in receiver.got] == ["msg_0", "msg_1", "msg_2"]
        assert receiver.got[0].headers["user-agent"].startswith("flora-run-tracker/")
        assert receiver.connections == 1


BODY = '{"type":"run.settled","data":{}}'


async def test_an_attempt_is_limited_in_time() -> None:
    """An endpoint that never answers costs the time of an attempt, and no more."""
    async with Receiver(silent=True) as receiver, client(receiver, answer_seconds=0.2) as one:
        began = time.monotonic()
        attempt = await one.send(Claim("msg_1", BODY, utc_now()))
        assert time.monotonic() - began < 5
        assert (attempt.status, attempt.error) == (None, "no answer within 0.2 s")


async def test_an_interrupted_attempt_keeps_the_address_that_was_reached() -> None:
    """It costs the connection; the endpoint's other address, which may be silent, is not tried."""
    resolver, is_asked = fixed("127.0.0.2", "127.0.0.1"), asyncio.Event()

    async def hang(*_: object) -> None:
        is_asked.set()
        await asyncio.sleep(60)

    async with Receiver() as receiver, far_end(ok(), hang, ok()) as end:
        url, other = end.url(host="two.example"), FarEnd(end.port, ok())
        async with client(receiver, url=url, resolver=resolver) as one:
            message = Claim("msg_1", BODY, utc_now())
            assert (await one.send(message)).delivered
            server = await asyncio.start_server(other.connected, "127.0.0.2", end.port)
            sending = asyncio.create_task(one.send(message))
            await is_asked.wait()
            await cancel(sending)
            assert (await one.send(message)).delivered
            await close_server(server)
    assert (len(end.asked), len(other.asked)) == (3, 0)


async def test_a_cancelled_attempt_keeps_no_connection() -> None:
    """At whatever moment an attempt is over or interrupted, its connection is closed or used by the
    next one."""
    opened = set[asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(len(BODY))
                writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\nok")
        opened.remove(writer)
        writer.close()

    async def cancelled(number: int) -> None:
        await cancelled_at(number, one.send(message))

    async with Receiver() as receiver:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with client(receiver, url=url) as one:
            message = Claim("msg_1", BODY, utc_now())
            for number in range(1, 80):
                sending = asyncio.create_task(cancelled(number))
                await asyncio.wait([sending])
                assert (await one.send(message)).delivered
                await eventually(lambda: len(opened) <= 1, timeout=5)
                if not sending.cancelled():
                    break
            assert 5 < number < 79
        server.close()


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
OnHead = Callable[[httpx.Response], Awaitable[None]]


async def answered(answer: Answer, on_head: OnHead | None = None) -> Attempt:
    """The attempt at a server that answers like this; `on_head` is called before the body is
    read."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            await answer(writer)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    async with Receiver() as receiver:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with client(receiver, url=url, answer_seconds=30.0) as one:
            one._http.current.event_hooks = {"response": [on_head] if on_head else []}
            attempt = await one.send(Claim("msg_1", BODY, utc_now()))
        server.close()
        return attempt


async def test_the_status_decides() -> None:
    """What was answered 2xx is delivered, also where the rest of the answer is cut; an endless
    answer is not read, and a packed one is not shown."""

    async def cut(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 X\r\nContent-Length: 100\r\n\r\n")
        await writer.drain()

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"3E8\r\n" + b"x" * 1000 + b"\r\n")
            await writer.drain()

    async def packed(writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 X\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\0"
        )
        await writer.drain()

    for answer in (cut, endless, packed):
        attempt = await answered(answer)
        assert attempt.delivered, answer
        assert len(attempt.answer or "") <= 1000


async def test_the_status_decides_where_the_rest_stalls() -> None:
    """What was answered 2xx is delivered, although the time of the attempt ends while the rest of
    the answer is waited for."""

    async def time_is_over(_: httpx.Response) -> None:
        let_pass(31)

    async def stalling(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 100\r\n\r\nabc")
        await writer.drain()
        await asyncio.sleep(60)

    attempt = await answered(stalling, on_head=time_is_over)
    assert attempt.delivered
    assert len(attempt.answer or "") <= 1000


@pytest.mark.parametrize(("asked", "seconds"), [("600", 600.0), ("99999", 3600.0), ("x", None)])
async def test_an_endpoint_may_ask_for_an_hour(asked: str, seconds: float | None) -> None:
    """The wait that a refusal asks for counts up to an hour, as documented."""
    headers = {"Retry-After": asked}
    async with Receiver(status=503, headers=headers) as receiver, client(receiver) as one:
        assert (await one.send(Claim("msg_1", BODY, utc_now()))).retry_after == seconds


async def test_nonsense_is_a_failed_attempt() -> None:
    """An answer that is no HTTP, and endless headers, are a failure like another."""

    async def nonsense(writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\r\n\r\n")
        await writer.drain()

    async def headers(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\n")
        while True:
            writer.write(b"X-More: " + b"x" * 1000 + b"\r\n")
            await writer.drain()

    for answer in (nonsense, headers):
        attempt = await answered(answer)
        assert (attempt.status, attempt.error) == (None, "the connection was cut")


@pytest.mark.parametrize(
    ("address", "allow_private", "error"),
    [
        ("127.0.0.1", False, "not a public address (allow_private = true permits it)"),
        ("169.254.169.254", True, "a cloud's own services, which is never allowed"),
    ],
)
async def test_private_addresses_are_refused(address: str, allow_private: bool, error: str) -> None:
    """Nothing is sent to a private address without `allow_private`, nor to a cloud's services."""

    async def resolver(host: str, port: int) -> list[Address]:
        return [ip_address(address)]

    async with Receiver() as receiver:
        url = f"http://shop.example:{receiver.port}/hook"
        how = {"url": url, "allow_private": allow_private, "resolver": resolver}
        async with client(receiver, **how) as one:
            attempt = await one.send(Claim("msg_1", BODY, utc_now()))
        assert error in (attempt.error or "")
        assert receiver.connections == 0


async def test_certificates_are_verified(tmp_path: Path) -> None:
    """A server whose certificate is not trusted gets nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate_for_localhost(tmp_path))
    async with Receiver(tls=context) as receiver:
        async with client(receiver, url=f"https://localhost:{receiver.port}/hook") as one:
            attempt = await one.send(Claim("msg_1", BODY, utc_now()))
        assert attempt.error == "the server's certificate is not valid, or not trusted here"
        assert receiver.got == []


async def test_cookies_of_an_endpoint_are_not_kept() -> None:
    """They would fill the memory, answer by answer, and grow the head of every later request."""
    setting = Receiver(headers={"Set-Cookie": "id=1; Path=/"})
    async with setting as receiver, client(receiver) as one:
        for number in range(2):
            assert (await one.send(Claim(f"msg_{number}", BODY, utc_now()))).delivered
    assert ["cookie" in got.headers for got in receiver.got] == [False, False]


async def test_a_name_server_that_hangs_delays_one_endpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lookups of an endpoint wait for one another, not for those of others; an answer is used for a
    while."""
    asked: list[str] = []
    held = asyncio.Event()

    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(host)
        if host == "hangs.example":
            while not held.is_set():
                time.sleep(0.01)
        return [(0, 0, 0, "", ("203.0.113.7", 443))]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    hanging, quick = EndpointResolver(), EndpointResolver()
    waiting = [asyncio.create_task(hanging("hangs.example", 443)) for _ in range(40)]
    for _ in range(40):
        assert await quick("quick.example", 443) == [ip_address("203.0.113.7")]
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    held.set()
    await eventually(lambda: all(task.done() for task in waiting))
    assert sorted(asked) == ["hangs.example", "quick.example"]
    assert SECRET not in repr(quick)
