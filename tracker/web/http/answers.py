"""Answers in JSON."""

import json
import re
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any, Final

import orjson
from starlette.responses import Response
from starlette.types import Scope


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of `content`."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """`content` in one line. Half a surrogate pair, which UTF-8 cannot hold, becomes its escape."""
    try:
        return orjson.dumps(content)
    except TypeError:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


# The headers that every answer has.


EVERYWHERE: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # What is no page: a browser that is led to it runs nothing of it, and frames nothing.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_KEY: Final = "tracker.request_id"
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


@cache
def _chance() -> Random:
    """Made when a process first needs it; unlike `secrets` it asks the kernel once."""
    return Random()


def number(scope: Scope) -> str:
    """Gives a request its number: the one that it came with, if that is fit for a log, or a new
    one."""
    request_id = None
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            request_id = str(value, "ascii")
            break
    if request_id is None:
        request_id = f"{_chance().getrandbits(64):016x}"
    scope[_KEY] = request_id
    return request_id


def request_id_of(scope: Scope) -> str | None:
    """A request's number, once it has one."""
    return scope.get(_KEY)


def request_id_header(scope: Scope) -> tuple[bytes, bytes]:
    """The header that tells a request's number, which it has to have."""
    return b"x-request-id", scope[_KEY].encode("ascii")


# Answers that are always the same, made once and written at once.
#
# The layers that an answer goes out through, and the server's own check of each of its headers,
# cost a callback as much as its signature does. Where the server knows nothing of this, the
# answer goes out like any other, and is the same.


WRITE: Final = "tracker.write_constant"
"""Where a request's scope has the server's `Write`."""
Write = Callable[[bytes], bool]
"""Writes an answer of status 200, from the first of its own headers on, and ends the request with
it; false where that cannot be done, and nothing has been written."""


class Constant:
    """A JSON answer of status 200."""

    def __init__(self, content: Any) -> None:
        self.send = Json(content)
        """The same as an ASGI application, for any server, and for all layers to see."""
        headers = [*self.send.raw_headers, *EVERYWHERE]
        self._head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self._end = b"\r\n\r\n" + self.send.body

    def write(self, scope: Scope) -> bool:
        """Answers a request, past all layers; false where that cannot be done, and was not."""
        write: Write | None = scope.get(WRITE)
        if write is None:
            return False
        name, value = request_id_header(scope)
        return write(b"%b%b: %b%b" % (self._head, name, value, self._end))
