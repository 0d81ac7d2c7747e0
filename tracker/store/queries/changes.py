"""The timeline of all runs as one row of numbered lines, for whoever follows it from a number on.

Numbers are given out before a commit, so on PostgreSQL a smaller one may show after a greater one.
Each page says which transactions were under way when it was read; `GapTracker` (tracker.web.stream)
derives from that which missing numbers may still come.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, Select, Text, cast, func, select

from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import Status, status_of
from tracker.store.engine import Database
from tracker.store.rows import RUN_COLUMNS, read_records
from tracker.store.schema import run_events, runs, word


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


# What is new in the timeline: who brought the last news of a run, and which runs have settled.
#
# The timeline is read by its numbers. PostgreSQL gives them out before the commit, so that a
# smaller one may show after a greater one: whoever reads on begins a little before where it
# ended.


OVERLAP: Final = 1000
"""So many numbers before the last one are read again."""


async def last_sources(db: Database, run_ids: Sequence[str]) -> dict[str, Source]:
    """Who brought the last news of each of the runs."""
    last = select(func.max(run_events.c.id)).where(run_events.c.run_id.in_(run_ids))
    statement = select(run_events.c.run_id, run_events.c.source).where(
        run_events.c.id.in_(last.group_by(run_events.c.run_id))
    )
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
    return {run_id: Source(source) for run_id, source in rows}


async def last_number(db: Database) -> int:
    """The number of the newest line of the timeline; 0 where there is none."""
    async with db.read() as connection:
        return (await connection.execute(select(func.max(run_events.c.id)))).scalar() or 0


async def settled_since(
    db: Database, number: int, *, technique_id: str | None = None
) -> tuple[list[Record], int]:
    """Runs that have settled and have news since that line, and the number to go on from.

    Some come again and again: lines shortly before `number` are looked at too.
    """
    reached = await last_number(db)
    changed = select(run_events.c.run_id).where(
        run_events.c.id > number - OVERLAP, run_events.c.id <= reached
    )
    statement = select(*RUN_COLUMNS).where(
        runs.c.run_id.in_(changed), runs.c.tracking == word("settled")
    )
    if technique_id is not None:
        statement = statement.where(runs.c.technique_id == technique_id)
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
        return await read_records(connection, rows), max(reached, number)
