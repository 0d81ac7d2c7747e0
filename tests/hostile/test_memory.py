"""The memory of `tracker serve` under attack by anonymous clients and a signed callback: a real
process grows by no more than 64 MB."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.processes import Process, open_sandbox
from tests.support.waiting import eventually
from tests.web.callbacks import PATH, event, signed
from tests.web.serving import post

SECRET = "whsec_simulator"
MOST = 64 * 1024 * 1024
PAGE = 2_000_000
DEEP = 900 * b"[" + b",".join(120_000 * [b"1"]) + 900 * b"]"


class Attacked:
    """A tracker under attack, and how much it has grown."""

    def __init__(self, process: Process, base_url: str) -> None:
        self.base_url = base_url
        self._process = process
        self._before = process.peak_memory

    @property
    def grown(self) -> int:
        """The growth of its peak memory in bytes."""
        return self._process.peak_memory - self._before

    def connect(self) -> socket.socket:
        """A client that reads almost nothing of its answers."""
        address = urlsplit(self.base_url)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        client.setblocking(False)
        return client

    async def still_answers(self) -> None:
        """It still answers after the attack."""
        async with httpx.AsyncClient(base_url=self.base_url, timeout=20) as client:

            async def served() -> bool:
                return (await client.get("/healthz")).status_code == 200

            await eventually(served, timeout=20)


@pytest.fixture
async def attacked(tmp_path: Path, sqlite_url: str) -> AsyncIterator[Attacked]:
    """`tracker serve` after a first callback and a first page."""
    async with open_sandbox(tmp_path, sqlite_url, forks=False) as sandbox:
        process = await sandbox.serve("--no-worker")
        async with httpx.AsyncClient(base_url=sandbox.tracker, timeout=20) as client:
            body = event("run_first")
            assert (await client.post(PATH, content=body, headers=signed(body, SECRET))).is_success
            assert (await client.get("/deliveries/whd_run_first")).status_code == 200
        yield Attacked(process, sandbox.tracker)


async def push(client: socket.socket, data: bytes, patience: float = 0.2) -> None:
    """Sends as much of it as is taken."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError, ConnectionError):
        for start in range(0, len(data), 65_536):
            async with asyncio.timeout(patience):
                await loop.sock_sendall(client, data[start : start + 65_536])


async def test_unfinished_heads(attacked: Attacked) -> None:
    """Hundreds of heads of tiny headers that do not end."""
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + 13_000 * b"a:b\r\n"
    clients = [attacked.connect() for _ in range(320)]
    await asyncio.gather(*(push(client, head, 5) for client in clients))
    await attacked.still_answers()
    assert attacked.grown < MOST
    for client in clients:
        client.close()


async def test_pipelined_requests_with_unread_answers(attacked: Attacked, thorough: bool) -> None:
    """Requests with bodies, sent on and on by clients that read none of their answers."""
    large = post(PATH, 120_000 * b"x", "Flora-Signature: t=1,v1=00")
    clients = [attacked.connect() for _ in range(20 if thorough else 10)]
    await asyncio.gather(*(push(client, 200 * large, 1) for client in clients))
    await attacked.still_answers()
    assert attacked.grown < MOST
    for client in clients:
        client.close()


async def test_the_page_of_a_deep_callback(attacked: Attacked) -> None:
    """One of 250 KB, nested as deeply as it can be, opened on its page and on its run's."""
    body = event("run_deep", padding=0).replace(b'"padding": 0', b'"padding": ' + DEEP)
    assert 240_000 < len(body) < 256 * 1024
    async with httpx.AsyncClient(base_url=attacked.base_url, timeout=20) as client:
        answer = await client.post(PATH, content=body, headers=signed(body, SECRET))
        assert answer.status_code == 200

        async def applied() -> bool:
            return (await client.get("/api/runs/run_deep")).status_code == 200

        await eventually(applied)
        for path in ("/deliveries/whd_run_deep", "/runs/run_deep"):
            page = await client.get(path)
            assert page.status_code == 200
            assert len(page.content) < PAGE
    assert attacked.grown < MOST
