"""A proxy in place of the one in compose.yaml: a new connection goes to the next receiver, or to
another where that one takes none. It ends TLS where it is given a certificate."""

import asyncio
import itertools
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.waiting import close_server


def certificate_for_localhost(directory: Path) -> tuple[Path, Path]:
    """A certificate that is its own authority, and its key."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@asynccontextmanager
async def balancing(
    port: int, upstreams: Sequence[int], certificate: tuple[Path, Path] | None = None
) -> AsyncIterator[list[int]]:
    """Serves on `port` of 127.0.0.1, by TLS with `certificate` and its key; gives the upstream port
    of each connection so far."""
    taken: list[int] = []
    turns = itertools.count()
    open_ones: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_ones.add(task)
        task.add_done_callback(open_ones.discard)
        async with _closing(writer):
            first = next(turns)
            for number in range(len(upstreams)):
                upstream = upstreams[(first + number) % len(upstreams)]
                with suppress(OSError):
                    theirs = await asyncio.open_connection("127.0.0.1", upstream)
                    break
            else:
                return
            taken.append(upstream)
            async with _closing(theirs[1]):
                await asyncio.gather(_pass(reader, theirs[1]), _pass(theirs[0], writer))

    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
    server = await asyncio.start_server(
        connected, "127.0.0.1", port, ssl=context, ssl_shutdown_timeout=0.2 if context else None
    )
    try:
        yield taken
    finally:
        await close_server(server)
        for task in open_ones:
            task.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand on what comes, to its end."""
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
