"""A pooler in front of PostgreSQL, as far as it matters: one that loses notifications, and one that
takes no settings at the start of a session."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

from tests.support.waiting import close_server

Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_SSL = 80877103
_NOTIFICATION = b"A"


@asynccontextmanager
async def losing_notices(url: str) -> AsyncIterator[str]:
    """Passes everything on but notifications, as where each transaction has another connection."""
    host, port = urlsplit(url).hostname, urlsplit(url).port

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _refuse_tls(reader, writer)
        from_server, to_server = await asyncio.open_connection(host, port)

        async def up() -> None:
            while data := await reader.read(65536):
                to_server.write(data)
            to_server.close()

        async def down() -> None:
            while True:
                head = await from_server.readexactly(5)
                rest = await from_server.readexactly(struct.unpack("!I", head[1:])[0] - 4)
                if head[:1] != _NOTIFICATION:
                    writer.write(head + rest)

        try:
            await asyncio.gather(up(), down())
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            to_server.close()

    async with _listening(connected) as at:
        yield urlunsplit(urlsplit(url)._replace(netloc=f"postgres@127.0.0.1:{at}"))


@asynccontextmanager
async def taking_no_settings(url: str) -> AsyncIterator[str]:
    """Refuses a session that brings settings, as PgBouncer does where it was not told of them."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _refuse_tls(reader, writer)
        await reader.read(65536)
        said = "unsupported startup parameter: statement_timeout"
        fields = b"SFATAL\0VFATAL\0C08P01\0" + f"M{said}\0\0".encode()
        writer.write(b"E" + struct.pack("!I", len(fields) + 4) + fields)
        await writer.drain()
        writer.close()

    async with _listening(connected) as at:
        yield urlunsplit(urlsplit(url)._replace(netloc=f"postgres@127.0.0.1:{at}"))


@asynccontextmanager
async def saying_nothing() -> AsyncIterator[int]:
    """Takes connections and never says a word, whatever it is taken for; the port."""
    ended = asyncio.Event()

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ended.wait()
        writer.close()

    async with _listening(connected) as port:
        yield port
        ended.set()


@asynccontextmanager
async def _listening(connected: Connected) -> AsyncIterator[int]:
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        await close_server(server)


async def _refuse_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """asyncpg asks for TLS first, and does without it where it is told to."""
    assert struct.unpack("!II", await reader.readexactly(8))[1] == _SSL
    writer.write(b"N")
