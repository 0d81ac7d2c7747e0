"""Where a link may lead: to public addresses, and to the very address that was looked at.

A name is resolved here, once for each connection; every address it has must be public, and the
connection goes to one of these addresses, so that a name which answers differently the next time
gains nothing. The clouds' own services are refused even where private addresses are allowed.
Proxies of the environment are not used: a proxy would choose the address itself.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

import httpx

from tracker.delivering.errors import LinkRefused, MediaUnavailable

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[list[Address]]]
"""Gives the addresses of a name; raises `OSError` where there are none."""

RESOLVE_SECONDS: Final = 10.0
_PORTS: Final = {"http": 80, "https": 443}
_NAT64: Final = IPv6Network("64:ff9b::/96")
_CLOUD_SERVICES: Final = tuple(
    ip_network(network)
    for network in (
        "168.63.129.16",  # Azure: the host's own service
        *("169.254.0.0/16", "fe80::/10"),  # instance metadata of nearly all clouds, credentials
        *("fd00:ec2::/32", "fd20:ce::/32"),  # the same by IPv6: AWS, Google
        "100.100.100.200",  # Alibaba
        "192.0.0.192",  # Oracle
        *("161.26.0.0/16", "166.8.0.0/14"),  # IBM: its service network
        *("199.36.153.4/30", "199.36.153.8/30"),  # Google: its interfaces, from inside
    )
)
"""What only machines of a cloud reach, in part by public addresses. Media is never there."""


def is_public(address: Address) -> bool:
    """Whether an address is somebody's on the internet, and not inside this network or machine.

    An address that carries another one within it (IPv4-mapped, NAT64, 6to4, Teredo) is as public as
    that.
    """
    inner = _embedded(address)
    if inner is not None:
        return is_public(inner)
    if isinstance(address, IPv6Address) and address.is_site_local:
        return False
    if is_cloud_service(address):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def is_cloud_service(address: Address) -> bool:
    """Whether a cloud answers there to its own machines, some of it with their credentials."""
    address = _embedded(address) or address
    return any(address in network for network in _CLOUD_SERVICES)


def _embedded(address: Address) -> IPv4Address | None:
    if not isinstance(address, IPv6Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)


async def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a name, as the system finds them. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A zone ("%eth0") belongs to link-local addresses, which are refused anyhow.
    return [ip_address(str(info[4][0]).partition("%")[0]) for info in found]


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends each request to a checked address of its host.

    The host keeps its name in the Host header and in TLS, so that its certificate is checked as
    ever. Connections are not kept: two hosts of one address must not share one.
    """

    def __init__(self, *, allow_private: bool = False, resolver: Resolver = resolve) -> None:
        self._allow_private = allow_private
        self._resolve = resolver
        # Of the environment it takes only whose certificates are trusted.
        self._inner = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it. Raises `LinkRefused` before anything is sent, and what httpx raises."""
        host = request.url.raw_host.decode("ascii")
        addresses = await self._addresses(request.url)
        for number, address in enumerate(addresses, start=1):
            pinned = httpx.Request(
                request.method,
                request.url.copy_with(host=str(address)),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self._inner.handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(addresses):
                    raise
        raise MediaUnavailable(f"the name {host} has no address")

    async def aclose(self) -> None:
        """Close what is open."""
        await self._inner.aclose()

    async def _addresses(self, url: httpx.URL) -> list[Address]:
        port = url.port or _PORTS.get(url.scheme)
        host = url.raw_host.decode("ascii")
        if url.scheme not in _PORTS or port is None or not host:
            raise LinkRefused("the link is not http(s)")
        addresses = await self._look_up(host, port)
        if any(map(is_cloud_service, addresses)):
            raise LinkRefused("the link leads to a cloud's own services, which is never fetched")
        inside = [address for address in addresses if not is_public(address)]
        if inside and not self._allow_private:
            raise LinkRefused(
                f"the link leads to {inside[0]}, which is not a public address "
                "(--allow-private fetches it nevertheless)"
            )
        return list(dict.fromkeys(addresses))

    async def _look_up(self, host: str, port: int) -> list[Address]:
        try:
            return [ip_address(host)]
        except ValueError:
            pass
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await self._resolve(host, port)
        except (OSError, UnicodeError, TimeoutError, ValueError) as exc:
            raise MediaUnavailable(f"the name {host} cannot be resolved") from exc
