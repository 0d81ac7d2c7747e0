"""Webhooks: test deliveries to the public URL, and test events to the endpoints.

Forged deliveries go first, to the bare address and to one below it as each start has; they must be
refused. Only if that works, and the database is writable, signed ones follow: one per secret,
looked up in the database, then two large ones. They are deleted again, whatever happens.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from datetime import datetime, timedelta
from ipaddress import ip_address
from secrets import token_hex
from typing import Final
from urllib.parse import urlsplit

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.core.formatting import duration
from tracker.core.net import is_loopback
from tracker.core.record import DeliveryOutcome
from tracker.delivering.addresses import Resolver, is_public, resolve
from tracker.delivering.endpoints import ANSWER_SECONDS, endpoint_of, send_test
from tracker.operations.doctor import Finding, Level, failed, ok, warning
from tracker.operations.doctor.database import DatabaseState
from tracker.operations.doctor.delivery import (
    FLORA_WAITS,
    DoctorDelivery,
    Reply,
    Send,
    diagnose,
    open_sender,
)
from tracker.settings import EndpointSettings, Settings
from tracker.store.engine import Database
from tracker.store.inspection import remove_test_deliveries, stored_test_deliveries

RESOLVE_SECONDS: Final = 5.0
RENEW_BEFORE: Final = timedelta(days=10)
"""Certificates that renew themselves do so earlier."""
SIZES: Final = (16 * 1024, 256 * 1024)
"""Bytes of the large deliveries: what any proxy should pass, and the tracker's maximum."""
SLOW: Final = 3.0
"""Seconds for an answer from which it is worth a look: under load it takes longer."""
DELETE_SECONDS: Final = 4.0
LEFT_AFTER: Final = timedelta(hours=1)
"""Age from which a test delivery was left behind by another run of the doctor."""
_REFUSED: Final = {
    400: "the signature",
    401: "the signature",
    403: "the signature",
    404: "the path of the url",
    405: "the path of the url",
    410: "whether it is still wanted: 410 disables it",
}
"""What to compare, by the status of an answer."""


async def check_callbacks(
    settings: Settings,
    database: Awaitable[DatabaseState],
    *,
    clock: Clock,
    timeout: float = FLORA_WAITS,
    slow: float = SLOW,
) -> list[Finding]:
    """Check the public URL, and send test deliveries to it.

    `timeout` is how many seconds each answer may take. Nothing signed is sent before `database`
    is there.
    """
    public_url = await check_public_url(settings)
    if settings.callback_url is None or public_url.level is Level.FAILED:
        return [public_url]
    async with open_sender(settings.callback_url, timeout) as send:
        forged = await send(DoctorDelivery.forged(clock()))
        findings = [public_url]
        if forged.expires is not None:
            findings.append(judge_certificate(forged.expires, now=clock()))
        if forged.signature != "wrong":
            seen, advice = diagnose(forged)
            name: Final = "certificate" if forged.kind == "certificate" else "callbacks"
            return [*findings, failed(name, f"A delivery {seen}.", advice)]
        findings.append(await _check_own_address(settings.callback_url, clock, timeout))
        state = await database
        workspaces = settings.all_workspaces
        secrets = dict.fromkeys(secret for one in workspaces for secret in one.clear_secrets)
        if not secrets or not state.writable:
            why = "the database is not writable" if secrets else "no signing secret is set"
            return [
                *findings,
                warning(
                    "callbacks",
                    "A forged delivery reaches the tracker and is refused, as it should be. No "
                    f"signed one was sent, because {why}.",
                    "Fix that first, and run the doctor again.",
                ),
            ]
        return findings + await _send_signed(settings, send, [*secrets], clock(), slow)


