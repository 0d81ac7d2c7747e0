"""The headers that every answer has."""

import re
from functools import cache
from random import Random
from typing import Final

from starlette.types import Scope

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
