"""What wants somebody's eye: reads that are overdue, and where the sweeps of each workspace stand.

Times are UTC.
"""

from datetime import datetime, timedelta
from typing import Final, NamedTuple

from sqlalchemy import column, select, table

from tracker.core.record import Record
from tracker.store.engine import Database
from tracker.store.records import read_records
from tracker.store.rows import RUN_COLUMNS
from tracker.store.tables import leases, runs
from tracker.store.types import CleanText, UtcDateTime

LATE_AFTER: Final = timedelta(seconds=60)
"""How long a read may be due before somebody should know of it."""

SWEEPS: Final = table(
    "v_sweeps",
    column("workspace_id", CleanText),
    *(
        column(name, UtcDateTime)
        for name in (
            *("last_started_at", "last_finished_at", "complete_started_at"),
            *("complete_finished_at", "through", "generations_through"),
        )
    ),
    column("last_error", CleanText),
    column("last_generations_error", CleanText),
)


class SweepHealth(NamedTuple):
    """Where the sweeps of one workspace stand.

    `complete_at` is the end of the last complete one, `through` and `generations_through` the
    moments, by FLORA's clock, through which its history is verified; `last_error` is why the last
    one failed, `None` where it did not (or has not ended: then `last_finished_at` is `None`), and
    `generations_error` why it could not read generations.
    """

    workspace_id: str | None
    last_started_at: datetime
    last_finished_at: datetime | None
    last_error: str | None
    complete_started_at: datetime | None
    complete_at: datetime | None
    through: datetime | None
    generations_through: datetime | None
    generations_error: str | None = None


async def overdue(
    db: Database, *, now: datetime, after: timedelta = LATE_AFTER, limit: int = 20
) -> list[Record]:
    """The runs whose next read has been due for longer than `after`, the longest first.

    There are none where a worker keeps up. They come without their outputs.
    """
    statement = (
        select(*RUN_COLUMNS)
        .where(runs.c.next_check_at <= now - after)
        .order_by(runs.c.next_check_at)
        .limit(limit)
    )
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
        return await read_records(connection, rows)


async def conflicts(db: Database, *, among: int = 10_000, limit: int = 100) -> list[str]:
    """Of the newest `among` runs those about whose end two sources disagreed, newest first."""
    newest = (
        select(runs.c.run_id, runs.c.conflict)
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(among)
        .subquery()
    )
    async with db.read() as connection:
        found = await connection.scalars(
            select(newest.c.run_id).where(newest.c.conflict).limit(limit)
        )
        return list(found)


async def sweep_health(db: Database) -> list[SweepHealth]:
    """Where the sweeps of each workspace stand; one that was never swept is left out."""
    names = (
        *("workspace_id", "last_started_at", "last_finished_at", "last_error"),
        *("complete_started_at", "complete_finished_at", "through", "generations_through"),
        "last_generations_error",
    )
    statement = select(*(SWEEPS.c[name] for name in names))
    async with db.read() as connection:
        found = [SweepHealth(*row) for row in await connection.execute(statement)]
    return sorted(found, key=lambda each: each.workspace_id or "")


async def sweeping(db: Database, *, now: datetime) -> bool:
    """Whether some process is sweeping a history at this moment."""
    held = leases.c.name.startswith("sweep:") & (leases.c.until > now)
    async with db.read() as connection:
        return (await connection.execute(select(leases.c.name).where(held))).first() is not None
