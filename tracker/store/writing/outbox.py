"""The outbox becomes messages: one for each event and each endpoint that wants it.

The writer adds rows to `outbox` in the transaction that causes an event. `fan_out` deletes them in
the transaction that adds the messages, so that no event is forgotten and none is sent twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Row, delete, select

from tracker.core.events import EventType, RunFilter, still_holds
from tracker.core.record import Record
from tracker.store.engine import Database, insert_on
from tracker.store.queries.endpoints import CONFIGURED_WITHIN
from tracker.store.rows import RUN_COLUMNS, records
from tracker.store.schema import endpoints, messages, outbox, runs

Shown = Callable[[EventType, datetime, Record], str]
"""Makes the body of a message: JSON."""


@dataclass(frozen=True, slots=True)
class FanOut:
    """How many rows of the outbox were taken, and the endpoints for which there are messages."""

    taken: int
    endpoint_ids: frozenset[str] = frozenset()


async def outbox_waits(db: Database) -> bool:
    """Whether there are events."""
    return await db.fetchrow(select(outbox.c.id).limit(1)) is not None


def fan_out(connection: Connection, *, limit: int, now: datetime, body: Shown) -> FanOut:
    """Turn the oldest events of the outbox that no other process has locked into messages.

    Endpoints that no process has had in its settings for a day get none. Nothing is sent of a run
    that ended before its endpoint was first configured, so that a first sweep floods nobody. An
    event whose run is not in the reported state any more is dropped, because a change back causes
    an event of its own.
    """
    oldest = select(outbox).order_by(outbox.c.id).limit(limit).with_for_update(skip_locked=True)
    events = connection.execute(oldest).all()
    if not events:
        return FanOut(0)
    known = select(endpoints).where(endpoints.c.configured_at > now - CONFIGURED_WITHIN)
    receivers = connection.execute(known).all()
    made = list(_messages(connection, events, receivers, now, body)) if receivers else []
    if made:
        rows = insert_on(connection.dialect.name)(messages).on_conflict_do_nothing(
            index_elements=[messages.c.endpoint_id, messages.c.event_id]
        )
        connection.execute(rows, made)
    connection.execute(delete(outbox).where(outbox.c.id.in_([event.id for event in events])))
    return FanOut(len(events), frozenset(row["endpoint_id"] for row in made))


def _messages(
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
        ended_at = record.run.completed_at or record.end_seen_at or row.at
        wanting = [
            endpoint.endpoint_id
            for endpoint in receivers
            if event in endpoint.events
            and endpoint.since <= ended_at
            and RunFilter.from_json(endpoint.filters).matches(record)
        ]
        text = body(event, row.at, record) if wanting else ""
        made += [
            {
                "message_id": f"msg_{uuid4().hex}",
                "endpoint_id": endpoint_id,
                "event_id": row.event_id,
                "event": event.value,
                "run_id": row.run_id,
                "body": text,
                "event_at": row.at,
                "created_at": now,
                "state": "pending",
                "attempts": 0,
                "next_attempt_at": now,
            }
            for endpoint_id in wanting
        ]
    return made
