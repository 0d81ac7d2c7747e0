"""A small HTTP server that stores requests byte for byte, and answers by a script."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from tests.support.waiting import close_server


@dataclass(frozen=True)
class Received:
    """One request, with header names in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes

    def signed_with(self, secret: str) -> bool:
        """Whether one of the signatures is that of this secret."""
        parts = [part.partition("=") for part in self.headers["flora-signature"].split(",")]
        (timestamp,) = (value for name, _, value in parts if name == "t")
        message = timestamp.encode() + b"." + self.body
        right = hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()
        return right in [value for name, _, value in parts if name == "v1"]


class Receiver:
    """Answers with the statuses in `script`, one for each request, and with 200 after them.

    The status 0 closes the connection without an answer, and None never answers. `answer` gives the
    status of each request in place of both.
    """

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.script: list[int | None] = []
        self.answer: Callable[[], int | None] = lambda: self.script.pop(0) if self.script else 200
        self.changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/callbacks/flora"
        return self

    async def __aexit__(self, *_: object) -> None:
        await close_server(self._server)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def arrivals(self, count: int, timeout: float = 10) -> list[Received]:
        """Waits until that many requests have come."""
        async with asyncio.timeout(timeout), self.changed:
            await self.changed.wait_for(lambda: len(self.received) >= count)
        return self.received

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while await self._exchange(reader, writer):
                pass
        except asyncio.CancelledError:
            pass  # the receiver closes; asyncio would log the cancelled task as an error
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, ConnectionError):
            return False
        first, *lines = head.split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, separator, value in (line.partition(":") for line in lines)
            if separator
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        async with self.changed:
            self.received.append(Received(first.split()[1], headers, body))
            self.changed.notify_all()
        status = self.answer()
        if status is None:
            await asyncio.Event().wait()
        if status == 0:
            return False
        where = f"Location: {self.url}/elsewhere\r\n" if status in range(300, 400) else ""
        writer.write(f"HTTP/1.1 {status} X\r\n{where}Content-Length: 0\r\n\r\n".encode())
        await writer.drain()
        return True
