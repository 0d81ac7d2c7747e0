"""The ledger of sweeps: each is complete or failed, and only a complete one counts.

How far back the next sweep has to go follows from the last complete one and from what was not ended
when it was made. A sweep that reached back to the one before says through which moment, by FLORA's
clock, the history is now known to be here: `through` for technique runs, `generations_through` for
the others. One that was asked to look at less leaves both empty.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Connection, Row, Select, func, insert, select, update

from tracker.core.run import RunStatus, Tracking
from tracker.store.claims import Workspaces, within
from tracker.store.engine import Database
from tracker.store.states import is_tracked_as
from tracker.store.tables import runs, sweeps

Kind = Literal["technique", "generation"]

_UNENDED: Final = (RunStatus.PENDING.value, RunStatus.RUNNING.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One sweep of a workspace's history. It is complete if it is finished and has no error."""

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
        )
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def last_through(db: Database, workspace_id: str | None, kind: Kind) -> datetime | None:
    """Through which moment, by FLORA's clock, the workspace's history of that kind is here."""
    async with db.read() as connection:
        last = (await connection.execute(_last_complete(workspace_id, kind))).first()
    return None if last is None else last.through


async def newest_known_for(
    db: Database, workspace_id: str | None, kind: Kind, workspaces: Workspaces
) -> timedelta | None:
    """How long the newest run that the last complete sweep saw had been known when it began.

    By our own clock. `None` where there was no such sweep, or the run is not here any more.
    """
    last = _last_complete(workspace_id, kind).subquery()
    statement = (
        select(last.c.started_at, func.min(runs.c.first_seen_at).label("first_seen_at"))
        .join(runs, (runs.c.created_at == last.c.through) & runs.c.created_at_known)
        .where(within(workspaces))
        .group_by(last.c.started_at)
    )
    async with db.read() as connection:
        found = (await connection.execute(statement)).first()
    return None if found is None else found.started_at - found.first_seen_at


def _last_complete(workspace_id: str | None, kind: Kind) -> Select[Any]:
    """`through` and `started_at` of the last complete sweep that reached the one before."""
    column = sweeps.c.through if kind == "technique" else sweeps.c.generations_through
    return (
        select(column.label("through"), sweeps.c.started_at)
        .where(
            _is(sweeps.c.workspace_id, workspace_id),
            sweeps.c.finished_at.is_not(None),
            sweeps.c.error.is_(None),
            column.is_not(None),
        )
        .order_by(sweeps.c.started_at.desc(), sweeps.c.id.desc())
        .limit(1)
    )


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


async def oldest_unfinished_since(
    db: Database, workspaces: Workspaces, since: datetime
) -> datetime | None:
    """When the oldest run that has not ended was created, of those created at `since` or later."""
    statement = (
        select(runs.c.created_at)
        .where(
            is_tracked_as(Tracking.ACTIVE),
            runs.c.created_at >= since,
            runs.c.status.in_(_UNENDED),
            within(workspaces),
        )
        .order_by(runs.c.created_at)
        .limit(1)
    )
    async with db.read() as connection:
        found: datetime | None = (await connection.execute(statement)).scalar()
    return found


def _is(column: ColumnElement[Any], workspace_id: str | None) -> ColumnElement[bool]:
    return column.is_(None) if workspace_id is None else column == workspace_id


def _row(row: Row[Any]) -> SweepRow:
    return SweepRow(**row._asdict())
