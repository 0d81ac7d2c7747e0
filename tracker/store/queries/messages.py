"""Queries of messages, the events sent to endpoints, and of their attempts."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, select

from tracker.core.events import EventType, MessageState
from tracker.store.engine import Database
from tracker.store.queries.paging import newest_first
from tracker.store.schema import message_attempts, messages, word


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRow:
    """A message. `body`, the JSON as it is sent, is read only for a single message.

    `event_at` is when the event happened, `created_at` when the message was made of it;
    `last_status` and `last_error` are of the last attempt.
    """

    message_id: str
    endpoint_id: str
    event: EventType
    run_id: str
    event_at: datetime
    created_at: datetime
    state: MessageState
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


_SHOWN: Final = [messages.c[name] for name in MessageRow.__slots__ if name != "body"]


def is_in(state: MessageState) -> ColumnElement[bool]:
    """The message is in this state; the condition matches the partial index of all but
    delivered ones."""
    wanted = messages.c.state == word(state.value)
    if state is MessageState.DELIVERED:
        return wanted
    return and_(wanted, messages.c.state != word(MessageState.DELIVERED.value))


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
    statement = select(*_SHOWN)
    equal = {"endpoint_id": endpoint_id, "run_id": run_id}
    for name, value in equal.items():
        if value is not None:
            statement = statement.where(messages.c[name] == value)
    if event is not None:
        kind = EventType(event)
        statement = statement.where(messages.c.event == word(kind.value))
        if kind is not EventType.SETTLED:  # the condition of the partial index
            statement = statement.where(messages.c.event != word(EventType.SETTLED.value))
    if state is not None:
        statement = statement.where(is_in(MessageState(state)))
    key = (messages.c.created_at, messages.c.message_id)
    async with db.read() as connection:
        rows, following = await newest_first(connection, statement, key, cursor=cursor, limit=limit)
    return [_message(row) for row in rows], following


async def get_message(db: Database, message_id: str) -> MessageRow | None:
    """The message with its body, if known."""
    shown = select(*_SHOWN).add_columns(messages.c.body)
    statement = shown.where(messages.c.message_id == message_id)
    async with db.read() as connection:
        row = (await connection.execute(statement)).one_or_none()
    return None if row is None else _message(row)


async def list_attempts(db: Database, message_id: str) -> list[AttemptRow]:
    """The attempts to deliver a message, oldest first."""
    columns = [message_attempts.c[name] for name in AttemptRow.__slots__]
    statement = (
        select(*columns)
        .where(message_attempts.c.message_id == message_id)
        .order_by(message_attempts.c.number)
    )
    async with db.read() as connection:
        return [AttemptRow(**row._mapping) for row in await connection.execute(statement)]


def _message(row: Any) -> MessageRow:
    values = dict(row._mapping)
    event, state = EventType(values["event"]), MessageState(values["state"])
    return MessageRow(**values | {"event": event, "state": state})
