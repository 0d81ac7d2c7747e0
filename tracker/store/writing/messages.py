"""Messages to endpoints: claimed for an attempt, whose outcome is stored, and sent again.

Whoever claims messages of an endpoint or stores outcomes locks the row of the endpoint first. So
the number of open requests is limited over all processes, and no two of them deadlock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Select,
    Update,
    and_,
    bindparam,
    func,
    insert,
    not_,
    select,
    update,
)

from tracker.core.events import MOST_OPEN, WAITS, MessageState, next_attempt
from tracker.core.formatting import iso_time
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries.audit import Action
from tracker.store.queries.endpoints import CONFIGURED_WITHIN, message_is_in
from tracker.store.schema import endpoints, is_free, message_attempts, messages, word

FAILING_FOR: Final = timedelta(days=3)
"""An endpoint that failed for this long, without a success in between, is disabled."""
GONE: Final = 410
PAGE: Final = 500
"""Messages that one transaction makes due again."""

_PENDING: Final = messages.c.state == word("pending")


@dataclass(frozen=True, slots=True)
class Claim:
    """A message to send; `event_at` is when its event happened, `attempts` how many it has had."""

    message_id: str
    body: str
    event_at: datetime
    attempts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The outcome of an attempt that ended `at`, after `seconds`.

    `status` is the HTTP status and `answer` the beginning of the answer, if there was one. `error`
    is why it failed, for people. `retry_after` is the wait in seconds that the endpoint asked for;
    `final` that it wants no further attempt. `raised` is true where a handler raised an exception.
    """

    at: datetime
    seconds: float
    status: int | None = None
    answer: str | None = None
    error: str | None = None
    retry_after: float | None = None
    final: bool = False
    raised: bool = False

    @property
    def delivered(self) -> bool:
        return self.error is None


@dataclass(frozen=True, slots=True)
class Claimed:
    """What `record_and_claim` did: the claims, and why it disabled the endpoint, if it did."""

    claims: list[Claim]
    disabled: str | None = None


