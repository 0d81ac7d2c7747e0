"""Rows of `deliveries`, and the statements about them that both databases share."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Integer,
    Row,
    Select,
    bindparam,
    case,
    delete,
    func,
    null,
    select,
    update,
)

from tracker.core.record import TEST_DELIVERY, TEST_DELIVERY_IDS, Delivery
from tracker.store.engine import Database
from tracker.store.schema import deliveries, word
from tracker.store.writing import retention

_READ: Final = (
    *("delivery_id", "received_at", "run_id", "event_type", "workspace_id", "callback_token"),
)
"""What applying a delivery needs of its row, beside the body."""
SMALL: Final = 16 * 1024
MOST_LARGE: Final = 32
"""Bytes that nearly every body has at most, and how many larger ones are applied together: of these
too, at 256 KiB each, no more than eight megabytes are in memory."""


def waiting_first() -> Select[Any]:
    """The first `most` deliveries that wait, oldest first; of large ones without the body."""
    body = case((func.length(deliveries.c.body) <= SMALL, deliveries.c.body))
    return (
        select(*(deliveries.c[name] for name in _READ), body.label("body"))
        .where(deliveries.c.outcome == word("waiting"))
        .order_by(deliveries.c.received_at, deliveries.c.delivery_id)
        .limit(bindparam("most", type_=Integer))
    )


def deliveries_of(connection: Connection, rows: Sequence[Row[Any]]) -> list[Delivery]:
    """The deliveries of rows that `waiting_first` found; of large ones the first few."""
    large = [row.delivery_id for row in rows if row.body is None][:MOST_LARGE]
    bodies: dict[str, bytes] = {}
    if large:
        whole = select(deliveries.c.delivery_id, deliveries.c.body)
        found = connection.execute(whole.where(deliveries.c.delivery_id.in_(large)))
        bodies = dict(found.all())
    return [
        Delivery(
            delivery_id=delivery_id,
            received_at=received_at,
            body=bodies[delivery_id] if body is None else body,
            run_id=run_id,
            event_type=event_type,
            workspace_id=workspace_id,
            callback_token=token,
        )
        for delivery_id, received_at, run_id, event_type, workspace_id, token, body in map(
            tuple, rows
        )
        if body is not None or delivery_id in bodies
    ]


_QUARANTINE: Final = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("quarantined"))
    .where(deliveries.c.outcome == word("waiting"))
    .values(outcome="quarantined", reason=bindparam("because", type_=deliveries.c.reason.type))
)


def quarantine(connection: Connection, which: Sequence[tuple[str, str]]) -> None:
    """Quarantine deliveries that wait, each with its reason."""
    if which:
        rows = [{"quarantined": key, "because": reason} for key, reason in which]
        connection.execute(_QUARANTINE, rows)


_READ_AGAIN: Final = ("run_id", "event_type", "api_version", "workspace_id", "created_at")
"""What a newer version, or other settings, may read otherwise than when the callback came."""
_REQUEUE: Final = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("requeued"))
    .where(deliveries.c.outcome == word("quarantined"))
    .values(
        outcome="waiting",
        reason=null(),
        **{name: bindparam(f"as_{name}", type_=deliveries.c[name].type) for name in _READ_AGAIN},
    )
)


def requeue(connection: Connection, delivery: Delivery) -> bool:
    """Let a quarantined delivery, which reads so now, wait again; whether it was quarantined."""
    read = {f"as_{name}": getattr(delivery, name) for name in _READ_AGAIN}
    if not connection.execute(_REQUEUE, {"requeued": delivery.delivery_id, **read}).rowcount:
        return False
    # Applied, its body is one of those that go, maybe before where the last ones went.
    retention.step_back(connection, "bodies", delivery.received_at)
    return True


def requeue_runs(connection: Connection, run_ids: Sequence[str]) -> bool:
    """Let the quarantined deliveries of runs wait again, of which it is now known whose they are;
    whether there were any."""
    statement = (
        update(deliveries)
        .where(deliveries.c.run_id.in_(run_ids), deliveries.c.outcome == word("quarantined"))
        .values(outcome="waiting", reason=null())
        .returning(deliveries.c.received_at)
    )
    received = connection.execute(statement).scalars().all()
    if received:
        retention.step_back(connection, "bodies", min(received))
    return bool(received)


# The test deliveries of `tracker doctor`. They are stored like any callback, so that a 2xx has the
# same meaning; the doctor deletes them again.


async def arrived(db: Database, delivery_ids: Sequence[str]) -> set[str]:
    """Which of these test deliveries are stored. Raises `StoreUnavailable`."""
    statement = select(deliveries.c.delivery_id).where(deliveries.c.delivery_id.in_(delivery_ids))
    async with db.read() as connection:
        return set(await connection.scalars(statement))


async def take_out(db: Database, delivery_ids: Sequence[str]) -> None:
    """Delete these test deliveries, and nothing else. Raises `StoreUnavailable`."""
    statement = delete(deliveries).where(
        deliveries.c.delivery_id.in_(delivery_ids), deliveries.c.event_type == TEST_DELIVERY
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def take_out_left(db: Database, *, before: datetime) -> None:
    """Delete test deliveries received before then that were left behind: one that timed out may
    have arrived later. Raises `StoreUnavailable`."""
    statement = delete(deliveries).where(
        # A stretch of the primary key: no digit sorts behind "g".
        deliveries.c.delivery_id >= TEST_DELIVERY_IDS,
        deliveries.c.delivery_id < f"{TEST_DELIVERY_IDS}g",
        deliveries.c.event_type == TEST_DELIVERY,
        deliveries.c.received_at < before,
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)
