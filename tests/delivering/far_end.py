"""A raw server for files: it answers what it is told to, byte for byte, and keeps the requests."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tests.support.waiting import close_server, free_port

Asked = dict[str, str]
"""The headers of a request, in lower case; its first line under `""`."""
Reply = bytes | Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


class FarEnd:
    """Gives the replies in their order, the last one for ever, and hangs up after each."""

    def __init__(self, port: int, *replies: Reply, scheme: str = "http") -> None:
        self.port = port
        self._scheme = scheme
        self.asked: list[Asked] = []
        self._replies = list(replies)

    def url(self, path: str = "/file.png", *, host: str = "127.0.0.1") -> str:
        return f"{self._scheme}://{host}:{self.port}{path}"

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            asked = {"": first}
            for line in lines:
                name, _, value = line.partition(": ")
                asked[name.lower()] = value
            self.asked.append(asked)
            reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
            if isinstance(reply, bytes):
                writer.write(reply)
                await writer.drain()
            else:
                await reply(asked, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def far_end(*replies: Reply, tls: ssl.SSLContext | None = None) -> AsyncIterator[FarEnd]:
    """A server of its own, for as long as the block lasts."""
    end = FarEnd(free_port(), *replies, scheme="https" if tls else "http")
    server = await asyncio.start_server(end.connected, "127.0.0.1", end.port, ssl=tls)
    try:
        yield end
    finally:
        await close_server(server)


def answer(
    body: bytes = b"", status: str = "200 OK", *, length: int | None = -1, **headers: str
) -> bytes:
    """A whole answer. `length` is what it says of its size: the truth, a lie, or nothing."""
    lines = [f"HTTP/1.1 {status}", "connection: close"]
    if length is not None:
        lines.append(f"content-length: {len(body) if length == -1 else length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def ranged(body: bytes, *, tag: str, first: int | None = None) -> Reply:
    """A server that knows ranges: it goes on where the same state of the file is asked for.

    `first` is how many bytes it sends before it hangs up, of a request for all.
    """

    async def reply(asked: Asked, writer: asyncio.StreamWriter) -> None:
        wanted = asked.get("range", "").removeprefix("bytes=").removesuffix("-")
        if wanted and asked.get("if-range") == tag:
            begin = int(wanted)
            part = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            writer.write(answer(body[begin:], "206 Partial Content", etag=tag, content_range=part))
        else:
            writer.write(answer(body[:first], length=len(body), etag=tag))
        await writer.drain()

    return reply
