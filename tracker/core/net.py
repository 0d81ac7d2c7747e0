"""What HTTP code on both sides needs: loopback hosts, and the path of callbacks."""

from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host name or address (with or without brackets) is this machine by definition.

    These are `localhost` and names below it (RFC 6761), 127.0.0.0/8, ::1, and their IPv4-mapped
    forms. Names are not resolved. Plain http is safe there, and no token is required.
    """
    name = host.removeprefix("[").removesuffix("]").removesuffix(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def is_loopback_url(url: str) -> bool:
    """Whether the host of a URL such as `http://127.0.0.1:8080` is this machine."""
    return is_loopback(urlsplit(url).hostname or "")


CALLBACK_PATH: Final = "/callbacks/flora"
"""Receives callbacks; so does each start's own address, one part below it."""


def hide_callback_token(path: str) -> str:
    """`path` for logs and traces, which must not contain the secret token of a start."""
    before, below, rest = path.partition(f"{CALLBACK_PATH}/")
    return f"{before}{below}*" if rest else path
