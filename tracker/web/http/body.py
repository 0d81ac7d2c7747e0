"""Reading a request's body within bounds of size and time, and noticing that its sender is gone."""

import asyncio
from typing import Any

import orjson
from starlette.types import Receive, Scope

from tracker.web.http.errors import Fault

_READ = "tracker.body_read"


class ClientGone(Exception):
    """The client went away before its request was whole: nobody is there to answer."""


async def read_body(
    scope: Scope,
    receive: Receive,
    *,
    limit: int,
    deadline: float | None,
) -> bytes:
    """The whole body, of `limit` bytes at most, read before `deadline` (the running loop's time).

    Without a deadline it is whoever calls that watches the time, and raises `too_slow`.

    What counts is what comes, whatever `Content-Length` says; a length over the limit is refused
    unread. Raises `Fault` 413 and 408, and `ClientGone`.
    """
    if _announced(scope) > limit:
        raise _too_large(limit)
    if deadline is None:
        return await _read(scope, receive, limit)
    try:
        async with asyncio.timeout_at(deadline):
            return await _read(scope, receive, limit)
    except TimeoutError:
        raise too_slow() from None


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            scope[_READ] = True
            return bytes(body)


async def read_json(scope: Scope, receive: Receive, *, limit: int, seconds: float) -> Any:
    """The body as JSON values; raises `Fault` 400 where it is not JSON, else as `read_body`."""
    deadline = asyncio.get_running_loop().time() + seconds
    body = await read_body(scope, receive, limit=limit, deadline=deadline)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Fault(400, "invalid_json", f"The body is not JSON: {error}.") from None


async def discard(receive: Receive, *, limit: int, seconds: float) -> None:
    """Reads on for a while and throws away what comes."""
    left = limit
    try:
        async with asyncio.timeout(seconds):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError:
        return


def has_unread_body(scope: Scope) -> bool:
    """Whether the client sends, or may still be sending, a body that nobody read to its end."""
    if scope.get(_READ):
        return False
    return _announced(scope) > 0 or any(
        name == b"transfer-encoding" for name, _ in scope["headers"]
    )


def _announced(scope: Scope) -> int:
    """What `Content-Length` says; the server has seen to it that it is a number, if it is there."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value[:20]) if value.isdigit() else 0
    return 0


def too_slow() -> Fault:
    """What is answered where the body did not come in time."""
    return Fault(408, "request_timeout", "The body did not come in time.", linger=False)


def _too_large(limit: int) -> Fault:
    return Fault(413, "payload_too_large", f"The body is longer than {limit} bytes.")
