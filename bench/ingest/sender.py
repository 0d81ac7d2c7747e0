"""Sends callbacks from Python, at a fixed rate or as fast as they are answered, and times each.

At a fixed rate it does not wait for answers before it sends on, and a callback's time counts from
when it was due. So a server that falls behind shows in every number, not only in those that it kept
from being sent.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, cast

import httptools

PATH: Final = "/callbacks/flora"
HEADER: Final = "Flora-Signature"
LAST_ANSWERS: Final = 30.0
"""Seconds that the last answers may take."""
_HEAD: Final = (
    b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"%b: %b\r\nContent-Length: %d\r\n\r\n"
)


@dataclass(slots=True)
class Answers:
    """What came back: how long each took, in milliseconds, and how many were no 2xx."""

    milliseconds: list[float] = field(default_factory=list)
    refused: int = 0

    @property
    def acknowledged(self) -> int:
        """How many were answered with a 2xx."""
        return len(self.milliseconds) - self.refused

    def quantile(self, share: float) -> float:
        """The time that this share of them did not take longer than; 1 is the longest."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Sender:
    """Some connections to a server on this machine. Used as `async with Sender(…) as sender`.

    `path` is where it takes requests, `header` the one that holds their signature.
    """

    def __init__(
        self,
        requests: Path,
        port: int,
        *,
        connections: int,
        path: str = PATH,
        header: str = HEADER,
    ) -> None:
        self._requests = _requests(requests, path.encode(), header.encode())
        self._port = port
        self._connections = connections
        self._idle: deque[_Connection] = deque()
        self._due: deque[float] = deque()
        self._until = 0.0
        self._all_idle = asyncio.Event()
        self.answers = Answers()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for _ in range(self._connections):
            made = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self._port)
            self._idle.append(made[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.transport.close()

    async def at_rate(self, rate: float, seconds: float) -> None:
        """Send so many a second, whatever the server does."""
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            due = began + number / rate
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            self._due.append(due)
            self._send()
        await self._last_answers()

    async def flat_out(self, seconds: float) -> None:
        """Send on each connection whenever its last callback was answered."""
        now = time.perf_counter()
        self._until = now + seconds
        self._due.extend([now] * self._connections)
        self._send()
        await asyncio.sleep(seconds)
        await self._last_answers()

    async def all_of_them(self) -> float:
        """Send all that was prepared, each connection its next whenever its last was answered.
        Returns the seconds that it took."""
        began = time.perf_counter()
        self._until = math.inf
        self._due.extend([began] * self._connections)
        self._send()
        await self._all_idle.wait()
        return time.perf_counter() - began

    def answered(self, connection: "_Connection", status: int, due: float) -> None:
        """A connection has its answer, and is free for the next."""
        now = time.perf_counter()
        self.answers.milliseconds.append((now - due) * 1000)
        self.answers.refused += status >= 300
        self._idle.append(connection)
        if now < self._until:
            self._due.append(now)
        self._send()
        if len(self._idle) == self._connections:
            self._all_idle.set()

    def _send(self) -> None:
        while self._due and self._idle and (request := next(self._requests, None)):
            self._all_idle.clear()
            self._idle.popleft().send(request, self._due.popleft())

    async def _last_answers(self) -> None:
        async with asyncio.timeout(LAST_ANSWERS):
            await self._all_idle.wait()


class _Connection(asyncio.Protocol):
    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)

    def send(self, request: bytes, due: float) -> None:
        self._due = due
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._sender.answered(self, self._parser.get_status_code(), self._due)


def _requests(prepared: Path, path: bytes, header: bytes) -> Iterator[bytes]:
    for line in prepared.read_bytes().splitlines():
        signature, _, body = line.partition(b" ")
        yield _HEAD % (path, header, signature, len(body)) + body
