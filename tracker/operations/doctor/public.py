"""The way that callbacks take, tried with test deliveries to the public URL.

First forged ones, to the bare address and to one below it as each start has, which have to be
refused and leave nothing. Only where that goes well, and the
database can be looked into, signed ones follow: one for each secret, which are looked for in the
database, and then two large ones. They are taken out again, whatever happens.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from secrets import token_hex
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.core.record import DeliveryOutcome
from tracker.operations.doctor import address
from tracker.operations.doctor.database import DatabaseState
from tracker.operations.doctor.delivery import FLORA_WAITS, Reply, Sender, Trial, sender
from tracker.operations.doctor.finding import Finding, Level, failed, ok, warning
from tracker.operations.doctor.verdict import verdict
from tracker.settings import Settings
from tracker.store.engine import Database
from tracker.store.writing import delivery_rows as trials

NAME: Final = "callbacks"
OWN: Final = "own addresses"
SIZES: Final = (16 * 1024, 256 * 1024)
"""Bytes of the large ones: what any proxy should take, and the largest that the tracker takes."""
SLOW: Final = 3.0
"""Seconds for an answer from which somebody should look: under load it takes longer yet."""
TAKE_OUT_SECONDS: Final = 4.0
LEFT_AFTER: Final = timedelta(hours=1)
"""A test delivery that is still there after so long was left behind."""


async def look(
    settings: Settings, database: Awaitable[DatabaseState], *, clock: Clock
) -> list[Finding]:
    """Send test deliveries, once the database was looked at, and tell what became of them."""
    where = await address.look(settings)
    if settings.callback_url is None or where.level is Level.FAILED:
        return [where]
    async with sender(settings.callback_url) as to:
        forged = await to.send(Trial.make(f"whsec_{token_hex(16)}", now=clock()))
        findings = [where, *_certificate(forged, clock)]
        if refused := _judge_forged(forged):
            return [*findings, *refused]
        findings += await _own_address(settings.callback_url, clock)
        secrets = [
            secret.get_secret_value()
            for workspace in settings.all_workspaces
            for secret in workspace.webhook_secrets
        ]
        secrets = list(dict.fromkeys(secrets))
        state = await database
        if not secrets or not state.writable:
            lacks = "no signing secret is set" if not secrets else "the database takes no rows"
            return [
                *findings,
                warning(
                    NAME,
                    "A forged delivery comes to the tracker and is refused, as it should be. None "
                    f"that is signed was sent, because {lacks}.",
                    "Mend that first, and run the doctor again.",
                ),
            ]
        return findings + await _signed(settings, to, secrets, clock)


async def _own_address(callback_url: str, clock: Clock) -> list[Finding]:
    """Try the address that a start has of its own, below the bare one."""
    async with sender(f"{callback_url}/{token_hex(16)}") as to:
        forged = await to.send(Trial.make(f"whsec_{token_hex(16)}", now=clock()))
    if not _judge_forged(forged):
        return [ok(OWN, "Deliveries to the addresses of single starts come to the tracker.")]
    seen, advice = verdict(forged)
    return [
        failed(
            OWN,
            f"Deliveries to {callback_url} come to the tracker, but one to an address below it "
            f"{seen}.",
            f"Pass on /callbacks/flora as a prefix: each start has an address of its own below it. "
            f"{advice}",
        )
    ]


async def _signed(
    settings: Settings, to: Sender, secrets: Sequence[str], clock: Clock
) -> list[Finding]:
    now = clock()
    small = [Trial.make(secret, now=now) for secret in secrets]
    large = [Trial.make(secrets[0], now=now, size=size) for size in SIZES]
    ids = [trial.delivery_id for trial in (*small, *large)]
    async with _taken_out(settings, ids, now) as kept:
        replies = await asyncio.gather(*map(to.send, small))
        await kept.look()
        first = _judge_small(small, replies, kept)
        findings = [first]
        if first.level is not Level.FAILED:
            seconds = max(reply.seconds for reply in replies)
            findings.append(_answer_time(seconds))
            # Where the small ones take long, large ones would only be given up.
            if seconds < SLOW:
                findings.append(_body_limit(await asyncio.gather(*map(to.send, large))))
    if kept.trouble:
        findings.append(
            warning(
                "test deliveries",
                f"They could not be looked for, or not be taken out again: {kept.trouble}.",
                "They are applied to nothing and counted nowhere; the doctor takes out what is "
                "left when it is run again an hour later.",
            )
        )
    return findings


@dataclass(slots=True)
class _Kept:
    """The test deliveries in the database. `arrived` is `None` where it could not be looked."""

    database: Database
    ids: Sequence[str]
    now: datetime
    arrived: set[str] | None = None
    trouble: str = ""

    async def look(self) -> None:
        """See which of them are there."""
        try:
            self.arrived = await trials.arrived(self.database, self.ids)
        except StoreError as error:
            self.trouble = str(error)

    async def take_out(self) -> None:
        """Remove them, and what earlier doctors left."""
        try:
            async with asyncio.timeout(TAKE_OUT_SECONDS):
                await trials.take_out(self.database, self.ids)
                await trials.take_out_left(self.database, before=self.now - LEFT_AFTER)
        except (StoreError, TimeoutError) as error:
            self.trouble = str(error) or "the database did not answer in time"


@asynccontextmanager
async def _taken_out(settings: Settings, ids: Sequence[str], now: datetime) -> AsyncIterator[_Kept]:
    """Whatever happens inside, these test deliveries are taken out at the end."""
    url = settings.tracker_database_url
    async with await Database.open(url, application_name="tracker-doctor") as database:
        kept = _Kept(database, ids, now)
        try:
            yield kept
        finally:
            await kept.take_out()


def _certificate(reply: Reply, clock: Clock) -> list[Finding]:
    return [] if reply.expires is None else [address.certificate(reply.expires, now=clock())]


def _judge_forged(reply: Reply) -> list[Finding]:
    """What is wrong, by the answer to a forged delivery; nothing where the tracker refused it."""
    if reply.signature == "wrong":
        return []
    seen, advice = verdict(reply)
    name: Final = "certificate" if reply.kind == "certificate" else NAME
    return [failed(name, f"A delivery {seen}.", advice)]


def _judge_small(small: Sequence[Trial], replies: Sequence[Reply], kept: _Kept) -> Finding:
    """Whether every secret's delivery was taken, and is in this very database."""
    for number, reply in enumerate(replies, start=1):
        if reply.outcome is None:
            which = "" if len(small) == 1 else f" that secret {number} signs"
            seen, advice = verdict(reply)
            return failed(NAME, f"A delivery{which} {seen}.", advice)
    ids = {trial.delivery_id for trial in small}
    if kept.arrived is not None and not kept.arrived >= ids:
        return failed(
            NAME,
            "A signed delivery is taken, but by a tracker that keeps it in another database.",
            "Give `tracker serve` and the doctor the same TRACKER_DATABASE_URL; a SQLite file best "
            "by its absolute path (sqlite:////…), for a relative one depends on the folder. The "
            "test delivery stays there, applied to nothing.",
        )
    if any(reply.outcome == DeliveryOutcome.QUARANTINED for reply in replies):
        return warning(
            NAME,
            "A signed delivery is taken, but by a tracker of an older version.",
            "Restart `tracker serve` with this version.",
        )
    signed = "A signed delivery is" if len(small) == 1 else "Deliveries of every secret are"
    return ok(NAME, f"{signed} taken and stored, and a forged one is refused.")


def _answer_time(seconds: float) -> Finding:
    name: Final = "answer time"
    seen = f"A delivery is answered within {seconds:.2f} s; FLORA waits {FLORA_WAITS:g} s."
    if seconds < SLOW:
        return ok(name, seen)
    return warning(
        name,
        seen,
        "See which part is slow: the way there (`curl -w '%{time_total}'` of /healthz, by the "
        "public URL and on the machine itself), or the database (tracker_callback_seconds, its "
        "disk).",
    )


def _body_limit(replies: Sequence[Reply]) -> Finding:
    name: Final = "body limit"
    refused = [
        (size, reply) for size, reply in zip(SIZES, replies, strict=True) if reply.outcome is None
    ]
    if not refused:
        return ok(name, f"Bodies of {SIZES[-1] // 1024} KiB pass, the largest that are taken.")
    size, reply = refused[0]
    seen, advice = verdict(reply)
    told = f"A delivery of {size // 1024} KiB {seen}"
    if size > SIZES[0]:
        return warning(name, f"{told}. FLORA's own are far smaller so far.", advice)
    return failed(name, f"{told}. One with a long error message may be as large.", advice)
