"""Reading a request's body within bounds of size and time, and noticing that its sender is gone."""

import asyncio
from typing import Any, Final

import orjson
from starlette.types import Receive, Scope

from tracker.web.faults import Fault, unavailable

_READ = "tracker.body_read"
_SMALL: Final = 16 * 1024
"""Bytes; what nearly every body has, and what each may have however many come at once."""


class ClientGone(Exception):
    """The client went away before its request was whole: nobody is there to answer."""


class Room:
    """So many bytes for large bodies that come at the same time, so that strangers who send
    thousands of them do not use up the memory. Small ones are taken all the same."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> None:
        """Raises `Fault` 503 where not so much is left."""
        if size > self._left:
            raise unavailable("Too many large bodies come at once.")
        self._left -= size

    def give_back(self, size: int) -> None:
        """What was taken before."""
        self._left += size


async def read_body(
    scope: Scope,
    receive: Receive,
    *,
    limit: int,
    deadline: float | None,
    room: Room | None = None,
) -> bytes:
    """The whole body, of `limit` bytes at most, read before `deadline` (the running loop's time).

    Without a deadline it is whoever calls that watches the time, and raises `too_slow`.

    What counts is what comes, whatever `Content-Length` says; a length over the limit is refused
    unread. Raises `Fault` 413, 408 and, where there is no `room`, 503, and `ClientGone`.
    """
    if _announced(scope) > limit:
        raise _too_large(limit)
    if deadline is None:
        return await _read(scope, receive, limit, room)
    try:
        async with asyncio.timeout_at(deadline):
            return await _read(scope, receive, limit, room)
    except TimeoutError:
        raise too_slow() from None


async def _read(scope: Scope, receive: Receive, limit: int, room: Room | None) -> bytes:
    body = bytearray()
    taken = 0
    try:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            part = message.get("body", b"")
            body += part
            if len(body) > limit:
                raise _too_large(limit)
            if len(body) > _SMALL and room is not None:
                room.take(len(part))
                taken += len(part)
            if not message.get("more_body", False):
                scope[_READ] = True
                return bytes(body)
    finally:
        if room is not None:
            room.give_back(taken)


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
