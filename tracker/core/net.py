"""Which hosts are this machine itself: there plain http is safe, and no token is asked for."""

from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host name or an address (brackets or not) means this machine by definition.

    `localhost` and what stands below it do (RFC 6761), and every address of 127.0.0.0/8 and ::1,
    written as an IPv4-mapped one too. No name is resolved.
    """
    name = host.removeprefix("[").removesuffix("]").removesuffix(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def is_loopback_url(url: str) -> bool:
    """Whether the host of an address such as `http://127.0.0.1:8080` means this machine."""
    return is_loopback(urlsplit(url).hostname or "")


# How an HTTP body may be packed: once, and by a way whose growth has a bound.
#
# A body that is packed twice, or by a newer way, can stand for gigabytes in a few kilobytes, and
# is unpacked before anybody can count it. One layer of these grows a thousandfold at most, and
# what is read of a connection at a time is small.


_BOUNDED: Final = frozenset({"", "identity", "gzip", "deflate"})


def is_bounded(content_encoding: str | None) -> bool:
    """Whether a body with this `Content-Encoding` (`None` for none) may be unpacked."""
    return (content_encoding or "").strip().lower() in _BOUNDED
