"""Where a link may lead."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from typing import Any

import httpx
import pytest

from tests.delivering.far_end import FarEnd, answer, far_end
from tests.support.waiting import close_server, free_port
from tracker.delivering.addresses import (
    Address,
    GuardedTransport,
    LinkRefused,
    MediaUnavailable,
    Resolver,
    is_public,
    resolve,
)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::7f00:1"),
        # Addresses that carry a private one within them.
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
        *("64:ff9b:1::a00:1", "2001:0:4136:e378:8000:63bf:f5ff:fffe"),
    ],
)
def test_inside_addresses_are_refused(address: str) -> None:
    """Loopback, private, link-local, shared, reserved, multicast, and all of them in disguise."""
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_not(address: str) -> None:
    """The internet can be reached, by way of NAT64 too."""
    assert is_public(ip_address(address))


@pytest.mark.parametrize("allow_private", [False, True])
@pytest.mark.parametrize(
    "address",
    [
        *("168.63.129.16", "169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.0.192"),
        *("fd00:ec2::254", "fd20:ce::254", "::ffff:168.63.129.16", "64:ff9b::a83f:8110"),
        *("161.26.0.10", "166.8.0.1", "199.36.153.8"),
    ],
)
async def test_the_clouds_own_services_are_refused(address: str, allow_private: bool) -> None:
    """They give out credentials of the machine, and no flag opens them."""
    with pytest.raises(LinkRefused, match="a cloud's own services"):
        await send("http://files.test/", resolver=fixed(address), allow_private=allow_private)


async def send(url: str, *, resolver: Resolver = resolve, **options: Any) -> int:
    transport = GuardedTransport(resolver=resolver, **options)
    async with httpx.AsyncClient(transport=transport, timeout=60) as client:
        return (await client.get(url)).status_code


def fixed(*addresses: str) -> Resolver:
    async def resolver(host: str, port: int) -> list[Address]:
        return [ip_address(address) for address in addresses]

    return resolver


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "[::1]", "127.1"])
async def test_nothing_is_sent_to_this_machine(host: str) -> None:
    """However its name is written, no connection is made."""
    # What the system makes of a number; the network guard refuses to ask it.
    resolver = fixed("127.0.0.1") if host[0].isdigit() else resolve
    async with far_end(answer(b"secret")) as end:
        with pytest.raises(LinkRefused, match="is not a public address"):
            await send(end.url(host=host), resolver=resolver)
        assert end.asked == []


async def test_one_private_address_is_enough_to_refuse() -> None:
    """A name that has a public address and a private one is refused."""
    with pytest.raises(LinkRefused, match=r"10\.0\.0\.1"):
        await send("http://both.example/", resolver=fixed("8.8.8.8", "10.0.0.1"))


async def test_the_connection_goes_to_the_address_that_was_looked_at() -> None:
    """A name is resolved once, so one that answers differently the next time gains nothing."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]

    async def rebinding(host: str, port: int) -> list[Address]:
        return [ip_address(address) for address in answers.pop(0)]

    async with far_end(answer(b"")) as end:
        url = end.url("/", host="rebinding.example")
        assert await send(url, allow_private=True, resolver=rebinding) == 200
        assert [asked["host"] for asked in end.asked] == [f"rebinding.example:{end.port}"]
    assert len(answers) == 1


async def test_a_name_with_several_addresses_is_tried_at_each() -> None:
    """An address at which nobody listens does not end it."""
    async with far_end(answer(b"")) as end:
        url = end.url("/", host="two.example")
        resolver = fixed("127.0.0.2", "127.0.0.1")
        assert await send(url, allow_private=True, resolver=resolver) == 200


@contextmanager
def silent(address: str, port: int) -> Iterator[socket.socket]:
    """A socket that takes no connections: they are neither accepted nor refused."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind((address, port))
        listening.listen(0)
        for _ in range(3):  # more than may wait
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((address, port))
        yield listening


async def test_an_address_that_is_silent_costs_a_moment() -> None:
    """The next one is tried then, and next time the one that was reached comes first."""
    transport = GuardedTransport(
        allow_private=True, resolver=fixed("127.0.0.2", "127.0.0.1"), address_seconds=0.2
    )
    async with (
        far_end(answer(b"")) as end,
        httpx.AsyncClient(transport=transport, timeout=60) as client,
        asyncio.timeout(30),
    ):
        with silent("127.0.0.2", end.port):
            url = end.url("/", host="two.example")
            assert (await client.get(url)).status_code == 200
            transport.address_seconds = 60.0
            assert (await client.get(url)).status_code == 200


async def test_the_second_address_tried_is_of_the_other_protocol() -> None:
    """A large service has eight addresses of IPv6, which a network may lead nowhere: they would
    take longer than an endpoint may."""
    many, tried = [f"2606:4700::{number}" for number in range(1, 9)], list[str]()

    def connect(request: httpx.Request) -> httpx.Response:
        tried.append(request.url.host)
        if ":" in request.url.host:
            raise httpx.ConnectTimeout("")
        return httpx.Response(200)

    transport = GuardedTransport(resolver=fixed(*many, "8.8.8.8", "8.8.4.4"))
    transport._inner = httpx.MockTransport(connect)
    async with httpx.AsyncClient(transport=transport) as client:
        assert (await client.get("http://large.example/")).status_code == 200
    assert tried == [many[0], "8.8.8.8"]


async def test_an_address_that_is_only_slow_is_reached() -> None:
    """Where no other one is there, it has all the time of the request."""
    end = FarEnd(free_port(), answer(b""))
    with silent("127.0.0.1", end.port) as listening:
        url, resolver = end.url("/", host="slow.example"), fixed("127.0.0.1", "127.0.0.2")
        sending = asyncio.create_task(
            send(url, allow_private=True, resolver=resolver, address_seconds=0.05)
        )
        await asyncio.sleep(0.2)
        assert not sending.done()
        server = await asyncio.start_server(end.connected, sock=listening)
        assert await sending == 200
        await close_server(server)


async def test_a_name_that_does_not_resolve_may_do_so_later() -> None:
    """That is a passing trouble, and its words hold the name alone."""

    async def nobody(host: str, port: int) -> list[Address]:
        raise OSError("Name or service not known")

    for resolver in (nobody, fixed()):
        with pytest.raises(MediaUnavailable, match=r"gone\.example"):
            await send("http://gone.example/secret", resolver=resolver)


@pytest.mark.parametrize("url", ["ftp://example.com/a", "file:///etc/passwd", "/relative", "x:y"])
async def test_only_http_is_spoken(url: str) -> None:
    """Files of this machine are no links."""
    with pytest.raises((LinkRefused, httpx.UnsupportedProtocol)):
        await send(url)
