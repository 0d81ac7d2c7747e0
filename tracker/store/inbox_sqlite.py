"""Storing a group of deliveries on SQLite: one transaction, in which nobody can come in between."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, bindparam, func, select, update
from sqlalchemy.dialects.sqlite import insert

from tracker.store.batch_sqlite import Insert, is_any_of, plain_rows
from tracker.store.engine import Database
from tracker.store.inbox import Receipt
from tracker.store.tables import deliveries
from tracker.store.text import dump_json

_NAMES: Final = [
    *("delivery_id", "run_id", "event_type", "api_version", "workspace_id", "created_at"),
    *("received_at", "last_received_at", "receipts", "outcome", "body"),
    "callback_token",
]
KNOWN: Final = select(
    *[deliveries.c[name] for name in ("delivery_id", "outcome", "body")],
    deliveries.c.body_removed_at.is_not(None),
).where(is_any_of(deliveries.c.delivery_id, "delivery_ids"))
STORE: Final = Insert(insert(deliveries), _NAMES)
COUNT: Final = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("known"))
    .values(
        receipts=deliveries.c.receipts + bindparam("more"),
        last_received_at=func.max(
            deliveries.c.last_received_at,
            bindparam("last", type_=deliveries.c.last_received_at.type),
        ),
    )
)
_plain: Final = plain_rows(deliveries.c[name] for name in _NAMES)


async def store(db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
    """See `tracker.store.inbox.Stores`."""
    return await db.write(partial(_store, receipts))


def _store(receipts: Sequence[Receipt], connection: Connection) -> dict[str, str | None]:
    keys = dump_json([receipt.delivery.delivery_id for receipt in receipts])
    before = {row[0]: row for row in connection.execute(KNOWN, {"delivery_ids": keys})}
    known: dict[str, str | None] = {}
    new: list[tuple[Any, ...]] = []
    counted = []
    for receipt in receipts:
        one = receipt.delivery
        if (row := before.get(one.delivery_id)) is None:
            new.append(_row(receipt))
            continue
        _, outcome, body, body_is_gone = tuple(row)
        # A body that retention has removed cannot be compared: see the statement for PostgreSQL.
        is_same = body == one.body or body_is_gone
        known[one.delivery_id] = outcome if is_same else None
        if is_same:
            more = {"known": one.delivery_id, "more": receipt.count}
            counted.append(more | {"last": receipt.last_received_at})
    STORE(connection, _plain(new))
    if counted:
        connection.execute(COUNT, counted)
    return known


def _row(receipt: Receipt) -> tuple[Any, ...]:
    """The row of a new delivery, in the order of `_NAMES`."""
    one = receipt.delivery
    return (
        one.delivery_id,
        one.run_id,
        one.event_type,
        one.api_version,
        one.workspace_id,
        one.created_at,
        one.received_at,
        receipt.last_received_at,
        receipt.count,
        "waiting",
        one.body,
        one.callback_token,
    )
