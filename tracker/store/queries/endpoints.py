"""The endpoints that events are sent to, as the database knows them: without secrets, and with what
the last attempts showed. Then the messages to them: how the outbox becomes messages, and queries.

The writer adds events to `outbox` in the transaction that causes them. `fan_out` deletes them in
the transaction that adds a message for each endpoint that wants it, so that no event is forgotten
and none is sent twice.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal
from uuid import uuid4

from sqlalchemy import ColumnElement, Connection, Row, case, delete, func, or_, select

from tracker.core.events import EventType, MessageState, RunFilter, still_holds
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import known
from tracker.core.schedule import Durations
from tracker.store.engine import Database, insert_on
from tracker.store.queries.paging import matching, newest_first
from tracker.store.queries.runs import RUN_COLUMNS, records
from tracker.store.schema import endpoints, is_rare, message_attempts, messages, outbox, runs, word

HANDLER_URL: Final = "python:"
"""What the URL of a Python handler begins with; the function follows."""
CONFIGURED_WITHIN: Final = timedelta(days=1)
"""An endpoint that no process has had in its settings for longer gets no new messages."""
SENT_WITHIN: Final = timedelta(hours=1)
"""How long a message may wait for its endpoint."""
COUNTED: Final = 10_000
"""Most messages that are counted."""
SAMPLE: Final = 1000
"""Most messages of an endpoint that its delays are taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """An endpoint as a process has it in its settings. `url` is the one to show; that of a Python
    handler is `HANDLER_URL` and the function."""

    endpoint_id: str
    url: str
    events: tuple[EventType, ...]
    filter: RunFilter


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRow:
    """An endpoint.

    `since` is when it was first configured, `configured_at` when a process last had it in its
    settings. `failing_since` is the first failure after the last success. `url` is without its
    query.
    """

    endpoint_id: str
    url: str
    events: tuple[str, ...]
    filters: dict[str, str]
    since: datetime
    configured_at: datetime
    state: str
    disabled_at: datetime | None = None
    disabled_reason: str | None = None
    enabled_at: datetime | None = None
    failing_since: datetime | None = None
    last_success_at: datetime | None = None
    last_error_at: datetime | None = None
    last_error: str | None = None

    @property
    def is_handler(self) -> bool:
        return self.url.startswith(HANDLER_URL)

    @property
    def where(self) -> str:
        """The URL, or the handler's function."""
        return self.url.removeprefix(HANDLER_URL)

    @property
    def enabled(self) -> bool:
        """Whether messages are sent to it."""
        return self.state == "enabled"

    def is_configured(self, now: datetime) -> bool:
        """Whether a process has had it in its settings lately."""
        return self.configured_at > now - CONFIGURED_WITHIN

    def health(self, now: datetime) -> Literal["disabled", "not configured", "failing", "ok"]:
        if not self.is_configured(now):
            return "not configured"
        if not self.enabled:
            return "disabled"
        return "failing" if self.failing_since is not None else "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What waits for an endpoint. `oldest_at` is when the oldest pending message was created."""

    pending: int = 0
    failed: int = 0
    oldest_at: datetime | None = None

    def is_late(self, now: datetime) -> bool:
        """Whether the oldest pending message has waited too long; like `TrackerMessagesLate`."""
        return self.oldest_at is not None and now - self.oldest_at > SENT_WITHIN


_SHOWN: Final = [column for column in endpoints.c if not column.name.startswith("catch_up")]


async def list_endpoints(db: Database) -> list[EndpointRow]:
    """All endpoints, by id."""
    rows = await db.fetch(select(*_SHOWN).order_by(endpoints.c.endpoint_id))
    return [_endpoint(row) for row in rows]


async def get_endpoint(db: Database, endpoint_id: str) -> EndpointRow | None:
    """The endpoint, if known."""
    statement = select(*_SHOWN).where(endpoints.c.endpoint_id == endpoint_id)
    row = await db.fetchrow(statement)
    return None if row is None else _endpoint(row)


