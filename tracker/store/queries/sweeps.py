"""The log of sweeps, and coverage: which parts of FLORA's history were read without a gap.

An interval of coverage states that every run that FLORA created in it was read and stored. It is
written after that is true. `from_at` is excluded and `to_at` included, because other runs of the
instant at which a page ends may be on the next page. An interval also stores how to continue below
it: FLORA's cursor and, if that part could not be read, why and when to retry.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import zip_longest
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    column,
    delete,
    insert,
    or_,
    select,
    table,
    update,
)

from tracker.core.run import RunType
from tracker.store.engine import Database
from tracker.store.queries.workspaces import BEFORE_IDS
from tracker.store.schema import CleanText, UtcDateTime, history_coverage, leases, sweeps


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One sweep of a workspace's history; complete if it is finished and has no error.

    `through` and `generations_through` are the times, by FLORA's clock, up to which each kind was
    checked. `generations_error` is why generations could not be swept.
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
    """Log the start of a sweep and return its number; it is incomplete until `finish`."""
    zeros = dict.fromkeys(("pages", "items", "discovered", "repaired", "unreadable"), 0)
    values = {"workspace_id": workspace_id, "started_at": at, **zeros}
    statement = insert(sweeps).values(values).returning(sweeps.c.id)
    return await db.write(lambda connection: int(connection.execute(statement).scalar_one()))


async def finish(
    db: Database, number: int, *, at: datetime, also_of: str | None = None, **values: Any
) -> None:
    """Log the end of a sweep; `values` are further fields of its `SweepRow`.

    Sweeps that were logged before the id of their workspace was known become those `also_of` this
    workspace; else its last complete sweep would be two, of which one grows older for ever.
    """
    of = sweeps.c.workspace_id
    unnamed = update(sweeps).where(or_(of.is_(None), of == BEFORE_IDS))
    ended = update(sweeps).where(sweeps.c.id == number).values(finished_at=at, **values)

    def work(connection: Connection) -> None:
        connection.execute(ended)
        if also_of is not None:
            connection.execute(unnamed.values(workspace_id=also_of))

    await db.write(work)


async def list_sweeps(
    db: Database, *, limit: int = 20, before: int | None = None
) -> list[SweepRow]:
    """The last sweeps of all workspaces, newest first; those `before` a number, if given."""
    statement = select(sweeps).order_by(sweeps.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(sweeps.c.id < before)
    return [SweepRow(**row._asdict()) for row in await db.fetch(statement)]


SWEEP_TAKES: Final = timedelta(minutes=10)
"""How much later than due a sweep may be complete: a long one takes its time."""
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
    """The state of one workspace's sweeps: the columns of `SWEEPS`, in their order.

    `complete_at` is the end of the last complete sweep. History is checked up to `through` and
    `generations_through`, by FLORA's clock. `last_error` is why the last sweep failed, if it did;
    `last_finished_at` is `None` while it runs; `generations_error` is why generations could not be
    read.
    """

    workspace_id: str | None
    last_started_at: datetime
    last_finished_at: datetime | None
    complete_started_at: datetime | None
    complete_at: datetime | None
    through: datetime | None
    generations_through: datetime | None
    last_error: str | None
    generations_error: str | None = None


def is_sweep_late(complete_at: datetime, now: datetime, *, interval: timedelta) -> bool:
    """Whether the last complete sweep is too old, where one is due every `interval`; like the alert
    `TrackerSweepLate`."""
    return now - complete_at > 3 * interval + SWEEP_TAKES


async def sweep_health(db: Database) -> list[SweepHealth]:
    """The state of sweeps by workspace; without workspaces that were never swept."""
    found = [SweepHealth(*row) for row in await db.fetch(select(SWEEPS))]
    return sorted(found, key=lambda each: each.workspace_id or "")


async def sweeping(db: Database, *, now: datetime) -> bool:
    """Whether any process is sweeping a history now."""
    held = leases.c.name.startswith("sweep:") & (leases.c.until > now)
    return await db.fetchrow(select(leases.c.name).where(held)) is not None


# Coverage.


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An interval of FLORA's creation times, UTC. `read_at` is when it last grew, by our clock.

    `cursor` continues below it. If that part could not be read, `failures` counts the attempts,
    `error` is the reason (until the gap is too old to matter) and `retry_at` the next attempt.
    """

    from_at: datetime
    to_at: datetime
    read_at: datetime
    cursor: str | None = None
    error: str | None = None
    failures: int = 0
    retry_at: datetime | None = None


class Gap(NamedTuple):
    """A part that was not read: after `bottom`, through `top`. `above` is the interval above it;
    `None` if the gap reaches the present, or what is above could not be read."""

    bottom: datetime
    top: datetime
    above: Interval | None = None


