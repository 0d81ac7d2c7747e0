"""A request as a server passes it to the application, with any bytes that a client can send."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message

Headers = Sequence[tuple[bytes, bytes]]

_FRAMING = (b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade")
"""Headers that the server itself handles."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The application's answer. Header names are in lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header, `None` where it is missing."""
        return next((value for key, value in self.headers if key == name), None)


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """The lines of a message's head, and its body, which an empty line divides.

    Without an empty line everything is body.
    """
    head, line, body = data.partition(b"\n\n")
    return (head.split(b"\n"), body) if line else ([], data)


def headers_of(lines: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The valid headers of a message."""
    found = []
    for line in lines:
        name, _, value = line.partition(b":")
        name, value = name.strip().lower(), value.strip()
        if re.fullmatch(rb"[!#$%&'*+.^_`|~0-9a-z-]+", name) and name not in _FRAMING:
            found.append((name, re.sub(rb"[\0\r]", b"", value)))
    return found


async def ask(
    app: ASGIApp, method: str, target: bytes, headers: Headers = (), body: bytes = b""
) -> Answer:
    """One request and its answer; the client disconnects after the first part of its body."""
    path, _, query = target.partition(b"?")
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [*headers, (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8080),
    }
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []
    received_body = asyncio.Event()

    async def receive() -> Message:
        if incoming:
            return incoming.pop(0)
        await received_body.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            received_body.set()

    await app(scope, receive, send)
    start, *rest = sent
    names = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
    return Answer(start["status"], names, b"".join(one.get("body", b"") for one in rest))
