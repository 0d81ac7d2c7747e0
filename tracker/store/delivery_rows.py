"""Rows of `deliveries`, and the statements about them that both databases share."""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Integer, Select, bindparam, null, select, update

from tracker.core.entry import Delivery
from tracker.store import retention
from tracker.store.tables import deliveries, word

_READ: Final = (
    *("delivery_id", "received_at", "body", "run_id", "event_type", "workspace_id"),
    "callback_token",
)
"""What applying a delivery needs of its row."""


def waiting_first() -> Select[Any]:
    """The first `most` deliveries that wait, oldest first."""
    return (
        select(*(deliveries.c[name] for name in _READ))
        .where(deliveries.c.outcome == word("waiting"))
        .order_by(deliveries.c.received_at, deliveries.c.delivery_id)
        .limit(bindparam("most", type_=Integer))
    )


def delivery_of(row: Any) -> Delivery:
    """The delivery of a row that `waiting_first` found."""
    return Delivery(**dict(zip(_READ, row, strict=True)))


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