async def check_public_url(
    settings: Settings, *, resolver: Resolver = resolve, timeout: float = RESOLVE_SECONDS
) -> Finding:
    """Whether FLORA accepts the public URL; nothing is sent there."""
    url = settings.tracker_public_url
    if url is None:
        return warning(
            "public url",
            "None is set: runs are started without a callback, and only polling finds their ends.",
            "Set TRACKER_PUBLIC_URL to the https:// address at which FLORA reaches `tracker "
            "serve`, and restart. If there is none, leave it unset; polling makes more requests.",
        )
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        if settings.flora_is_local:
            return ok("public url", f"{url} is on this machine, like FLORA_BASE_URL.")
        return failed(
            "public url",
            f"{url} is only reachable from this machine: FLORA refuses starts with it.",
            "Set TRACKER_PUBLIC_URL to the https:// address at which FLORA reaches this service, "
            "or unset it.",
        )
    try:
        async with asyncio.timeout(timeout):
            try:
                addresses = [ip_address(host)]
            except ValueError:
                addresses = await resolver(host, parts.port or 443)
    except (TimeoutError, OSError, UnicodeError) as error:
        if isinstance(error, TimeoutError):
            why = f"no answer within {timeout:g} s"
        else:
            why = getattr(error, "strerror", None) or "no such name"
        return failed(
            "public url",
            f"The name {host} cannot be resolved: {why}.",
            f"Create a DNS record for {host}, or fix TRACKER_PUBLIC_URL. If other names cannot be "
            "resolved here either, fix this machine's DNS.",
        )
    private = [address for address in addresses if not is_public(address)]
    if not private:
        shown = ", ".join(dict.fromkeys(map(str, addresses)))
        return ok("public url", f"{url} leads to {shown}.")
    return warning(
        "public url",
        f"From here, {host} resolves to {private[0]}, which is not a public address. If FLORA sees "
        "the same, it refuses every start.",
        f"Resolve {host} from outside (`dig @1.1.1.1 {host}`). If it is private there too, give it "
        "a public address, or unset TRACKER_PUBLIC_URL.",
    )


def judge_certificate(expires: datetime, *, now: datetime) -> Finding:
    """The finding for a valid certificate."""
    left = expires - now
    until = f"It is valid until {expires:%Y-%m-%d}"
    if left >= RENEW_BEFORE:
        return ok("certificate", f"{until}.")
    return warning(
        "certificate",
        f"{until}, for {duration(left)}.",
        "Renew it, and find out why that does not happen automatically: once it has expired FLORA "
        "delivers nothing.",
    )


async def _check_own_address(callback_url: str, clock: Clock, timeout: float) -> Finding:
    """Try an address below the bare one, as each start has."""
    async with open_sender(f"{callback_url}/{token_hex(16)}", timeout) as send:
        reply = await send(DoctorDelivery.forged(clock()))
    if reply.signature == "wrong":
        return ok("own addresses", "Deliveries to the addresses of single starts arrive.")
    seen, advice = diagnose(reply)
    return failed(
        "own addresses",
        f"Deliveries to {callback_url} arrive, but one to an address below it {seen}.",
        f"Pass on /callbacks/flora as a prefix: each start has its own address below it. {advice}",
    )


async def _send_signed(
    settings: Settings, send: Send, secrets: Sequence[str], now: datetime, slow: float
) -> list[Finding]:
    small = [DoctorDelivery.signed(secret, now) for secret in secrets]
    large = [DoctorDelivery.signed(secrets[0], now, size=size) for size in SIZES]
    ids = [delivery.delivery_id for delivery in (*small, *large)]
    url = settings.tracker_database_url
    found, trouble = None, ""
    async with await Database.open(url, application_name="tracker-doctor") as database:
        try:
            replies = await asyncio.gather(*map(send, small))
            try:
                found = await stored_test_deliveries(database, ids)
            except StoreError as error:
                trouble = str(error)
            findings = [_judge_signed(small, replies, found)]
            if findings[0].level is not Level.FAILED:
                seconds = max(reply.seconds for reply in replies)
                findings.append(_judge_time(seconds, slow))
                if seconds < slow:  # else large ones would only time out
                    findings.append(_judge_sizes(await asyncio.gather(*map(send, large))))
        finally:
            try:
                async with asyncio.timeout(DELETE_SECONDS):
                    await remove_test_deliveries(database, ids, left_before=now - LEFT_AFTER)
            except (StoreError, TimeoutError) as error:
                trouble = str(error) or "the database did not answer in time"
    if trouble:
        findings.append(
            warning(
                "test deliveries",
                f"They could not be looked up or deleted: {trouble}.",
                "They are applied to nothing and counted nowhere; the doctor deletes what is left "
                "when it runs again an hour later.",
            )
        )
    return findings


