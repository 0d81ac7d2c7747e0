"""Queries of quarantined deliveries: the causes, and which deliveries have one of them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, and_, func, select

from tracker.store.engine import Database
from tracker.store.schema import deliveries, word

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
    async with db.read() as connection:
        return [Cause(**row._asdict()) for row in await connection.execute(statement)]


async def unseen(db: Database, *, cause: str, until: datetime, limit: int) -> list[str]:
    """The ids of unseen deliveries with this cause that were received until then, oldest first."""
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    statement = (
        select(deliveries.c.delivery_id)
        .where(IS_UNSEEN, has_cause(cause), deliveries.c.received_at <= until)
        .order_by(*key)
        .limit(limit)
    )
    async with db.read() as connection:
        return list(await connection.scalars(statement))
