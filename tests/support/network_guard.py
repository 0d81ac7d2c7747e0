"""A network guard for the suite: this process reaches loopback addresses and nothing else.

Every connection and every name look-up that Python makes goes through a few functions of `socket`,
whichever library asks. The guard stands before them, refuses what leads away from this machine and
remembers it, so that a test fails even where the code under test swallows the error. An audit hook
would see as much, and be called for a thousand other events for each of these.
"""

import _socket
import ipaddress
import os
import socket
from collections.abc import Callable
from functools import wraps
from typing import Any

refused: list[str] = []


class OutsideTrafficError(RuntimeError):
    """A test tried to reach something beyond 127.0.0.1."""


def install() -> None:
    """Guard the rest of this process's life."""
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, _guarded(getattr(socket.socket, name), _host_of_address))
    _socket.getaddrinfo = _guarded(_socket.getaddrinfo, _host_of_look_up)
    for name in ("gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, _guarded(getattr(socket, name), _host_of_look_up))


def _guarded(function: Callable[..., Any], host_of: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses a call that leads to another machine."""

    @wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        host = host_of(*arguments, **options)
        if not _is_local(host):
            refused.append(f"socket.{function.__name__} {host!r}")
            raise OutsideTrafficError(
                f"tests reach only 127.0.0.1, and this one tried {refused[-1]}"
            )
        return function(*arguments, **options)

    return guarded


def _host_of_address(socket: object, *arguments: Any) -> Any:
    """The host of an address, which is the last argument."""
    return arguments[-1][0] if arguments and isinstance(arguments[-1], tuple) else None


def _host_of_look_up(host: Any = None, *_: Any, **__: Any) -> Any:
    return host


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