class UnreadSpan(NamedTuple):
    """A gap that could not be read: after `from_at` (`None`: the beginning), through `to_at`.

    Sweeps retry it from `retry_at` on, if set.
    """

    workspace_id: str
    run_type: str
    from_at: datetime | None
    to_at: datetime
    error: str
    failures: int
    retry_at: datetime | None


Coverage = dict[tuple[str, str], list[Interval]]
"""Intervals by workspace and kind."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same coverage with adjacent intervals joined, newest first. Of two with the same start,
    the later argument determines what is known below, unless only the other has failures."""
    found: list[tuple[int, Interval]] = []
    for each in sorted(enumerate(intervals), key=lambda pair: pair[1].to_at, reverse=True):
        if not found or each[1].to_at < found[-1][1].from_at:
            found.append(each)
            continue
        upper = found[-1][1]
        number, lower = min(found[-1], each, key=_lowest)
        newest = max(upper.read_at, each[1].read_at)
        found[-1] = number, replace(lower, to_at=upper.to_at, read_at=newest)
    # An empty interval only carries what is known about the gap at the top.
    return [one for n, (_, one) in enumerate(found) if n == 0 or one.from_at < one.to_at]


def _lowest(pair: tuple[int, Interval]) -> tuple[datetime, bool, int]:
    number, interval = pair
    return (interval.from_at, not interval.failures, -number)


def gaps(intervals: Sequence[Interval], *, since: datetime, until: datetime) -> list[Gap]:
    """The gaps in merged intervals, newest first, down to `since` or to the oldest interval if that
    is older."""
    found = []
    top, above = until, None
    for one in intervals:
        if one.to_at < top:
            found.append(Gap(one.to_at, top, above))
        top, above = one.from_at, one
    if since < top:
        found.append(Gap(since, top, above))
    return found


def unread(coverage: Coverage) -> list[UnreadSpan]:
    """All gaps that could not be read, newest first within each history."""
    return [
        UnreadSpan(
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
    """Up to when everything since `since` was read: the end of the newest interval that reaches
    back so far, if any."""
    return max((one.to_at for one in intervals if one.from_at <= since), default=None)


def covers(intervals: Sequence[Interval], at: datetime) -> bool:
    """Whether a run that FLORA created at this time was read."""
    return any(one.from_at < at <= one.to_at for one in intervals)


async def of(db: Database, workspace_id: str, kind: RunType) -> list[Interval]:
    """The intervals of one kind of runs, newest first."""
    return merged(map(_interval, await db.fetch(_rows_of(workspace_id, kind))))


async def everything(db: Database) -> Coverage:
    """All intervals, newest first."""
    found: Coverage = {}
    statement = select(history_coverage).order_by(
        history_coverage.c.workspace_id, history_coverage.c.to_at.desc()
    )
    for row in await db.fetch(statement):
        found.setdefault((row.workspace_id, row.run_type), []).append(_interval(row))
    return found


async def add(
    db: Database, workspace_id: str, kind: RunType, *intervals: Interval
) -> list[Interval]:
    """Add intervals of one kind; returns all of them, newest first.

    The caller holds a lease. Without it rows could repeat each other, but none would be false.
    """

    def work(connection: Connection) -> list[Interval]:
        before = connection.execute(_rows_of(workspace_id, kind))
        after = merged([*map(_interval, before), *intervals])
        keep(connection, workspace_id, kind, after)
        return after

    return await db.write(work)


async def forget_after(db: Database, workspace_id: str, kind: RunType, moment: datetime) -> None:
    """Delete intervals that end after `moment`, a future time: a clock was wrong."""
    wrong = delete(history_coverage).where(
        _is_of(workspace_id, kind), history_coverage.c.to_at > moment
    )
    await db.execute(wrong)


def keep(
    connection: Connection, workspace_id: str, kind: str, intervals: Sequence[Interval]
) -> None:
    """Replace all intervals of one kind."""
    connection.execute(delete(history_coverage).where(_is_of(workspace_id, kind)))
    if intervals:
        key = {"workspace_id": workspace_id, "run_type": kind}
        connection.execute(insert(history_coverage), [key | asdict(one) for one in intervals])


def _rows_of(workspace_id: str, kind: str) -> Select[Any]:
    return select(history_coverage).where(_is_of(workspace_id, kind))


def _is_of(workspace_id: str, kind: str) -> ColumnElement[bool]:
    return and_(
        history_coverage.c.workspace_id == workspace_id, history_coverage.c.run_type == kind
    )


def _interval(row: Row[tuple[object, ...]]) -> Interval:
    return Interval(**{name: getattr(row, name) for name in Interval.__slots__})
