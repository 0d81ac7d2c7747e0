"""The timeline of all runs as one row of numbered lines, for whoever follows it from a number on.

Numbers are given out before a commit, so on PostgreSQL a smaller one may show after a greater one.
Each page says which transactions were under way when it was read: `tracker.web.stream.whole` tells
from that which missing numbers may still come.
"""

from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, Select, Text, cast, func, select

from tracker.core.observation import Source
from tracker.core.run import Status, status_of
from tracker.store.engine import Database
from tracker.store.tables import run_events


class Line(NamedTuple):
    """One line: what one source saw of one run at one moment, without the details."""

    id: int
    run_id: str
    at: datetime
    source: Source
    status: Status
    progress: float | None


class Moment(NamedTuple):
    """Where PostgreSQL stood when a page was read: all transactions before `ended` had ended, and
    none from `begun` on had begun."""

    ended: int
    begun: int


class Page(NamedTuple):
    """Lines by their numbers. `moment` is `None` where they are committed in that order."""

    lines: list[Line]
    moment: Moment | None


_COLUMNS: Final = tuple(run_events.c[name] for name in Line._fields)


async def after(db: Database, number: int, *, limit: int, upto: int | None = None) -> Page:
    """The next lines after `number`, at most `limit`, and none beyond `upto` where it is given."""
    statement = (
        select(*_COLUMNS).where(run_events.c.id > number).order_by(run_events.c.id).limit(limit)
    )
    if upto is not None:
        statement = statement.where(run_events.c.id <= upto)
    ordered = db.dialect == "sqlite"
    if not ordered:
        statement = _with_moment(statement)
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
    lines = [_line(tuple(row)[: len(_COLUMNS)]) for row in rows]
    if ordered:
        return Page(lines, None)
    return Page(lines, Moment(*rows[0][-2:]) if rows else Moment(0, 0))


async def newest(db: Database) -> int:
    """The greatest number so far; 0 where there is none."""
    async with db.read() as connection:
        return (await connection.execute(select(func.max(run_events.c.id)))).scalar() or 0


def _with_moment(statement: Select[Any]) -> Select[Any]:
    """The rows together with the snapshot that they were read in."""
    snapshot = func.pg_current_snapshot()
    for bound in (func.pg_snapshot_xmin(snapshot), func.pg_snapshot_xmax(snapshot)):
        # Once for the statement, not for each row; and no driver knows the type.
        number = select(cast(cast(bound, Text), BigInteger)).scalar_subquery()
        statement = statement.add_columns(number)
    return statement


def _line(values: tuple[Any, ...]) -> Line:
    number, run_id, at, source, status, progress = values
    return Line(number, run_id, at, Source(source), status_of(status), progress)
