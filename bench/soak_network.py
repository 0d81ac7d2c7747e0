"""Callbacks among thousands of clients that do what they like with their connections.

    python -m bench.soak_network [--database sqlite|postgres|both] [--seconds 60]
                                 [--connections 2000] [--json FILE]

So many connections at once say nothing, bring a head or a body byte by byte, offer other protocols,
ask many things ahead, send heads without an end and large bodies that nobody signed; whoever
is cut off comes back. Meanwhile callbacks come in. Each that is acknowledged has to be stored, all
of them have to be acknowledged, and each within the ten seconds that FLORA waits.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from tests.e2e.processes import Sandbox, open_sandbox
from tests.support.databases import Background, PostgresDatabases, migrate, sqlite_url_of
from tests.support.postgres import PostgresServer
from tests.web.callbacks import PATH, event, signed
from tests.web.serving import chunk, post
from tracker.store.engine import Database
from tracker.store.schema import deliveries

SECRET = "whsec_simulator"  # noqa: S105  (of the processes of `tests.e2e`)
SENDERS = 8
FLORA_WAITS = 10.0
STEP = 1.0
"""Seconds between two bytes of a slow client."""
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
UNSIGNED = ("Flora-Signature: t=1,v1=00", "Transfer-Encoding: chunked")

Figures = dict[str, Any]


async def _silent() -> AsyncIterator[bytes]:
    while True:
        yield b""


async def _slow_head() -> AsyncIterator[bytes]:
    yield GET
    yield b"X-Slow: "
    while True:
        yield b"a"


async def _slow_body() -> AsyncIterator[bytes]:
    yield post(PATH, b"", *UNSIGNED)
    while True:
        yield chunk(b"x")


async def _large_body() -> AsyncIterator[bytes]:
    yield post(PATH, b"", *UNSIGNED) + chunk(200_000 * b"x")
    while True:
        yield chunk(b"x")


async def _endless_head() -> AsyncIterator[bytes]:
    yield GET
    while True:
        yield b"X-Long: " + 8000 * b"a" + b"\r\n"


async def _far_ahead() -> AsyncIterator[bytes]:
    while True:
        yield 20 * (GET + b"\r\n")


async def _no_http() -> AsyncIterator[bytes]:
    yield b""
    yield b"\x16\x03\x01 this is not HTTP\r\n\r\n"
    while True:
        yield b""


KINDS: dict[str, tuple[int, Callable[[], AsyncIterator[bytes]]]] = {
    "silent": (40, _silent),
    "slow head": (25, _slow_head),
    "slow body": (25, _slow_body),
    "large body": (4, _large_body),
    "endless head": (2, _endless_head),
    "far ahead": (2, _far_ahead),
    "no HTTP": (2, _no_http),
}
"""How many of a hundred connections do what."""


class Clients:
    """The clients; whoever is cut off comes back a step later."""

    def __init__(self, sandbox: Sandbox, size: int) -> None:
        self._port = sandbox.port
        self.open = self.most = 0
        self.cut: Counter[str] = Counter()
        hundred = [kind for kind, (share, _) in KINDS.items() for _ in range(share)]
        self._tasks = [
            asyncio.create_task(self._client(hundred[number * 37 % 100])) for number in range(size)
        ]

    async def end(self) -> None:
        """All hang up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, kind: str) -> None:
        while True:
            with contextlib.suppress(OSError):
                await self._one(kind)
            await asyncio.sleep(STEP)

    async def _one(self, kind: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            sends = asyncio.create_task(self._send(KINDS[kind][1], writer))
            try:
                while await reader.read(65536):
                    pass
            finally:
                sends.cancel()
            self.cut[kind] += 1
        except ConnectionError:
            self.cut[kind] += 1
        finally:
            self.open -= 1
            writer.transport.abort()

    async def _send(
        self,
        sends: Callable[[], AsyncIterator[bytes]],
        writer: asyncio.StreamWriter,
    ) -> None:
        with contextlib.suppress(ConnectionError):
            async for data in sends():
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(STEP)


class Callers:
    """What FLORA sends meanwhile, on connections of all ages."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._url = sandbox.tracker
        self.acknowledged: list[str] = []
        self.refused: Counter[str] = Counter()
        self.longest = 0.0
        self._numbers = itertools.count()

    async def send(self, until: float) -> None:
        """One of them, one callback after the other; every other one on a new connection."""
        kept = httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=FLORA_WAITS)
        async with kept:
            while time.monotonic() < until:
                number = next(self._numbers)
                if number % 2:
                    await self._one(kept, number)
                else:
                    async with httpx.AsyncClient(
                        base_url=self._url, trust_env=False, timeout=FLORA_WAITS
                    ) as new:
                        await self._one(new, number)
                await asyncio.sleep(0.05)

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        body = event(f"run_{number}")
        began = time.monotonic()
        try:
            answer = await client.post(PATH, content=body, headers=signed(body, SECRET))
            said = str(answer.status_code)
        except httpx.TransportError as error:
            said = type(error).__name__
        self.longest = max(self.longest, time.monotonic() - began)
        if said == "200":
            self.acknowledged.append(f"whd_run_{number}")
        else:
            self.refused[said] += 1


async def soak(database: str, seconds: float, connections: int) -> Figures:
    """One set of clients on one database; the figures."""
    async with _opened(database) as sandbox:
        server = await sandbox.serve("--no-worker")
        clients, callers = Clients(sandbox, connections), Callers(sandbox)
        until = time.monotonic() + seconds
        await asyncio.gather(*(callers.send(until) for _ in range(SENDERS)))
        await clients.end()
        peak = server.peak_memory
        status = await server.stop()
        async with await Database.open(sandbox.database_url) as db, db.read() as connection:
            stored = set(await connection.scalars(sa.select(deliveries.c.delivery_id)))
        lost = [one for one in callers.acknowledged if one not in stored]
        broken = [f"not acknowledged: {what} ({n} times)" for what, n in callers.refused.items()]
        if lost:
            broken.append(f"acknowledged and not stored: {lost[:5]}")
        if callers.longest >= FLORA_WAITS:
            broken.append(f"an answer took {callers.longest:.1f} s")
        if clients.most < connections:
            broken.append(f"only {clients.most} connections were ever open")
        if status or "Traceback" in server.log:
            broken.append(f"exit status {status}, or a traceback in the log")
        return {
            "connections": clients.most,
            "clients_cut": dict(clients.cut),
            "slow_senders_cut": clients.cut["slow head"] + clients.cut["slow body"],
            "callbacks_acknowledged": len(callers.acknowledged),
            "longest_answer_seconds": round(callers.longest, 2),
            "peak_memory_mb": peak // 1024**2,
            "lost": len(lost),
            "broken": broken,
        }


@asynccontextmanager
async def _opened(database: str) -> AsyncIterator[Sandbox]:
    """A sandbox on a new database."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        if database == "sqlite":
            url = sqlite_url_of(Path(folder) / "tracker.db")
        else:
            server = stack.enter_context(PostgresServer())
            background = Background()
            databases = PostgresDatabases(server.url(), background)
            databases.create("tracker")
            databases.close()
            background.close()
            url = server.url("tracker")
            await migrate(url)
        async with open_sandbox(Path(folder), url, forks=False) as sandbox:
            yield sandbox


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = options.connections + 512
    if soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            print(f"this user may open {hard} files, and {needed} are needed", file=sys.stderr)
            return 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    databases = ["sqlite", "postgres"] if options.database == "both" else [options.database]
    figures = {}
    for database in databases:
        print(f"{database}:", flush=True)
        figures[database] = asyncio.run(soak(database, options.seconds, options.connections))
        for name, value in figures[database].items():
            print(f"  {name:24} {value}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"soak": "network", "figures": figures}, indent=2))
    return 1 if any(one["broken"] for one in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
