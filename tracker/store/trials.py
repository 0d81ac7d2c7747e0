"""The test deliveries of `tracker doctor`: looked for where they should have come, and taken out.

A trial goes the way of every callback, so that a 2xx means for it what it means for any: it is
stored. It is no part of the history, so whoever sent it takes it out again.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, select

from tracker.core.entry import TRIAL, TRIAL_IDS
from tracker.store.engine import Database
from tracker.store.tables import deliveries


async def arrived(db: Database, delivery_ids: Sequence[str]) -> set[str]:
    """Which of these trials are stored. Raises `StoreUnavailable`."""
    statement = select(deliveries.c.delivery_id).where(deliveries.c.delivery_id.in_(delivery_ids))
    async with db.read() as connection:
        return set(await connection.scalars(statement))


async def take_out(db: Database, delivery_ids: Sequence[str]) -> None:
    """Remove these trials; nothing but a trial is ever removed. Raises `StoreUnavailable`."""
    statement = delete(deliveries).where(
        deliveries.c.delivery_id.in_(delivery_ids), deliveries.c.event_type == TRIAL
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def take_out_left(db: Database, *, before: datetime) -> None:
    """Remove the trials that came before that moment and that nobody took out: one that was given
    up on its way may have come nevertheless. Raises `StoreUnavailable`."""
    statement = delete(deliveries).where(
        # A stretch of the primary key: no digit sorts behind "g".
        deliveries.c.delivery_id >= TRIAL_IDS,
        deliveries.c.delivery_id < f"{TRIAL_IDS}g",
        deliveries.c.event_type == TRIAL,
        deliveries.c.received_at < before,
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)
