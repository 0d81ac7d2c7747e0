"""The outbox: events of runs, each of which becomes a message for each endpoint that wants it.

The writer adds rows to `outbox` in the transaction that causes an event. `fan_out` deletes them in
the transaction that adds the messages, so that no event is forgotten and none is sent twice.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Connection, Row, delete, or_, select

from tracker.core.events import EventType, RunFilter, still_holds
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.store.engine import Database, insert_on
from tracker.store.queries.endpoints import CONFIGURED_WITHIN
from tracker.store.rows import RUN_COLUMNS, records
from tracker.store.schema import endpoints, messages, outbox, runs, word

LEFT_FOR: Final = timedelta(minutes=5)
"""Endpoints that a newer version has noted for the last time longer ago than this are not waited
for: processes note theirs every minute."""

_KNOWN: Final = outbox.c.event.in_([word(event) for event in EventType])

Shown = Callable[[EventType, datetime, Record], str]
"""Makes the body of a message: JSON."""


@dataclass(frozen=True, slots=True)
class FanOut:
    """How many rows of the outbox were taken, and the endpoints for which there are messages."""

    taken: int
    endpoint_ids: frozenset[str] = frozenset()


async def outbox_waits(db: Database) -> bool:
    """Whether there are events that this version knows."""
    return await db.fetchrow(select(outbox.c.id).where(_KNOWN).limit(1)) is not None


def fan_out(
    connection: Connection, *, limit: int, now: datetime, body: Shown, own: Collection[str] = ()
) -> FanOut:
    """Turn the oldest events of the outbox that no other process has locked into messages.

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
    is_configured = endpoints.c.configured_at > now - CONFIGURED_WITHIN
    known = select(endpoints).where(or_(is_configured, endpoints.c.endpoint_id.in_(own)))
    receivers = connection.execute(known).all()
    newest = [one.configured_at for one in receivers if not RunFilter.knows(one.filters)]
    if any(at > now - LEFT_FOR for at in newest):
        return FanOut(0)
    made = _messages_of(connection, events, receivers, now, body) if receivers else []
    if made:
        rows = insert_on(connection.dialect.name)(messages).on_conflict_do_nothing(
            index_elements=[messages.c.endpoint_id, messages.c.event_id]
        )
        connection.execute(rows, made)
    connection.execute(delete(outbox).where(outbox.c.id.in_([event.id for event in events])))
    return FanOut(len(events), frozenset(row["endpoint_id"] for row in made))


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
