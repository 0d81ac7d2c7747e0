"""What a request says about itself: where it comes from, below which path, and its body.

Where the application is mounted below a path, such as `/flora`, the host application or the server
names it as `root_path`: Starlette's `Mount`, FastAPI's `app.mount`, `uvicorn --root-path`. It is
taken off each request and put in front of each address in the response, as a proxy would: routes,
access rules, pages and templates know paths from the application's own root alone.
"""

import asyncio
import re
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from typing import Any, Final
from urllib.parse import quote, urlsplit

import orjson
from starlette.types import Message, Receive, Scope, Send

from tracker.web.http.responses import Fault

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""The methods that change nothing."""

_BODY_READ: Final = "tracker.body_read"
_FORWARDING: Final = (b"forwarded", b"x-forwarded", b"x-real-ip", b"via")
_PROTO: Final = re.compile(rb'(?i)(?:^|[;,\s])proto\s*=\s*"?([a-z]+)')
_PREFIX: Final = "tracker.prefix"
_OURS: Final = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "query_string", "headers"),
    *("client", "server"),
)
"""What ASGI says of a request. What the host adds to it stays there: its exception handlers, which
Starlette's routes would call with our errors, its router, state and session."""
_ADDRESSES: Final = frozenset((b"location", b"hx-redirect"))
"""Headers that hold an address of this application."""


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """The values of a header, in order."""
    return [value for key, value in scope["headers"] if key == name]


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a header that may occur once; `None` if it is missing or repeated."""
    values = header_values(scope, name)
    return values[0] if len(values) == 1 else None


# Where it comes from


def requested_host(scope: Scope) -> str | None:
    """The name in the `Host` header, without port and brackets; `None` if it is malformed."""
    host = header(scope, b"host")
    if host is None:
        return None
    try:
        parts = urlsplit(b"//" + host)
        _ = parts.port  # raises if it is no port
    except ValueError:
        return None
    if parts.netloc != host or parts.username is not None or parts.hostname is None:
        return None
    return parts.hostname.decode("latin-1")


def is_forwarded(scope: Scope) -> bool:
    """Whether a header says that a proxy forwarded the request; some write `_` for `-`."""
    names = (name.replace(b"_", b"-") for name, _ in scope["headers"])
    return any(name in _FORWARDING or name.startswith(b"x-forwarded-") for name in names)


def peer_of(scope: Scope) -> str:
    """The address at the other end of the connection: the client's, or that of a proxy."""
    return scope["client"][0] if scope.get("client") else ""


def network_of(scope: Scope) -> str:
    """The unit for throttling: an IPv4 address, or the /64 of an IPv6 subscriber."""
    peer = peer_of(scope)
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return str(IPv6Address(int(address) >> 64 << 64))
    return str(address)


def is_https(scope: Scope) -> bool:
    """Whether the browser uses https, even if a proxy in front terminates it.

    The browser's own statement, the `Origin` of a form, takes precedence over a proxy's.
    """
    if (origin := header(scope, b"origin")) is not None and b"://" in origin:
        return origin.lower().startswith(b"https://")
    if scope.get("scheme") == "https":
        return True
    proto = (header(scope, b"x-forwarded-proto") or b"").partition(b",")[0].strip()
    found = _PROTO.search(header(scope, b"forwarded") or b"")
    return b"https" in (proto.lower(), found[1].lower() if found else b"")


def is_same_origin(scope: Scope, *, also: str | None = None) -> bool:
    """Whether a request comes from one of our own pages, or from no page at all.

    Only browsers send `Origin` and `Sec-Fetch-Site`. Our origin is the `Host` of the request, and
    `also` if a proxy in front uses another name.
    """
    site = header_values(scope, b"sec-fetch-site")
    if any(value not in (b"same-origin", b"none") for value in site):
        return False
    host = header(scope, b"host")
    own = {host.lower()} if host else set()
    if also:
        own.add(also.encode("latin-1"))
    origins = header_values(scope, b"origin")
    return len(origins) <= 1 and all(
        origin.partition(b"://")[2].lower() in own for origin in origins
    )


def is_navigation(scope: Scope) -> bool:
    """Whether a browser follows a link to one of our pages.

    Embedding (as image, script or frame) by another site is none: that site would learn what exists
    here, and use up FLORA's request limit.
    """
    from_script = bool(header_values(scope, b"origin"))
    destinations = header_values(scope, b"sec-fetch-dest")  # old browsers do not send it
    return (
        scope["method"] in SAFE_METHODS
        and not from_script
        and all(one == b"document" for one in destinations)
    )


# The path below which the application is mounted


def without_prefix(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """An HTTP request as it would be if the application were not mounted, and where to send."""
    inner = {key: scope[key] for key in _OURS if key in scope}
    inner["root_path"] = ""
    root_path = scope.get("root_path", "").rstrip("/")
    if not root_path:
        return inner, send
    path = scope["path"]
    if path == root_path or path.startswith(f"{root_path}/"):  # some servers take it off themselves
        inner["path"] = path[len(root_path) :] or "/"
    # Quoted, because a part of it may be a parameter of the host's route, which anyone chooses.
    # Two slashes would lead to another host.
    prefix = inner[_PREFIX] = "/" + quote(root_path.strip("/"))

    async def send_with_prefix(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [
                (name, prefix.encode() + value)
                if name in _ADDRESSES and value[:1] == b"/"
                else (name, value)
                for name, value in message.get("headers", ())
            ]
            message = {**message, "headers": headers}
        await send(message)

    return inner, send_with_prefix


def prefix_of(scope: Scope) -> str:
    """The prefix of a request, `""` where there is none."""
    prefix: str = scope.get(_PREFIX, "")
    return prefix


# The body


class ClientGone(Exception):
    """The client disconnected before its request was complete: there is no one to answer."""


async def read_body(scope: Scope, receive: Receive, *, limit: int, seconds: float | None) -> bytes:
    """The whole body, of `limit` bytes at most, read within `seconds`.

    With `None` the caller limits the time, and raises `too_slow`. What arrives counts, whatever
    `Content-Length` says; a length over the limit is refused unread. Raises `Fault` 413 and 408,
    and `ClientGone`.
    """
    if _content_length(scope) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > limit:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    scope[_BODY_READ] = True
                    return bytes(body)
    except TimeoutError:
        raise too_slow() from None


async def read_json(scope: Scope, receive: Receive, *, limit: int, seconds: float) -> Any:
    """The body as JSON values. Raises `Fault` 400 if it is none, else as `read_body`."""
    body = await read_body(scope, receive, limit=limit, seconds=seconds)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Fault(400, "invalid_json", f"The body is not JSON: {error}.") from None


async def discard_body(receive: Receive, *, limit: int, seconds: float) -> None:
    """Read and discard up to `limit` bytes for up to `seconds`."""
    left = limit
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))


def has_unread_body(scope: Scope) -> bool:
    """Whether the client sends, or may still be sending, a body that was not read to its end."""
    if scope.get(_BODY_READ):
        return False
    return _content_length(scope) > 0 or bool(header_values(scope, b"transfer-encoding"))


def _content_length(scope: Scope) -> int:
    """The `Content-Length`, 0 if there is none; the server has checked that it is a number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value[:20]) if value.isdigit() else 0
    return 0


def too_slow() -> Fault:
    """408: the body did not arrive in time."""
    return Fault(408, "request_timeout", "The body did not arrive in time.", linger=False)


def _too_large(limit: int) -> Fault:
    return Fault(413, "payload_too_large", f"The body is longer than {limit} bytes.")
