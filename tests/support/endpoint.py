"""A receiver of webhooks: a real HTTP server that verifies as its users' programs do, and can be
down, slow or wrong."""

import asyncio
import base64
import json
import random
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Self

from standardwebhooks import Webhook, WebhookVerificationError

from tests.support.waiting import close_server
from tracker.core.clock import utc_now

SECRET: Final = "whsec_" + base64.b64encode(bytes(range(24))).decode()


@dataclass(frozen=True)
class Got:
    """A request: its id, event, run, and when it came. `verified` is what `standardwebhooks`
    says."""

    message_id: str
    event: str
    data: dict[str, Any]
    headers: dict[str, str]
    at: datetime
    verified: bool

    @property
    def run_id(self) -> str:
        """The run that it is about."""
        return str(self.data.get("run_id"))


@dataclass
class Receiver:
    """Answers with `status`, after `seconds`; with 500 for a share of the requests (`errors`, drawn
    by `seed`), and with 422 for the runs to `refuse`. `down` closes each connection, `silent` never
    answers, `answer` is the body. `script` has the statuses of the first answers; 0 is none."""

    secret: str = SECRET
    status: int = 200
    seconds: float = 0.0
    errors: float = 0.0
    seed: int = 0
    down: bool = False
    silent: bool = False
    answer: bytes = b"ok"
    script: list[int] = field(default_factory=list)
    refuse: frozenset[str] = frozenset()
    headers: dict[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    on_request: Callable[[Got], Awaitable[None]] | None = None
    got: list[Got] = field(default_factory=list)
    taken: list[Got] = field(default_factory=list)
    """The requests that were answered 2xx."""
    most_open: int = 0
    connections: int = 0

    async def __aenter__(self) -> Self:
        self._random = random.Random(self.seed)
        self._open = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        return self

    async def __aexit__(self, *_: object) -> None:
        await close_server(self._server)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def runs(self) -> Counter[str]:
        """How often each run was taken."""
        return Counter(one.run_id for one in self.taken)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            while not self.down and (head := await reader.readuntil(b"\r\n\r\n")):
                lines = head.decode().split("\r\n")[1:-2]
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines)
                }
                body = await reader.readexactly(int(headers["content-length"]))
                await self._answer(headers, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    async def _answer(
        self, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        got = self._read(headers, body)
        self.got.append(got)
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            if self.on_request is not None:
                await self.on_request(got)
            await asyncio.sleep(self.seconds)
            if self.silent:
                await asyncio.Event().wait()
            if self.down or (scripted := self.script.pop(0) if self.script else None) == 0:
                raise ConnectionResetError
            status = 500 if self._random.random() < self.errors else self.status
            status = 422 if got.run_id in self.refuse else scripted or status
            if status < 300:
                self.taken.append(got)
            more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
            # A 204 has no body: a client may take one for the beginning of its next answer.
            answer = b"" if status == 204 else self.answer
            length = len(answer)
            writer.write(f"HTTP/1.1 {status} X\r\n{more}Content-Length: {length}\r\n\r\n".encode())
            writer.write(answer)
            await writer.drain()
        finally:
            self._open -= 1

    def _read(self, headers: dict[str, str], body: bytes) -> Got:
        try:
            Webhook(self.secret).verify(body, headers)
            verified = True
        except WebhookVerificationError:
            verified = False
        event = json.loads(body)
        return Got(
            headers["webhook-id"], event["type"], event["data"], headers, utc_now(), verified
        )
