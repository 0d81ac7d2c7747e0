"""Deliveries as they stand in the database, put there without an inbox; and waiting for one."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite

from tests.support.waiting import eventually
from tracker.core.observation import Observation
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.store.engine import Database
from tracker.store.schema import deliveries


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """A delivery, what became of it, and what it says of its run, if anything."""

    delivery: Delivery
    outcome: DeliveryOutcome = DeliveryOutcome.APPLIED
    reason: str | None = None
    observation: Observation | None = None


async def keep(db: Database, delivered: Delivered) -> None:
    """Store a delivery as it stands after that, or count it where it is there."""
    insert: Any = postgresql.insert if db.dialect == "postgresql" else sqlite.insert
    one = delivered.delivery
    applied = delivered.outcome is DeliveryOutcome.APPLIED
    row = insert(deliveries).values(
        delivery_id=one.delivery_id,
        run_id=one.run_id,
        event_type=one.event_type,
        api_version=one.api_version,
        workspace_id=one.workspace_id,
        created_at=one.created_at,
        received_at=one.received_at,
        last_received_at=one.received_at,
        receipts=1,
        outcome=delivered.outcome.value,
        reason=delivered.reason,
        applied_at=one.received_at if applied else None,
        body=one.body,
    )
    counted = row.on_conflict_do_update(
        index_elements=[deliveries.c.delivery_id],
        set_={
            "receipts": deliveries.c.receipts + 1,
            "last_received_at": row.excluded.last_received_at,
        },
    )
    await db.write(lambda connection: connection.execute(counted).rowcount)


async def waiting(db: Database) -> int:
    """How many deliveries are stored and not applied."""
    query = select(func.count()).where(deliveries.c.outcome == DeliveryOutcome.WAITING)
    async with db.read() as connection:
        return int(await connection.scalar(query) or 0)


async def applied(db: Database) -> None:
    """Return as soon as no delivery waits: what was acknowledged before has had its effect."""

    async def none_waits() -> bool:
        return await waiting(db) == 0

    await eventually(none_waits)
