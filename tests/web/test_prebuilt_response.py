"""A callback that arrives whole is taken and answered past all layers, with the answer that they
would give."""

import asyncio
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.types import Receive, Scope, Send

from tests.web.callbacks import PATH, event, signature
from tests.web.conftest import Serve
from tests.web.serving import Answer, post, serving, wire
from tracker.web.app import build_app
from tracker.web.http.responses import Answer as Write


@pytest.mark.parametrize("number", ["", "X-Request-Id: of-the-proxy"], ids=["ours", "theirs"])
@pytest.mark.alone
async def test_it_is_the_same_either_way(serve: Serve, sqlite_url: str, number: str) -> None:
    """Headers and body: taken whole, in two parts, and on a connection that ends with it."""

    async def ask(*more: str) -> Answer:
        body = event("run_1")
        headers = [f"Flora-Signature: {signature(body)}", *more, *([number] if number else [])]
        async with wire(site.base_url) as asking:
            await asking.send(post(PATH, body, *headers))
            return await asking.answer()

    async def ask_in_parts() -> Answer:
        body = event("run_1")
        headers = [f"Flora-Signature: {signature(body)}", *([number] if number else [])]
        async with wire(site.base_url) as asking:
            await asking.send(post(PATH, body[:9], *headers, length=len(body)))
            assert (await site.client.get("/healthz")).status_code == 200  # the first part is there
            await asking.send(body[9:])
            return await asking.answer()

    async with serve(sqlite_url) as site:
        await ask()
        await site.services.applier.drain()
        at_once = await ask()
        in_parts = await ask_in_parts()
        through_all = await ask("Connection: close")
    assert through_all.headers.pop("connection") == "close"
    for answer in (at_once, in_parts, through_all):
        assert answer.headers.pop("date")
        request_id = answer.headers.pop("x-request-id")
        assert request_id == "of-the-proxy" if number else request_id
    assert at_once == in_parts == through_all
    assert at_once.body == b'{"outcome":"applied","repeated":true}'


@pytest.mark.alone
async def test_it_is_one_packet(serve: Serve, sqlite_url: str) -> None:
    """Head and body come together, however often one sends on a connection."""
    body = event("run_1")
    async with serve(sqlite_url) as site:
        address = urlsplit(site.base_url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for _ in range(20):
            writer.write(post(PATH, body, f"Flora-Signature: {signature(body)}"))
            packet = await reader.read(65_536)  # what is there, and not more
            head, _, answer = packet.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert answer
        writer.close()


@pytest.mark.alone
async def test_it_keeps_its_turn(serve: Serve, sqlite_url: str) -> None:
    """Requests that were sent ahead are answered in order, behind an invitation to go on too."""
    body = event("run_1")
    head = post(PATH, b"", f"Flora-Signature: {signature(body)}", "Expect: 100-continue",
                length=len(body))  # fmt: skip
    page = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with serve(sqlite_url) as site, wire(site.base_url) as asking:
        await asking.send(page, head, body, page)
        assert (await asking.answer()).body == b'{"status":"ok"}'
        line = await asking._reader.readuntil(b"\r\n\r\n")
        if line.startswith(b"HTTP/1.1 100"):
            line = await asking._reader.readuntil(b"\r\n\r\n")
        assert line.startswith(b"HTTP/1.1 200")
        assert await asking._reader.readexactly(38) == b'{"outcome":"waiting","repeated":false}'
        assert (await asking.answer()).body == b'{"status":"ok"}'


@pytest.mark.alone
async def test_it_is_used(serve: Serve, sqlite_url: str) -> None:
    """An authentic callback takes the short way, and a forged one is refused by the other: what is
    measured is the first."""
    taken: list[bool] = []
    body = event("run_1")
    async with serve(sqlite_url) as site:
        app = build_app(site.services)

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope, receive, send)

        def take(scope: dict[str, Any], body: bytes, answer: Write) -> bool:
            assert app.take is not None
            taken.append(app.take(scope, body, answer))
            return taken[-1]

        watched.take = take  # type: ignore[attr-defined]
        async with serving(watched) as base_url, wire(base_url) as asking:
            for signed_body, status in ((body, 200), (b"another", 401), (body, 200)):
                await asking.send(post(PATH, body, f"Flora-Signature: {signature(signed_body)}"))
                assert (await asking.answer()).status == status
    assert taken == [True, False, True]