async def backlogs(db: Database, *, most: int = COUNTED) -> dict[str, Backlog]:
    """What waits for each endpoint, or was given up.

    A scrape must not take longer the more messages wait: counted are at most `most` pending ones
    of an endpoint, and the oldest `most` failed ones of all. The oldest pending one is exact
    unless that many of others are older.
    """
    found = {}
    columns = messages.c.endpoint_id, messages.c.created_at
    async with db.read() as connection:
        for name in await connection.scalars(select(endpoints.c.endpoint_id)):
            mine = messages.c.endpoint_id == name
            some = select(*columns).where(mine, message_is_in(MessageState.PENDING)).limit(most)
            few = some.subquery()
            row = await connection.execute(select(func.count(), func.min(few.c.created_at)))
            count, oldest_at = row.one()
            found[name] = Backlog(pending=count, oldest_at=oldest_at)
        for state in (MessageState.PENDING, MessageState.FAILED):
            some = select(*columns).where(message_is_in(state)).order_by(messages.c.created_at)
            few = some.limit(most).subquery()
            by_endpoint = select(few.c.endpoint_id, func.count(), func.min(few.c.created_at))
            rows = await connection.execute(by_endpoint.group_by(few.c.endpoint_id))
            for name, count, oldest_at in rows:
                is_pending = state is MessageState.PENDING
                more = {"oldest_at": oldest_at} if is_pending else {"failed": count}
                if name in found:
                    found[name] = replace(found[name], **more)
    return found


async def delays(db: Database, endpoint_id: str, *, since: datetime) -> Durations:
    """Those of the newest messages (`SAMPLE`) created since that time that are delivered, from the
    event to the delivery."""
    newest = (
        select(messages.c.event_at, messages.c.delivered_at)
        .where(messages.c.endpoint_id == endpoint_id, messages.c.created_at >= since)
        .order_by(messages.c.created_at.desc(), messages.c.message_id.desc())
        .limit(SAMPLE)
    )
    rows = await db.fetch(newest)
    return Durations.between((row[0], row[1]) for row in rows if row.delivered_at is not None)


async def list_states(
    db: Database, *, since: datetime
) -> list[tuple[EndpointRow, Backlog, Durations]]:
    """Each endpoint with its backlog, and the delays of messages since then."""
    waiting = await backlogs(db)
    return [
        (row, waiting.get(name := row.endpoint_id, Backlog()), await delays(db, name, since=since))
        for row in await list_endpoints(db)
    ]


async def configure(
    db: Database, configs: Sequence[EndpointConfig], *, now: datetime
) -> list[EndpointRow]:
    """Store that a process has these endpoints in its settings now; returns, as they were before,
    those that the database had with other settings.

    For an endpoint that is back after `CONFIGURED_WITHIN`, schedules of attempts begin anew, and
    failures from before do not count. Times that are still to come are from before the clock was
    set back, and become `now`.
    """
    if not configs:
        return []
    insert = db.insert(endpoints)
    shared, past = ("url", "events", "filters"), ("since", "catch_up_from", "catch_up_to")
    is_back = endpoints.c.configured_at < now - CONFIGURED_WITHIN
    statement = insert.on_conflict_do_update(
        index_elements=[endpoints.c.endpoint_id],
        set_={
            **{name: insert.excluded[name] for name in (*shared, "configured_at")},
            **{name: _at_most(now, endpoints.c[name]) for name in past},
            "enabled_at": case((is_back, now), else_=_at_most(now, endpoints.c.enabled_at)),
            "failing_since": case((is_back, None), else_=_at_most(now, endpoints.c.failing_since)),
        },
    )
    rows = {
        one.endpoint_id: {
            "endpoint_id": one.endpoint_id,
            "url": one.url,
            "events": [event.value for event in one.events],
            "filters": one.filter.to_json(),
            "since": now,
            "configured_at": now,
            "state": "enabled",
        }
        for one in sorted(configs, key=lambda one: one.endpoint_id)
    }
    before = select(*_SHOWN).where(endpoints.c.endpoint_id.in_(rows))

    def work(connection: Connection) -> list[EndpointRow]:
        found = connection.execute(before).all()
        connection.execute(statement, list(rows.values()))
        return [
            _endpoint(row)
            for row in found
            if any(row._mapping[name] != rows[row.endpoint_id][name] for name in shared)
        ]

    return await db.write(work)


