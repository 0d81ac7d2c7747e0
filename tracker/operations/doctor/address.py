"""Where the public URL leads: whether FLORA can reach that at all, and its certificate."""

import asyncio
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from tracker.core.formatting import duration
from tracker.core.net import is_loopback
from tracker.delivering.addresses import Address, is_public, resolve
from tracker.operations.doctor.finding import Finding, failed, ok, warning
from tracker.settings import Settings

NAME: Final = "public url"
RESOLVE_SECONDS: Final = 5.0
RENEW_BEFORE: Final = timedelta(days=10)
"""Certificates that renew themselves do so earlier."""


async def look(settings: Settings) -> Finding:
    """Whether the public URL is one that FLORA takes; nothing is sent there."""
    url = settings.tracker_public_url
    if url is None:
        return warning(
            NAME,
            "None is set: runs are started without a callback, and their ends are found by polling "
            "alone.",
            "Set TRACKER_PUBLIC_URL to the https:// address under which FLORA reaches `tracker "
            "serve`, and restart. Leave it out where there is none; more requests are made then.",
        )
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return _loopback(settings, url)
    try:
        async with asyncio.timeout(RESOLVE_SECONDS):
            addresses = await _addresses(host, parts.port or 443)
    except TimeoutError:
        why = f"no answer within {RESOLVE_SECONDS:g} s"
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no such name"
    else:
        return _judge(url, host, addresses)
    return failed(
        NAME,
        f"The name {host} cannot be resolved: {why}.",
        f"Make a DNS record for {host}, or mend TRACKER_PUBLIC_URL. Where other names cannot be "
        "resolved here either, mend this machine's DNS.",
    )


def certificate(expires: datetime, *, now: datetime) -> Finding:
    """What the end of a certificate, which was found valid, tells."""
    left = expires - now
    until = f"It is valid, until {expires:%Y-%m-%d}"
    if left < RENEW_BEFORE:
        return warning(
            "certificate",
            f"{until}, in {duration(left)}.",
            "Renew it, and see why that does not happen by itself: once it has expired FLORA "
            "delivers nothing.",
        )
    return ok("certificate", f"{until}.")


def _loopback(settings: Settings, url: str) -> Finding:
    if is_loopback(urlsplit(settings.flora_base_url).hostname or ""):
        return ok(NAME, f"{url} is on this machine, as FLORA_BASE_URL is.")
    return failed(
        NAME,
        f"{url} leads to this machine alone: FLORA refuses a start that names it.",
        "Set TRACKER_PUBLIC_URL to the https:// address under which FLORA reaches this service, or "
        "leave it out.",
    )


async def _addresses(host: str, port: int) -> list[Address]:
    try:
        return [ip_address(host)]
    except ValueError:
        return await resolve(host, port)


def _judge(url: str, host: str, addresses: list[Address]) -> Finding:
    shown = ", ".join(dict.fromkeys(map(str, addresses)))
    inside = [address for address in addresses if not is_public(address)]
    if not inside:
        return ok(NAME, f"{url} leads to {shown}.")
    return warning(
        NAME,
        f"Seen from here, {host} leads to {inside[0]}, which is no public address. If FLORA sees "
        "the same, it refuses every start.",
        f"Look {host} up from outside (`dig @1.1.1.1 {host}`). If it is private there too, give it "
        "a public address, or leave TRACKER_PUBLIC_URL out.",
    )