_Health = Mapping[str, Any]
_HEALTH: Final = (
    *("state", "disabled_at", "disabled_reason", "enabled_at", "failing_since", "last_success_at"),
    *("last_error_at", "last_error", "catch_up_from", "catch_up_to"),
)
"""The columns of `endpoints` that attempts change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """How a process, the `holder` of leases, sends the messages of an endpoint.

    A message is claimed for `lease`. At most `most_open` are claimed by all processes together.
    Failed attempts are repeated after `waits`.
    """

    endpoint_id: str
    holder: str
    lease: timedelta
    most_open: int = MOST_OPEN
    waits: tuple[timedelta, ...] = WAITS


async def due_times(
    db: Database, sendings: Sequence[Sending], *, now: datetime
) -> dict[str, datetime]:
    """When each endpoint has a message to claim, in the past if one is due; without endpoints that
    have none, or are disabled. One query for all with the same lease."""
    found: dict[str, datetime] = {}
    for lease in {one.lease for one in sendings}:
        mine = messages.c.endpoint_id == endpoints.c.endpoint_id
        waiting = mine, _PENDING, is_free(messages, now, lease)
        first = select(func.min(messages.c.next_attempt_at)).where(*waiting).scalar_subquery()
        due = func.coalesce(endpoints.c.catch_up_from, first)
        ids = [one.endpoint_id for one in sendings if one.lease == lease]
        statement = select(endpoints.c.endpoint_id, due).where(
            endpoints.c.endpoint_id.in_(ids), endpoints.c.state == "enabled"
        )
        found |= {row[0]: row[1] for row in await db.fetch(statement) if row[1] is not None}
    return found


def record_and_claim(
    connection: Connection,
    sending: Sending,
    *,
    outcomes: Sequence[tuple[str, Attempt]],
    most: int,
    now: datetime,
) -> Claimed:
    """Store the outcomes of attempts, by message, and claim up to `most` further messages."""
    mine = endpoints.c.endpoint_id == sending.endpoint_id
    wanted = select(*(endpoints.c[name] for name in (*_HEALTH, "configured_at")))
    row = connection.execute(wanted.where(mine).with_for_update()).one_or_none()
    if row is None:
        return Claimed([])
    before: _Health = row._asdict()
    after = before
    if row.configured_at < now - CONFIGURED_WITHIN:
        # This process has slept for as long, and is about to note it (`configure`).
        after = {**before, "failing_since": None, "enabled_at": now}
    if outcomes:
        _store(connection, sending, outcomes, after["enabled_at"])
        for _, attempt in outcomes:
            after = {**after, **_judged(after, attempt, sending.waits[0])}
    claims: list[Claim] = []
    if after["state"] == "enabled":
        claims, is_caught_up = _claim(connection, sending, after, most, now)
        if is_caught_up:
            after = {**after, "catch_up_from": None, "catch_up_to": None}
    if after != before:
        changed = {name: after[name] for name in _HEALTH}
        connection.execute(update(endpoints).where(mine).values(changed))
    return Claimed(claims, after["disabled_reason"] if after["state"] != before["state"] else None)


def _judged(health: _Health, attempt: Attempt, first_wait: timedelta) -> _Health:
    """What one more attempt changes of the health of an endpoint.

    After an outage, the messages that failed during it are due at once. Those that failed in its
    first seconds are tried again then anyway; leaving them out keeps a message that the endpoint
    refuses, while it takes others, to its schedule.
    """
    since = health["failing_since"]
    if attempt.delivered:
        recovered = {"failing_since": None, "last_success_at": attempt.at}
        if since is None or since + first_wait > attempt.at:
            return recovered
        begin = min(since + first_wait, health["catch_up_from"] or attempt.at)
        return recovered | {"catch_up_from": begin, "catch_up_to": attempt.at}
    failed = {"last_error_at": attempt.at, "last_error": attempt.error}
    if attempt.final:  # says something about the message, and nothing about the endpoint
        return failed
    since = failed["failing_since"] = since or attempt.at
    if health["state"] == "disabled":
        return failed
    if attempt.status == GONE:
        reason = "it answered 410 Gone"
    elif attempt.at - since >= FAILING_FOR:
        reason = f"every attempt failed for {FAILING_FOR.days} days; last: {attempt.error}"
    else:
        return failed
    return failed | {"state": "disabled", "disabled_at": attempt.at, "disabled_reason": reason}


_CHANGED: Final = (
    *("state", "attempts", "tried_since", "last_attempt_at", "next_attempt_at", "delivered_at"),
    *("last_status", "last_error", "lease_until", "lease_holder"),
)
_FINISH: Final = (
    update(messages)
    .where(messages.c.message_id == bindparam("as_message_id"))
    .values({name: bindparam(f"as_{name}", type_=messages.c[name].type) for name in _CHANGED})
)
"""With all its columns bound, so that one prepared statement serves every outcome."""


_ATTEMPT: Final = ("at", "seconds", "status", "answer", "error")


def _store(
    connection: Connection,
    sending: Sending,
    outcomes: Sequence[tuple[str, Attempt]],
    enabled_at: datetime | None,
) -> None:
    """Store attempts, and what they make of their messages."""
    wanted = select(*(messages.c[name] for name in ("message_id", *_CHANGED)))
    wanted = wanted.where(messages.c.message_id.in_([message_id for message_id, _ in outcomes]))
    wanted = wanted.order_by(messages.c.message_id).with_for_update()
    found = {row.message_id: dict(row._mapping) for row in connection.execute(wanted)}
    attempts = []
    for message_id, attempt in outcomes:
        if (row := found.get(message_id)) is None:
            continue
        row |= _changes(row, attempt, sending, enabled_at)
        shown = {name: getattr(attempt, name) for name in _ATTEMPT}
        attempts.append({"message_id": message_id, "number": row["attempts"], **shown})
    if attempts:
        connection.execute(insert(message_attempts), attempts)
        changes = [{f"as_{name}": value for name, value in row.items()} for row in found.values()]
        connection.execute(_FINISH, changes)


def _changes(
    row: Mapping[str, Any], attempt: Attempt, sending: Sending, enabled_at: datetime | None
) -> dict[str, Any]:
    """What an attempt changes of its message's `row`.

    A success counts also when the lease has expired meanwhile; a failure then only counts as an
    attempt, since another process has the message. The schedule begins anew at `enabled_at`.
    """
    after: dict[str, Any] = {
        "attempts": row["attempts"] + 1,
        "last_attempt_at": attempt.at,
        "last_status": attempt.status,
        "last_error": attempt.error,
    }
    is_mine, is_pending = row["lease_holder"] == sending.holder, row["state"] == "pending"
    if is_pending and attempt.delivered:
        after |= {"state": "delivered", "delivered_at": attempt.at, "next_attempt_at": None}
    elif is_pending and is_mine:
        since = row["tried_since"]
        if since is None or (enabled_at is not None and since < enabled_at):
            since = attempt.at
        since = min(since, attempt.at)  # the clock may have been set back
        due = next_attempt(
            row["message_id"],
            since=since,
            now=attempt.at,
            retry_after=attempt.retry_after,
            waits=sending.waits,
        )
        if attempt.final or due is None:
            after |= {"state": "failed", "next_attempt_at": None, "tried_since": since}
        else:
            after |= {"next_attempt_at": due, "tried_since": since}
    if is_mine or after.get("state", row["state"]) == "delivered":
        after |= {"lease_until": None, "lease_holder": None}
    return after


def _claim(
    connection: Connection, sending: Sending, health: _Health, most: int, now: datetime
) -> tuple[list[Claim], bool]:
    """Claim due messages, then those that failed during an outage that is over; whether none of
    the latter is left."""
    mine = messages.c.endpoint_id == sending.endpoint_id
    free = is_free(messages, now, sending.lease)
    is_open = and_(mine, messages.c.lease_holder.is_not(None), not_(free))
    count = select(func.count()).select_from(messages).where(is_open)
    room = min(most, sending.most_open - connection.execute(count).scalar_one())
    if room <= 0:
        return [], False
    waiting = select(messages.c.message_id).where(mine, _PENDING, free)
    due = waiting.where(messages.c.next_attempt_at <= now)
    claims = _take(connection, sending, due, room, now)
    if health["catch_up_from"] is None or len(claims) == room:
        return claims, False
    failed = waiting.where(
        messages.c.next_attempt_at > now,
        messages.c.last_attempt_at.between(health["catch_up_from"], health["catch_up_to"]),
    )
    more = _take(connection, sending, failed, room - len(claims), now)
    return claims + more, not more


def _take(
    connection: Connection, sending: Sending, wanted: Select[Any], most: int, now: datetime
) -> list[Claim]:
    some = wanted.order_by(messages.c.next_attempt_at).limit(most)
    some = some.with_for_update(skip_locked=True)
    statement = (
        update(messages)
        .where(messages.c.message_id.in_(some))
        .values(lease_until=now + sending.lease, lease_holder=sending.holder)
        .returning(*(messages.c[name] for name in Claim.__slots__))
    )
    claims = [Claim(*row) for row in connection.execute(statement)]
    return sorted(claims, key=lambda claim: claim.event_at)


async def resend(db: Database, message_id: str, *, now: datetime) -> bool:
    """Send a message again, at once and by a new schedule; false if there is none of this id."""
    entry = audit.entry(Action.RESEND, now, message_id=message_id)
    statement = _due_again(now).where(messages.c.message_id == message_id)
    return await db.write(lambda connection: audit.execute_noted(connection, statement, entry))


async def recover(
    db: Database, endpoint_id: str, *, since: datetime, now: datetime, page: int = PAGE
) -> int | None:
    """Send the failed messages of an endpoint that were created since then again, and its pending
    ones at once; returns how many had failed, or `None` for an unknown endpoint."""
    entry = audit.entry(Action.RESEND, now, endpoint_id=endpoint_id, since=iso_time(since))
    if not await db.write(partial(_catch_up, endpoint_id, now, entry, {})):
        return None
    some = (
        select(messages.c.message_id)
        .where(
            messages.c.endpoint_id == endpoint_id,
            message_is_in(MessageState.FAILED),
            messages.c.created_at >= since,
        )
        .order_by(messages.c.message_id)
        .limit(page)
        .with_for_update()
    )

    def send_page(after: str, connection: Connection) -> list[str]:
        found = connection.scalars(some.where(messages.c.message_id > after)).all()
        connection.execute(_due_again(now).where(messages.c.message_id.in_(found)))
        return list(found)

    # By their ids: what fails again meanwhile is not sent again.
    total, last = 0, ""
    while sent := await db.write(partial(send_page, last)):
        total, last = total + len(sent), sent[-1]
    return total


async def enable(db: Database, endpoint_id: str, *, now: datetime) -> bool:
    """Enable an endpoint and send what waits for it, by new schedules; false if there is none of
    this id."""
    entry = audit.entry(Action.ENABLE, now, endpoint_id=endpoint_id)
    fresh = {"state": "enabled", "disabled_at": None, "disabled_reason": None, "enabled_at": now}
    return await db.write(partial(_catch_up, endpoint_id, now, entry, fresh))


def _catch_up(
    endpoint_id: str,
    now: datetime,
    entry: Mapping[str, Any],
    more: Mapping[str, Any],
    connection: Connection,
) -> bool:
    """Make everything that waits for an endpoint due at once; whether there is one of this id."""
    statement = (
        update(endpoints)
        .where(endpoints.c.endpoint_id == endpoint_id)
        .values(failing_since=None, catch_up_from=endpoints.c.since, catch_up_to=now, **more)
    )
    return audit.execute_noted(connection, statement, entry)


def _due_again(now: datetime) -> Update:
    return update(messages).values(
        state="pending", tried_since=None, next_attempt_at=now, delivered_at=None
    )


def release(connection: Connection, holder: str, message_ids: Sequence[str]) -> None:
    """Release claims whose attempt was interrupted."""
    mine = update(messages).where(messages.c.lease_holder == holder)
    free = mine.values(lease_until=None, lease_holder=None)
    connection.execute(free.where(messages.c.message_id.in_(message_ids)))
