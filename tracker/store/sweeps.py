"""The log of sweeps: what each read and found, and what stopped it.

Nothing is decided by it: how far the history is here stands in `tracker.store.coverage`.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from tracker.store.engine import Database
from tracker.store.tables import sweeps


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One sweep of a workspace's history. It is complete if it is finished and has no error.

    `through` and `generations_through` say up to which moment, by FLORA's clock, each kind was
    verified when it ended. `generations_error` is why generations could not be swept.
    """

    id: int
    workspace_id: str | None
    started_at: datetime
    finished_at: datetime | None
    pages: int
    items: int
    discovered: int
    repaired: int
    unreadable: int
    through: datetime | None
    generations_through: datetime | None
    error: str | None
    generations_error: str | None


async def begin(db: Database, workspace_id: str | None, at: datetime) -> int:
    """Note that a sweep begins; returns its number. Until `finish` it counts as not complete."""
    statement = (
        insert(sweeps)
        .values(
            workspace_id=workspace_id,
            started_at=at,
            pages=0,
            items=0,
            discovered=0,
            repaired=0,
            unreadable=0,
        )
        .returning(sweeps.c.id)
    )

    def work(connection: Connection) -> int:
        number: int = connection.execute(statement).scalar_one()
        return number

    return await db.write(work)


async def finish(
    db: Database,
    number: int,
    *,
    at: datetime,
    pages: int,
    items: int,
    discovered: int,
    repaired: int,
    unreadable: int = 0,
    through: datetime | None = None,
    generations_through: datetime | None = None,
    error: str | None = None,
    generations_error: str | None = None,
) -> None:
    """Note how a sweep ended: whole, or with the error that stopped it."""
    statement = (
        update(sweeps)
        .where(sweeps.c.id == number)
        .values(
            finished_at=at,
            pages=pages,
            items=items,
            discovered=discovered,
            repaired=repaired,
            unreadable=unreadable,
            through=through,
            generations_through=generations_through,
            error=error,
            generations_error=generations_error,
        )
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def list_sweeps(
    db: Database, *, limit: int = 20, before: int | None = None
) -> list[SweepRow]:
    """The last sweeps of all workspaces, newest first; those `before` a number, where one is
    given."""
    statement = select(sweeps).order_by(sweeps.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(sweeps.c.id < before)
    async with db.read() as connection:
        return [_row(row) for row in await connection.execute(statement)]


def _row(row: Row[Any]) -> SweepRow:
    return SweepRow(**row._asdict())
