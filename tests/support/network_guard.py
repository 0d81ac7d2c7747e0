"""A network guard for the suite: this process reaches loopback addresses and nothing else.

An audit hook sees every connection and every name look-up that Python makes, whichever library
asks. It refuses those that lead away from this machine and remembers them, so that a test fails
even where the code under test swallows the error.
"""

import ipaddress
import os
import sys
from typing import Any

refused: list[str] = []
_CONNECTS = ("socket.connect", "socket.sendto")
_WATCHED = frozenset((*_CONNECTS, "socket.getaddrinfo", "socket.gethostbyname"))


class OutsideTrafficError(RuntimeError):
    """A test tried to reach something beyond 127.0.0.1."""


def install() -> None:
    """Guard the rest of this process's life."""
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _WATCHED:  # as thousands of others a second are
        return
    host = arguments[0]
    if event in _CONNECTS:
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None
    if not _is_local(host):
        refused.append(f"{event} {host!r}")
        raise OutsideTrafficError(f"tests reach only 127.0.0.1, and this one tried {refused[-1]}")


def _is_local(host: Any) -> bool:
    if not isinstance(host, str | bytes):
        return True  # unix sockets, and look-ups of this host's own addresses
    name = os.fsdecode(host).lower().rstrip(".").split("%")[0]
    if name in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