def _judge_signed(
    sent: Sequence[DoctorDelivery], replies: Sequence[Reply], found: set[str] | None
) -> Finding:
    """Whether the delivery of every secret was accepted, and is in this database: `found` are the
    ids there, `None` if they could not be looked up."""
    for number, reply in enumerate(replies, start=1):
        if reply.outcome is None:
            which = "" if len(sent) == 1 else f" signed with secret {number}"
            seen, advice = diagnose(reply)
            return failed("callbacks", f"A delivery{which} {seen}.", advice)
    if found is not None and not found >= {delivery.delivery_id for delivery in sent}:
        return failed(
            "callbacks",
            "A signed delivery is accepted, but by a tracker that stores it in another database.",
            "Give `tracker serve` and the doctor the same TRACKER_DATABASE_URL; a SQLite file "
            "preferably by its absolute path (sqlite:////…), since a relative one depends on the "
            "folder. The test delivery stays there, applied to nothing.",
        )
    if any(reply.outcome == DeliveryOutcome.QUARANTINED for reply in replies):
        return warning(
            "callbacks",
            "A signed delivery is accepted, but by a tracker of an older version.",
            "Restart `tracker serve` with this version.",
        )
    signed = "A signed delivery is" if len(sent) == 1 else "Deliveries of every secret are"
    return ok("callbacks", f"{signed} accepted and stored, and a forged one is refused.")


def _judge_time(seconds: float, slow: float = SLOW) -> Finding:
    seen = f"A delivery is answered within {seconds:.2f} s; FLORA waits {FLORA_WAITS:g} s."
    if seconds < slow:
        return ok("answer time", seen)
    return warning(
        "answer time",
        seen,
        "Find the slow part: the network (`curl -w '%{time_total}'` of /healthz, by the public URL "
        "and on the machine itself), or the database (tracker_callback_seconds, its disk).",
    )


def _judge_sizes(replies: Sequence[Reply]) -> Finding:
    for size, reply in zip(SIZES, replies, strict=True):
        if reply.outcome is None:
            seen, advice = diagnose(reply)
            seen = f"A delivery of {size // 1024} KiB {seen}"
            if size > SIZES[0]:
                return warning("body limit", f"{seen}. FLORA's own are smaller so far.", advice)
            long = "A callback with a long error message may be as large."
            return failed("body limit", f"{seen}. {long}", advice)
    return ok("body limit", f"Bodies of {SIZES[-1] // 1024} KiB pass, the maximum.")


async def check_endpoints(
    settings: Settings, *, clock: Clock, seconds: float = ANSWER_SECONDS
) -> list[Finding]:
    """Send each endpoint a test event, all at once; each answer may take `seconds`."""
    return await asyncio.gather(
        *(_check_endpoint(one, clock, seconds) for one in settings.endpoints)
    )


async def _check_endpoint(configured: EndpointSettings, clock: Clock, seconds: float) -> Finding:
    attempt = await send_test(endpoint_of(configured), clock=clock, answer_seconds=seconds)
    name, took = configured.id, duration(attempt.seconds)
    if attempt.error is None:
        return ok("endpoints", f"{name} answered a test event with {attempt.status} in {took}.")
    if attempt.status is None:
        advice = (
            "Check its url in [[endpoints]], that its server runs and has a valid certificate, and "
            "that this machine may reach it."
        )
    else:
        compare = _REFUSED.get(attempt.status, "its log")
        advice = f"Check {compare}, and that it answers 2xx to events of an unknown type."
        if compare == "the signature":
            advice += (
                " It must have the same secret, and its clock may be off by five minutes at most."
            )
    return failed("endpoints", f"{name} refused a test event: {attempt.error}.", advice)
