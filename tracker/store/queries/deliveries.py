"""Callbacks as they were received; of those that are quarantined the causes."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, and_, func, select

from tracker.core.record import DeliveryOutcome
from tracker.core.run import known
from tracker.store.engine import Database
from tracker.store.queries.paging import between, matching, newest_first
from tracker.store.schema import deliveries, word


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRow:
    """A stored callback. `body` is read only for a single delivery; retention may have removed
    it."""

    delivery_id: str
    run_id: str | None
    event_type: str | None
    api_version: str | None
    workspace_id: str | None
    created_at: datetime | None
    received_at: datetime
    last_received_at: datetime
    receipts: int
    outcome: DeliveryOutcome | str
    reason: str | None
    applied_at: datetime | None = None
    body_removed_at: datetime | None = None
    acknowledged_at: datetime | None = None
    body: bytes | None = None


async def list_deliveries(
    db: Database,
    *,
    outcome: str | None = None,
    run_id: str | None = None,
    workspace_id: str | None = None,
    since: datetime | None = None,
    acknowledged: bool | None = None,
    cause: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> tuple[list[DeliveryRow], str | None]:
    """A page of callbacks without their bodies, newest first, and the cursor of the next page.

    `since` is when they were first received, `cause` that of `causes`.

    Raises `InvalidRequest` for an invalid cursor.
    """
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    columns = (column for column in deliveries.c if column.name != "body")
    of = matching(deliveries, run_id=run_id, workspace_id=workspace_id)
    statement = select(*columns).where(*of, *between(deliveries.c.received_at, since))
    if outcome is not None:  # `word`: matches the partial index
        statement = statement.where(deliveries.c.outcome == word(DeliveryOutcome(outcome).value))
    if acknowledged is not None:
        statement = statement.where(deliveries.c.acknowledged_at.is_not(None) == acknowledged)
    if cause is not None:
        statement = statement.where(has_cause(cause))
    async with db.read() as connection:
        rows, following = await newest_first(connection, statement, key, cursor=cursor, limit=limit)
    return [_delivery(row) for row in rows], following


async def get_delivery(db: Database, delivery_id: str) -> DeliveryRow | None:
    """The delivery with its body, if known."""
    found = await db.fetchrow(select(deliveries).where(deliveries.c.delivery_id == delivery_id))
    return None if found is None else _delivery(found)


def _delivery(row: Row[Any]) -> DeliveryRow:
    values = row._asdict()
    del values["callback_token"]  # a secret: it authenticates callbacks of the start
    if row.body_removed_at is not None:
        values["body"] = None  # emptied by retention
    return DeliveryRow(**values | {"outcome": known(DeliveryOutcome, values["outcome"])})


# Queries of quarantined deliveries: the causes, and which deliveries have one of them.

IS_UNSEEN: Final = and_(
    deliveries.c.outcome == word("quarantined"), deliveries.c.acknowledged_at.is_(None)
)
"""The delivery is quarantined, and nobody has acknowledged it."""
AMONG: Final = 10_000
"""The newest unseen deliveries, which are grouped."""
CAUSE_LENGTH: Final = 200
"""Characters of a reason by which deliveries are grouped."""
_CAUSE: Final = func.trim(func.substr(func.coalesce(deliveries.c.reason, ""), 1, CAUSE_LENGTH))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Unseen deliveries with one reason: how many, and when the first and the last came."""

    text: str
    count: int
    first_at: datetime
    last_at: datetime


def has_cause(text: str) -> ColumnElement[bool]:
    """The reason of the delivery begins with this text of a `Cause`."""
    return _CAUSE.is_not_distinct_from(text)


async def causes(db: Database, *, limit: int) -> list[Cause]:
    """The causes of the newest `AMONG` unseen deliveries, the most frequent first."""
    newest = (
        select(_CAUSE.label("text"), deliveries.c.received_at)
        .where(IS_UNSEEN)
        .order_by(deliveries.c.received_at.desc())
        .limit(AMONG)
        .subquery()
    )
    count, at = func.count().label("count"), newest.c.received_at
    statement = (
        select(newest.c.text, count, func.min(at).label("first_at"), func.max(at).label("last_at"))
        .group_by(newest.c.text)
        .order_by(count.desc(), newest.c.text)
        .limit(limit)
    )
    return [Cause(**row._asdict()) for row in await db.fetch(statement)]


async def unseen_deliveries(db: Database, *, cause: str, until: datetime, limit: int) -> list[str]:
    """The ids of unseen deliveries with this cause that were received until then, oldest first."""
    statement = select(deliveries.c.delivery_id).where(
        IS_UNSEEN, has_cause(cause), deliveries.c.received_at <= until
    )
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    return await db.fetchcol(statement.order_by(*key).limit(limit))