def _at_most(now: datetime, column: ColumnElement[Any]) -> ColumnElement[Any]:
    return case((column > now, now), else_=column)


def _endpoint(row: Row[Any]) -> EndpointRow:
    return EndpointRow(**row._asdict() | {"events": tuple(row.events)})


# The outbox: events of runs, each of which becomes a message for each endpoint that wants it.

LEFT_FOR: Final = timedelta(minutes=5)
"""Endpoints that a newer version has noted for the last time longer ago than this are not waited
for: processes note theirs every minute."""

_KNOWN: Final = outbox.c.event.in_([word(event) for event in EventType])

Shown = Callable[[EventType, datetime, Record], str]
"""Makes the body of a message: JSON."""


MOST_MESSAGES: Final = 1000
"""Messages that one transaction makes, unless there are more endpoints: on SQLite nothing else
writes meanwhile, no callback either."""


@dataclass(frozen=True, slots=True)
class FanOut:
    """How many rows of the outbox were taken, and the endpoints for which there are messages.
    `more` is true if others may be waiting."""

    taken: int
    endpoint_ids: frozenset[str] = frozenset()
    more: bool = False


async def outbox_waits(db: Database) -> bool:
    """Whether there are events that this version knows."""
    return await db.fetchrow(select(outbox.c.id).where(_KNOWN).limit(1)) is not None


