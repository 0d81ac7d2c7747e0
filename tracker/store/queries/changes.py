"""Following changes: the timeline of all runs as numbered events.

On PostgreSQL numbers are assigned before the commit, so a smaller one may appear after a greater
one. Each page therefore carries the transaction snapshot that it was read in, from which
`GapTracker` (tracker.web.stream) derives which missing numbers may still appear; other readers
re-read `OVERLAP` numbers.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, Select, Text, cast, func, select

from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import Status, status_of
from tracker.store.engine import Database
from tracker.store.queries.paging import chunks
from tracker.store.rows import RUN_COLUMNS, fetch_records
from tracker.store.schema import run_events, runs, word


class Line(NamedTuple):
    """One event: what one source showed of one run at one time, without the details."""

    id: int
    run_id: str
    at: datetime
    source: Source
    status: Status
    progress: float | None


class Moment(NamedTuple):
    """A PostgreSQL snapshot: transactions before `ended` have ended, those from `begun` on have not
    begun."""

    ended: int
    begun: int


class LinePage(NamedTuple):
    """Events by number. `moment` is `None` if numbers are committed in order (SQLite)."""

    lines: list[Line]
    moment: Moment | None


_COLUMNS: Final = tuple(run_events.c[name] for name in Line._fields)


async def after(db: Database, number: int, *, limit: int, upto: int | None = None) -> LinePage:
    """The next events after `number`, at most `limit`, up to `upto` if given."""
    statement = (
        select(*_COLUMNS).where(run_events.c.id > number).order_by(run_events.c.id).limit(limit)
    )
    if upto is not None:
        statement = statement.where(run_events.c.id <= upto)
    ordered = db.dialect == "sqlite"
    if not ordered:
        statement = _with_moment(statement)
    rows = await db.fetch(statement)
    lines = [
        Line(*row[: len(_COLUMNS)])._replace(
            source=Source(row.source), status=status_of(row.status)
        )
        for row in rows
    ]
    if ordered:
        return LinePage(lines, None)
    return LinePage(lines, Moment(*rows[0][-2:]) if rows else Moment(0, 0))


async def newest(db: Database) -> int:
    """The greatest number so far, else 0."""
    return await db.fetchval(select(func.max(run_events.c.id))) or 0


def _with_moment(statement: Select[Any]) -> Select[Any]:
    """The rows, with the snapshot that they are read in."""
    snapshot = func.pg_current_snapshot()
    for bound in (func.pg_snapshot_xmin(snapshot), func.pg_snapshot_xmax(snapshot)):
        # A scalar subquery is evaluated once; the cast is for drivers, which lack the type.
        number = select(cast(cast(bound, Text), BigInteger)).scalar_subquery()
        statement = statement.add_columns(number)
    return statement


OVERLAP: Final = 1000
"""Numbers before the last one that are read again."""


async def last_sources(db: Database, run_ids: Iterable[str]) -> dict[str, Source]:
    """The source of the latest event of each run."""
    found: dict[str, Source] = {}
    for some in chunks(run_ids):
        last = select(func.max(run_events.c.id)).where(run_events.c.run_id.in_(some))
        statement = select(run_events.c.run_id, run_events.c.source).where(
            run_events.c.id.in_(last.group_by(run_events.c.run_id))
        )
        found |= {run_id: Source(source) for run_id, source in await db.fetch(statement)}
    return found


async def settled_since(
    db: Database, number: int, *, technique_id: str | None = None
) -> tuple[list[Record], int]:
    """Settled runs with events after `number`, and the number to continue from.

    Runs may repeat, because of `OVERLAP`.
    """
    reached = await newest(db)
    changed = select(run_events.c.run_id).where(
        run_events.c.id > number - OVERLAP, run_events.c.id <= reached
    )
    statement = select(*RUN_COLUMNS).where(
        runs.c.run_id.in_(changed), runs.c.tracking == word("settled")
    )
    if technique_id is not None:
        statement = statement.where(runs.c.technique_id == technique_id)
    return await fetch_records(db, statement), max(reached, number)
