"""Where a request comes from, as far as its headers and its connection tell."""

import re
from ipaddress import IPv6Address, ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.types import Scope

SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""The methods that change nothing."""
_FORWARDING: Final = (b"forwarded", b"x-real-ip", b"via")
_FORWARDING_TOO: Final = b"x-forwarded-"
_PROTO: Final = re.compile(rb'(?i)(?:^|[;,\s])proto\s*=\s*"?([a-z]+)')


def headers(scope: Scope, name: bytes) -> list[bytes]:
    """The values of a header, in their order."""
    return [value for key, value in scope["headers"] if key == name]


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """The value of a header that may stand once; `None` where it is missing or stands twice."""
    values = headers(scope, name)
    return values[0] if len(values) == 1 else None


def host_of(scope: Scope) -> str | None:
    """The name in the `Host` header, without port and brackets; `None` where it is malformed."""
    host = header_of(scope, b"host")
    if host is None:
        return None
    try:
        parts = urlsplit(b"//" + host)
        _ = parts.port  # raises where it is no port
    except ValueError:
        return None
    if parts.netloc != host or parts.username is not None or parts.hostname is None:
        return None
    return parts.hostname.decode("latin-1")


def is_forwarded(scope: Scope) -> bool:
    """Whether a proxy says that it passed the request on for another client."""
    return any(
        name in _FORWARDING or name.startswith(_FORWARDING_TOO) for name, _ in scope["headers"]
    )


def peer_of(scope: Scope) -> str:
    """The address at the other end of the connection: the client's, or that of a proxy."""
    return scope["client"][0] if scope.get("client") else ""


def network_of(scope: Scope) -> str:
    """Who is counted as one: an IPv4 address, or the /64 that an IPv6 subscriber has."""
    peer = peer_of(scope)
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return str(IPv6Address(int(address) >> 64 << 64))
    return str(address)


def came_by_https(scope: Scope) -> bool:
    """Whether the browser reached us over https, even where a proxy in front ends it.

    The browser's own word, the `Origin` of a form, goes before a proxy's.
    """
    if (origin := header_of(scope, b"origin")) is not None and b"://" in origin:
        return origin.lower().startswith(b"https://")
    if scope.get("scheme") == "https":
        return True
    proto = (header_of(scope, b"x-forwarded-proto") or b"").partition(b",")[0].strip()
    found = _PROTO.search(header_of(scope, b"forwarded") or b"")
    return b"https" in (proto.lower(), found[1].lower() if found else b"")


def from_own_page(scope: Scope, *, also: str | None = None) -> bool:
    """Whether a request comes from a page of our own, or from no page at all.

    Only browsers send `Origin` and `Sec-Fetch-Site`. Ours is the `Host` that was asked, and `also`
    where a proxy in front asks us by another name.
    """
    site = headers(scope, b"sec-fetch-site")
    if any(value not in (b"same-origin", b"none") for value in site):
        return False
    host = header_of(scope, b"host")
    own = {host.lower()} if host else set()
    if also:
        own.add(also.encode("latin-1"))
    origins = headers(scope, b"origin")
    return len(origins) <= 1 and all(
        origin.partition(b"://")[2].lower() in own for origin in origins
    )


def is_visit(scope: Scope) -> bool:
    """Whether a link of another page is followed to one of ours.

    What a page of theirs loads into itself, as an image, a script or a frame, is no visit: they
    would learn from it what there is here, and spend what FLORA lets us ask.
    """
    asked_by_script = bool(headers(scope, b"origin"))
    into = headers(scope, b"sec-fetch-dest")  # an old browser does not say
    return (
        scope["method"] in SAFE and not asked_by_script and all(one == b"document" for one in into)
    )