def fan_out(
    connection: Connection, *, limit: int, now: datetime, body: Shown, own: Collection[str] = ()
) -> FanOut:
    """Turn the oldest events of the outbox that no other process has locked into messages: `limit`
    at most, fewer where many endpoints may get them.

    Endpoints that no process has had in its settings for a day get none; those of this process,
    `own`, do, whatever the clock says. Nothing is sent of a run that ended before its endpoint was
    first configured, so that a first sweep floods nobody. An event whose run is not in the reported
    state any more is dropped, because a change back causes an event of its own.

    What only a newer version knows is left to its processes: their events, and while they run, all
    events where an endpoint has a filter of theirs.
    """
    oldest = select(outbox).where(_KNOWN).order_by(outbox.c.id).limit(limit)
    oldest = oldest.with_for_update(skip_locked=True)
    events = connection.execute(oldest).all()
    if not events:
        return FanOut(0)
    # Read after the events: another process may have configured one before an event was committed.
    is_configured = endpoints.c.configured_at > now - CONFIGURED_WITHIN
    open_to = select(endpoints).where(or_(is_configured, endpoints.c.endpoint_id.in_(own)))
    receivers = connection.execute(open_to).all()
    newest = [one.configured_at for one in receivers if not RunFilter.knows(one.filters)]
    if any(at > now - LEFT_FOR for at in newest):
        return FanOut(0)
    most = max(MOST_MESSAGES // max(len(receivers), 1), 1)
    more = len(events) >= min(limit, most)
    events = events[:most]
    made = _messages_of(connection, events, receivers, now, body) if receivers else []
    if made:
        rows = insert_on(connection.dialect.name)(messages).on_conflict_do_nothing(
            index_elements=[messages.c.endpoint_id, messages.c.event_id]
        )
        connection.execute(rows, made)
    connection.execute(delete(outbox).where(outbox.c.id.in_([event.id for event in events])))
    endpoint_ids = frozenset(row["endpoint_id"] for row in made)
    return FanOut(len(events), endpoint_ids, more)


def _messages_of(
    connection: Connection,
    events: Sequence[Row[Any]],
    receivers: Sequence[Row[Any]],
    now: datetime,
    body: Shown,
) -> list[dict[str, Any]]:
    wanted = select(*RUN_COLUMNS).where(runs.c.run_id.in_({event.run_id for event in events}))
    found = records(connection, connection.execute(wanted).all())
    by_id = {record.run.run_id: record for record in found}
    made = []
    for row in events:
        record, event = by_id.get(row.run_id), EventType(row.event)
        if record is None or not still_holds(event, record):
            continue
        ended_at = _ended_at(record) or row.at
        wanting = [
            endpoint.endpoint_id
            for endpoint in receivers
            if event in endpoint.events
            and endpoint.since <= ended_at
            and RunFilter.from_json(endpoint.filters).matches(record)
        ]
        if not wanting:
            continue
        message = {"event_id": row.event_id, "event": event.value, "run_id": row.run_id}
        message |= {"body": body(event, row.at, record), "event_at": row.at, "created_at": now}
        message |= {"state": "pending", "attempts": 0, "next_attempt_at": now}
        ids = ({"message_id": f"msg_{uuid4().hex}", "endpoint_id": one} for one in wanting)
        made += [message | each for each in ids]
    return made


def _ended_at(record: Record) -> datetime | None:
    """When the run ended. FLORA's time, whose clock may be off, counts only for a run that had
    ended when it was found; the end of any other was seen as it came."""
    seen_at = record.end_seen_at
    is_found = record.source not in (Source.START, Source.CALLBACK)
    if is_found and (seen_at is None or seen_at <= record.first_seen_at):
        return record.run.completed_at or seen_at
    return seen_at


# Queries of messages, the events sent to endpoints, and of their attempts.


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRow:
    """A message. `body`, the JSON as it is sent, is read only for a single message.

    `event_at` is when the event happened, `created_at` when the message was made of it;
    `last_status` and `last_error` are of the last attempt.
    """

    message_id: str
    endpoint_id: str
    event: EventType | str
    run_id: str
    event_at: datetime
    created_at: datetime
    state: MessageState | str
    attempts: int
    last_attempt_at: datetime | None = None
    next_attempt_at: datetime | None = None
    delivered_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None
    body: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """An attempt to deliver a message, from number 1: `seconds` until it ended, the HTTP `status`
    and the beginning of the `answer`, and the `error` if it failed."""

    number: int
    at: datetime
    seconds: float
    status: int | None
    answer: str | None
    error: str | None


_LISTED: Final = [messages.c[name] for name in MessageRow.__slots__ if name != "body"]


def message_is_in(state: MessageState) -> ColumnElement[bool]:
    """The message is in this state."""
    return is_rare(messages.c.state, state, MessageState.DELIVERED)


async def list_messages(
    db: Database,
    *,
    endpoint_id: str | None = None,
    state: str | None = None,
    event: str | None = None,
    run_id: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> tuple[list[MessageRow], str | None]:
    """A page of messages without their bodies, newest first, and the cursor of the next page.

    Raises `InvalidRequest` for an invalid cursor, `ValueError` for an unknown state or event.
    """
    of = matching(messages, endpoint_id=endpoint_id, run_id=run_id)
    statement = select(*_LISTED).where(*of)
    if event is not None:
        statement = statement.where(is_rare(messages.c.event, EventType(event), EventType.SETTLED))
    if state is not None:
        statement = statement.where(message_is_in(MessageState(state)))
    key = (messages.c.created_at, messages.c.message_id)
    async with db.read() as connection:
        rows, following = await newest_first(connection, statement, key, cursor=cursor, limit=limit)
    return [_message(row) for row in rows], following


async def get_message(db: Database, message_id: str) -> MessageRow | None:
    """The message with its body, if known."""
    shown = select(*_LISTED).add_columns(messages.c.body)
    statement = shown.where(messages.c.message_id == message_id)
    row = await db.fetchrow(statement)
    return None if row is None else _message(row)


async def list_attempts(db: Database, message_id: str) -> list[AttemptRow]:
    """The attempts to deliver a message, oldest first."""
    shown = select(*(message_attempts.c[name] for name in AttemptRow.__slots__))
    statement = shown.where(message_attempts.c.message_id == message_id)
    rows = await db.fetch(statement.order_by(message_attempts.c.number))
    return [AttemptRow(**row._mapping) for row in rows]


def _message(row: Row[Any]) -> MessageRow:
    words = {"event": known(EventType, row.event), "state": known(MessageState, row.state)}
    return MessageRow(**row._asdict() | words)
