"""An application behind the very server that `tracker serve` uses, and clients without rules."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp

from tracker.web.http import Limits
from tracker.web.http.server import Server, listen


@asynccontextmanager
async def serving(
    app: ASGIApp, port: int = 0, *, limits: Limits | None = None
) -> AsyncIterator[str]:
    """Serves `app` on a port of 127.0.0.1 (0: a free one) in this loop, and says where."""
    ready = asyncio.Event()
    with listen("127.0.0.1", port, local_only=True, limits=limits) as sockets:
        server = Server(
            app,
            on_ready=ready.set,
            on_stop=getattr(app, "stop", lambda: None),
            take=getattr(app, "take", None),
            limits=limits,
        )
        task = asyncio.create_task(server.serve(sockets=sockets))
        try:
            await ready.wait()
            yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        finally:
            server.stop()
            await task


@dataclass(frozen=True, slots=True)
class Answer:
    """What a raw connection got back for one request."""

    status: int
    headers: dict[str, str]
    body: bytes


class _ReaderToReset(asyncio.StreamReader):
    """Takes the reset of a connection for its end: what came before can still be read."""

    def set_exception(self, exc: BaseException) -> None:
        if isinstance(exc, ConnectionError):
            self.feed_eof()
        else:
            super().set_exception(exc)


class Wire:
    """A TCP connection on which a test writes whatever it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *parts: bytes) -> None:
        """Writes; that the server hung up in the middle is for `answer` to find out."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(b"".join(parts))
            await self._writer.drain()

    async def answer(self) -> Answer:
        """Reads one answer."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, _, rest = head.partition("\r\n")
        headers = {
            name.lower(): value for name, value in re.findall(r"([^:\r\n]+): ([^\r\n]*)", rest)
        }
        body = await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(line.split()[1]), headers, body)

    async def hung_up(self) -> bool:
        """Waits until the server closes the connection; false where it sends something instead."""
        return await self._reader.read(1) == b""

    def send_no_more(self) -> None:
        """Closes this side alone."""
        self._writer.write_eof()

    def close(self) -> None:
        """Hangs up."""
        self._writer.close()

    def cut(self) -> None:
        """Hangs up as a process that was killed does."""
        self._writer.transport.abort()


@asynccontextmanager
async def wire(base_url: str, *, may_reset: bool = False) -> AsyncIterator[Wire]:
    """A raw connection to the server at `base_url`; a test that waits on it in vain fails.

    With `may_reset` the server may close it before it has read all that the test sends.
    """
    host, _, port = base_url.removeprefix("http://").partition(":")
    async with asyncio.timeout(10):
        loop = asyncio.get_running_loop()
        reader = _ReaderToReset() if may_reset else asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.create_connection(lambda: protocol, host, int(port))
        connection = Wire(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        try:
            yield connection
        finally:
            connection.close()


def post(path: str, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    """A POST as bytes; `length` is what it says of itself, by default the truth."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers]
    if not any(line.lower().startswith("transfer-encoding") for line in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunk(data: bytes) -> bytes:
    """One chunk of a body of unknown length; an empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)
