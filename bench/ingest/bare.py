"""A bare ASGI application that verifies a callback's signature and answers: what uvicorn can do.

It runs under the same uvicorn, with the same event loop and parser, as the tracker. There is no
routing, no parsing of the body, no metric and no database.
"""

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"15")],
}
_BODY = {"type": "http.response.body", "body": b'{"status":"ok"}'}
_SECRET = os.environ["FLORA_WEBHOOK_SECRET"].encode()

Message = dict[str, Any]


async def app(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Answers 200 to what is signed, and to GET; an error to the rest."""
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    if scope["method"] == "POST":
        header = next(value for name, value in scope["headers"] if name == b"flora-signature")
        signed_at, _, given = header.removeprefix(b"t=").partition(b",v1=")
        expected = hmac.new(_SECRET, signed_at + b"." + body, hashlib.sha256).hexdigest()
        assert hmac.compare_digest(expected.encode(), given)
    await send(_START)
    await send(_BODY)


if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(os.environ["PEER_PORT"]),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )
