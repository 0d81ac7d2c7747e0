"""A bare ASGI application that verifies a callback's signature and answers: what uvicorn can do.

It runs under the same uvicorn, with the same event loop and parser, and verifies as the tracker
does, with the same function. There is no routing, no bound on anything, no parsing of the body, no
metric and no database.
"""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from tracker.core.clock import utc_now
from tracker.flora.callback import verify

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"15")],
}
_BODY = {"type": "http.response.body", "body": b'{"status":"ok"}'}
_SECRETS = [os.environ["FLORA_WEBHOOK_SECRET"]]

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
        headers = dict(scope["headers"])
        verify(headers.get(b"flora-signature"), body, _SECRETS, now=utc_now(), tolerance=900)
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
