"""Where callbacks may be sent, and which hosts requests may name.

FLORA sends callbacks to public `https` addresses only. The simulator also accepts a loopback host,
and there plain `http`. A page in a browser must not make it call this machine: neither by a name
that resolves to this machine later (a name is resolved again for each callback, which is sent to
the checked address), nor by a request under a name of its own.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[list[Address]]]

_RESERVED: Final = (".test", ".example", ".invalid")
_INTERNAL_SUFFIXES: Final = (".internal", ".local", ".lan", ".home.arpa", ".localhost")
_RESOLVE_SECONDS: Final = 2.0


async def _resolve(host: str, port: int) -> list[Address]:
    """The addresses of a name; none where it cannot be resolved within two seconds."""
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError, UnicodeError):
        return []
    return [ip_address(str(info[4][0]).partition("%")[0]) for info in found]


async def refusal(url: str, resolve: Resolver = _resolve) -> str | None:
    """Why `url` cannot be a callback address, or None where it can.

    A public name is resolved, and refused where any of its addresses is private; one that cannot
    be resolved now is accepted: its deliveries fail.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "is not a URL"
    if not url.isascii() or parts.scheme not in ("http", "https") or not host:
        return "is not an http or https URL"
    if _is_loopback(host):
        return None
    if parts.scheme != "https":
        return "must be https, or http on a loopback host"
    if (address := _literal(host)) is not None:
        return None if address.is_global else "must not be a private or internal host"
    if "." not in host or host.endswith(_INTERNAL_SUFFIXES):
        return "must not be a private or internal host"
    addresses = await resolve(host, port or 443)
    if not all(address.is_global for address in addresses):
        return "must not resolve to a private or internal host"
    return None


async def target(url: str) -> tuple[str, dict[str, str]] | None:
    """Where a callback to `url` is sent now, with the name of its host for TLS; `None` where that
    is not allowed, or not known."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_loopback(host):
        return url, {}
    addresses = await _resolve(host, parts.port or 443)
    if not addresses or not all(address.is_global for address in addresses):
        return None
    shown = f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])
    port = f":{parts.port}" if parts.port else ""
    return parts._replace(netloc=shown + port).geturl(), {"sni_hostname": host}


def may_ask(host: str) -> bool:
    """Whether a request with this `Host` or `Origin` is meant for a simulator: an address, or a
    name that cannot be registered and made to point here."""
    name = (urlsplit(host if "//" in host else f"//{host}").hostname or "").rstrip(".")
    if _literal(name) is not None:
        return True
    return name not in ("", "null") and (
        "." not in name or name.endswith((*_INTERNAL_SUFFIXES, *_RESERVED))
    )


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _literal(host)
    return host == "localhost" or (address is not None and address.is_loopback)
