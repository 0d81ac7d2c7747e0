"""Which hosts are this machine itself: there plain http is safe, and no token is asked for."""

from ipaddress import ip_address
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
