"""How an answer leaves: in as few packets as it can, and in order."""

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.web.conftest import Serve
from tests.web.serving import wire
from tracker.web.http.connection import WriteCoalescer
from tracker.web.http.server import loop_factory

pytestmark = pytest.mark.alone

ASK = b"%b /healthz HTTP/1.1\r\nHost: localhost\r\n%b\r\n"


async def test_an_answer_is_one_packet(serve: Serve, sqlite_url: str) -> None:
    """Head and body come together, however often one asks on a connection."""
    async with serve(sqlite_url) as site:
        address = urlsplit(site.base_url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for _ in range(20):
            writer.write(ASK % (b"GET", b""))
            packet = await reader.read(65_536)  # what is there, and not more
            head, _, body = packet.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert body
        writer.close()


async def test_an_answer_without_a_body_is_sent_all_the_same(serve: Serve, sqlite_url: str) -> None:
    """HEAD is answered on a connection that stays, and on one that ends with it."""
    async with serve(sqlite_url) as site:
        for more in (b"", b"Connection: close\r\n"):
            async with wire(site.base_url) as asking:
                await asking.send(ASK % (b"HEAD", more), b"" if more else ASK % (b"GET", b""))
                head = await asking._reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                if not more:
                    assert (await asking.answer()).status == 200


def test_events_for_a_disconnected_reader_are_dropped() -> None:
    """A head that is kept back when the connection is cut is no error, on the loop that serves."""
    broken: list[dict[str, Any]] = []

    async def answer_too_late() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: broken.append(context))
        ours, theirs = socket.socketpair()
        with theirs:
            transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
            coalescer = WriteCoalescer(transport, loop)
            transport.abort()
            coalescer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            for _ in range(3):
                await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(answer_too_late())
    assert not broken
