"""Where a link may lead: to public addresses only, and to the very address that was checked.

A host name is resolved here, once per connection. All its addresses must be public, and the
connection goes to one of them, so DNS rebinding gains nothing. Cloud metadata services are refused
even with `allow_private`. Proxy settings of the environment are ignored: a proxy would resolve the
name itself.
"""

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

import httpx

from tracker.core.errors import TrackerError
from tracker.core.waiting import in_thread

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[list[Address]]]
"""Resolves a host name; raises `OSError` if it has no address."""

RESOLVE_SECONDS: Final = 10.0
UNREACHED: Final = "the server cannot be reached"
KEEP_SECONDS: Final = 2.0
"""How long an idle connection is kept: shorter than any server does."""
_PORTS: Final = {"http": 80, "https": 443}
_NAT64: Final = IPv6Network("64:ff9b::/96")
_CLOUD_SERVICES: Final = tuple(
    ip_network(network)
    for network in (
        "168.63.129.16",  # Azure: services of the host
        *("169.254.0.0/16", "fe80::/10"),  # instance metadata and credentials of most clouds
        *("fd00:ec2::/32", "fd20:ce::/32"),  # the same over IPv6: AWS, Google
        "100.100.100.200",  # Alibaba
        "192.0.0.192",  # Oracle
        *("161.26.0.0/16", "166.8.0.0/14"),  # IBM: service network
        *("199.36.153.4/30", "199.36.153.8/30"),  # Google: APIs, from inside
    )
)
"""Services that only a cloud's own machines reach, some of them at public addresses."""


class MediaError(TrackerError):
    """A file cannot be fetched. Except for the subclasses, a retry changes nothing."""


class LinkRefused(MediaError):
    """No request is sent there: not http(s), a private address, or too many redirects."""


class MediaUnavailable(MediaError):
    """A file cannot be fetched now; the next attempt may resume it.

    `retry_after` is the wait in seconds that the server asked for, if any.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet.

    An address with another one embedded (IPv4-mapped, NAT64, 6to4, Teredo) is judged by that one.
    """
    inner = _embedded(address)
    if inner is not None:
        return is_public(inner)
    if isinstance(address, IPv6Address) and address.is_site_local:
        return False
    if _is_cloud_service(address):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_cloud_service(address: Address) -> bool:
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
    """Resolve a host name with the system's resolver. Raises `OSError`.

    Each lookup has a thread of its own. The threads of the event loop are few and shared: a name
    server that does not answer would block all other lookups, FLORA's too.
    """
    found = await in_thread(
        f"resolve {host}", partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    )
    # A zone ("%eth0") belongs to link-local addresses, which are refused anyway.
    return [ip_address(str(info[4][0]).partition("%")[0]) for info in found]


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends each request to a checked address of its host.

    The Host header and TLS keep the host name, so certificates are verified as usual. Connections
    are not reused, because two hosts at one address must not share one; `one_host` promises that
    all requests go to the same host. Errors name `what` was refused, and the `permission` for
    private addresses. `tls` has the authorities that are trusted. Where a host has several
    addresses, connecting to one takes `address_seconds` at most before the next is tried, and the
    one by which the host was last `reached` comes first; transports may share that.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        resolver: Resolver = resolve,
        tls: ssl.SSLContext | None = None,
        one_host: bool = False,
        what: str = "the link",
        permission: str = "--allow-private",
        address_seconds: float = 3.0,
        reached: dict[str, Address] | None = None,
    ) -> None:
        self.address_seconds = address_seconds
        self._allow_private = allow_private
        self._resolve = resolver
        self._what = what
        self._permission = permission
        self._reached = {} if reached is None else reached
        # The environment only decides which certificate authorities are trusted.
        self._inner = httpx.AsyncHTTPTransport(
            verify=tls or True,
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=None if one_host else 0,
                keepalive_expiry=KEEP_SECONDS,
            ),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. Raises `LinkRefused` before anything is sent, and httpx's errors."""
        host = request.url.raw_host.decode("ascii")
        addresses = await self._addresses(request.url)
        if not addresses:
            raise MediaUnavailable(f"the name {host} has no address")
        addresses.sort(key=lambda address: address != self._reached.get(host))
        last = addresses[-1]
        for address in addresses if len(addresses) > 1 else ():
            try:
                return await self._send_to(address, request, self.address_seconds)
            except httpx.ConnectTimeout:
                last = address  # it may only be slow
            except httpx.ConnectError:
                pass
        return await self._send_to(last, request)

    async def _send_to(
        self, address: Address, request: httpx.Request, seconds: float | None = None
    ) -> httpx.Response:
        """Send a request to that address; connecting may take so many seconds, or as long as the
        request says."""
        host = request.url.raw_host.decode("ascii")
        extensions = {**request.extensions, "sni_hostname": host}
        if seconds is not None:
            timeout = request.extensions["timeout"]
            limit = min(seconds, timeout["connect"] or seconds)
            extensions["timeout"] = {**timeout, "connect": limit}
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=str(address)),
            headers=request.headers,
            stream=request.stream,
            extensions=extensions,
        )
        response = await self._inner.handle_async_request(pinned)
        self._reached[host] = address
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _addresses(self, url: httpx.URL) -> list[Address]:
        port = url.port or _PORTS.get(url.scheme)
        host = url.raw_host.decode("ascii")
        if url.scheme not in _PORTS or port is None or not host:
            raise LinkRefused(f"{self._what} is not http(s)")
        addresses = await self._lookup(host, port)
        if any(map(_is_cloud_service, addresses)):
            raise LinkRefused(
                f"{self._what} leads to a cloud's own services, which is never allowed"
            )
        inside = [address for address in addresses if not is_public(address)]
        if inside and not self._allow_private:
            raise LinkRefused(
                f"{self._what} leads to {inside[0]}, which is not a public address "
                f"({self._permission} permits it)"
            )
        return _alternated(dict.fromkeys(addresses))

    async def _lookup(self, host: str, port: int) -> list[Address]:
        try:
            return [ip_address(host)]
        except ValueError:
            pass
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await self._resolve(host, port)
        except (OSError, UnicodeError, TimeoutError, ValueError) as exc:
            raise MediaUnavailable(f"the name {host} cannot be resolved") from exc


def _alternated(addresses: Iterable[Address]) -> list[Address]:
    """The addresses in their order, IPv6 and IPv4 in turn (RFC 8305, 4): where one of them leads
    nowhere, all addresses of a large service would take longer than a request may."""
    before = Counter[int]()
    ranked: list[tuple[int, Address]] = []
    for address in addresses:
        ranked.append((before[address.version], address))
        before[address.version] += 1
    return [address for _, address in sorted(ranked, key=lambda one: one[0])]


def connect_failure(error: Exception) -> str | None:
    """Why no connection was made, without the address; `None` if there was one."""
    match error:
        case httpx.ConnectTimeout():
            return "connecting to the server timed out"
        case httpx.ConnectError() if "CERTIFICATE" in str(error):
            return "the server's certificate is not valid, or not trusted here"
        case httpx.ConnectError():
            return UNREACHED
    return None
