"""The log of sweeps: what each read and found, and what stopped it.

Nothing is decided by it: how far the history is here stands in `tracker.store.queries.sweeps`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import zip_longest
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, delete, insert, select, update

from tracker.core.run import RunType
from tracker.store.engine import Database
from tracker.store.schema import history_coverage as table
from tracker.store.schema import sweeps


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


# Which of FLORA's history has been read without a gap: `history_coverage`, and what follows of
# it.
#
# An interval says that every run that FLORA created in it was read and is stored. It is written
# after what it claims. `from_at` itself is not part of it, `to_at` is: other runs of the very
# instant at which a page ends may stand on the next. Each interval also remembers how to go on
# below it: FLORA's cursor, and where that cannot be read, why, and when it is tried again.


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A stretch of FLORA's creation times, UTC. `read_at` is when it last grew, by our clock.

    `cursor` leads to what lies below it, which could not be read `failures` times: `error` says
    why, until the gap has become too old to matter, and `retry_at` when it is read again.
    """

    from_at: datetime
    to_at: datetime
    read_at: datetime
    cursor: str | None = None
    error: str | None = None
    failures: int = 0
    retry_at: datetime | None = None


class Gap(NamedTuple):
    """What has not been read: after `bottom`, through `top`. `above` is the interval that ends it;
    `None` where it reaches up to the present."""

    bottom: datetime
    top: datetime
    above: Interval | None = None


class Unread(NamedTuple):
    """A gap that could not be read: after `from_at` (`None`: from the beginning), through `to_at`.

    `retry_at` is when the next sweep tries again, `None` where it does at once.
    """

    workspace_id: str
    run_type: str
    from_at: datetime | None
    to_at: datetime
    error: str
    failures: int
    retry_at: datetime | None


Coverage = dict[tuple[str, str], list[Interval]]
"""By workspace and kind."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same coverage, newest first, with what touches in one. Of two that begin at the same
    moment the later one given knows what lies below."""
    found: list[tuple[int, Interval]] = []
    for each in sorted(enumerate(intervals), key=lambda pair: pair[1].to_at, reverse=True):
        if not found or each[1].to_at < found[-1][1].from_at:
            found.append(each)
            continue
        upper = found[-1][1]
        number, lower = min(found[-1], each, key=lambda pair: (pair[1].from_at, -pair[0]))
        newest = max(upper.read_at, each[1].read_at)
        found[-1] = number, replace(lower, to_at=upper.to_at, read_at=newest)
    # An empty one only holds what is known of the gap at the very top.
    return [one for n, (_, one) in enumerate(found) if n == 0 or one.from_at < one.to_at]


def gaps(intervals: Sequence[Interval], *, since: datetime, until: datetime) -> list[Gap]:
    """What is missing in merged intervals, newest first: down to `since`, or to the oldest of them
    where that is older."""
    found = []
    top, above = until, None
    for one in intervals:
        if one.to_at < top:
            found.append(Gap(one.to_at, top, above))
        top, above = one.from_at, one
    if since < top:
        found.append(Gap(since, top, above))
    return found


def unread(coverage: Coverage) -> list[Unread]:
    """Everything that FLORA did not let us read, newest first within each history."""
    return [
        Unread(
            workspace_id=workspace_id,
            run_type=kind,
            from_at=below.to_at if below else None,
            to_at=one.from_at,
            error=one.error,
            failures=one.failures,
            retry_at=one.retry_at,
        )
        for (workspace_id, kind), intervals in coverage.items()
        for one, below in zip_longest(intervals, intervals[1:])
        if one and one.error
    ]


def verified(intervals: Sequence[Interval], *, since: datetime) -> datetime | None:
    """Up to when everything since then is here: the end of the newest interval that reaches back
    so far. `None` where none does."""
    return max((one.to_at for one in intervals if one.from_at <= since), default=None)


def covers(intervals: Sequence[Interval], at: datetime) -> bool:
    """Whether a run that was created then has been read."""
    return any(one.from_at < at <= one.to_at for one in intervals)


async def of(db: Database, workspace_id: str, kind: RunType) -> list[Interval]:
    """The intervals of one kind of runs, newest first."""
    async with db.read() as connection:
        return await connection.run_sync(_of, workspace_id, kind)


async def everything(db: Database) -> Coverage:
    """All intervals, newest first."""
    found: Coverage = {}
    statement = select(table).order_by(table.c.workspace_id, table.c.to_at.desc())
    async with db.read() as connection:
        for row in await connection.execute(statement):
            found.setdefault((row.workspace_id, row.run_type), []).append(_interval(row))
    return found


async def add(
    db: Database, workspace_id: str, kind: RunType, *intervals: Interval
) -> list[Interval]:
    """Add intervals to those of one kind; returns all of these, newest first.

    One process at a time does so, under a lease. Were it two, the rows would say some things twice,
    and none that is not true.
    """

    def work(connection: Connection) -> list[Interval]:
        before = _of(connection, workspace_id, kind)
        after = merged([*before, *intervals])
        keep(connection, workspace_id, kind, after)
        return after

    return await db.write(work)


async def forget_after(db: Database, workspace_id: str, kind: RunType, moment: datetime) -> None:
    """Forget intervals that end after a moment that is still to come: a clock was wrong then."""
    mine = (table.c.workspace_id == workspace_id, table.c.run_type == kind)
    wrong = delete(table).where(*mine, table.c.to_at > moment)
    await db.write(lambda connection: connection.execute(wrong).rowcount)


def keep(
    connection: Connection, workspace_id: str, kind: str, intervals: Sequence[Interval]
) -> None:
    """Let these be all intervals of one kind."""
    mine = (table.c.workspace_id == workspace_id, table.c.run_type == kind)
    connection.execute(delete(table).where(*mine))
    if intervals:
        key = {"workspace_id": workspace_id, "run_type": kind}
        connection.execute(insert(table), [key | asdict(one) for one in intervals])


def _of(connection: Connection, workspace_id: str, kind: str) -> list[Interval]:
    mine = (table.c.workspace_id == workspace_id, table.c.run_type == kind)
    rows = connection.execute(select(table).where(*mine))
    return merged(_interval(row) for row in rows)


_FIELDS: Final = ("from_at", "to_at", "read_at", "cursor", "error", "failures", "retry_at")


def _interval(row: Row[tuple[object, ...]]) -> Interval:
    return Interval(**{name: getattr(row, name) for name in _FIELDS})
