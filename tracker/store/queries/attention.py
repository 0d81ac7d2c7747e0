"""What needs attention: overdue reads, sweeps, what waits; and the database gauges for metrics.

Each gauge comes from the rollups or from at most `BOUND` rows of a short index, so that a scrape
costs the same with ten runs as with a million. Times are UTC.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    ScalarSelect,
    Select,
    Subquery,
    Table,
    and_,
    column,
    func,
    or_,
    select,
    table,
)

from tracker.core.record import TEST_DELIVERY, Record
from tracker.core.rollup import CALLBACK, COST, FAILURE, OPEN, QUOTE, STATE, UNPRICED, dollars
from tracker.core.run import Precedence, Tracking
from tracker.store.engine import Database
from tracker.store.queries.deliveries import IS_UNSEEN
from tracker.store.queries.overview import CallbackHealth, rollups
from tracker.store.queries.runs import RUN_COLUMNS, fetch_records, is_tracked_as
from tracker.store.queries.starts import StartState, is_in
from tracker.store.schema import CleanText, UtcDateTime, deliveries, leases, runs, starts, word

LATE_AFTER: Final = timedelta(seconds=60)
"""How long a read may be due before it counts as overdue."""
APPLIED_WITHIN: Final = timedelta(minutes=1)
"""How long an acknowledged callback may wait to be applied."""
SWEEP_TAKES: Final = timedelta(minutes=10)
"""How much later than due a sweep may be complete: a long one takes its time."""
_IS_RETRY: Final = and_(
    runs.c.last_error.is_not(None), runs.c.missing == 0, runs.c.tracking == word(Tracking.ACTIVE)
)
"""The last read brought no answer of FLORA; that a run does not exist is one."""

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


def is_inbox_behind(oldest_waiting_at: datetime | None, now: datetime) -> bool:
    """Whether acknowledged callbacks wait too long to be applied; like `TrackerInboxBehind`."""
    return oldest_waiting_at is not None and now - oldest_waiting_at > APPLIED_WITHIN


class AttentionCounts(NamedTuple):
    """What waits or needs a person. `oldest_due_at` shows the lag of polling, `oldest_waiting_at`
    that of applying callbacks (`waiting` are not applied). `quarantined` are not acknowledged."""

    active: int
    due: int
    lost: int
    quarantined: int
    open_starts: int
    unresolved_starts: int
    waiting: int
    oldest_due_at: datetime | None
    oldest_waiting_at: datetime | None


async def overdue(db: Database, *, now: datetime, limit: int = 20) -> list[Record]:
    """Runs that are not read in time, longest due first, without outputs: their next read has been
    due for longer than `LATE_AFTER`, or the last one brought no answer and is to be repeated.

    There are none while a worker keeps up and FLORA answers.
    """
    first = _next_reads(runs.c.run_id, runs.c.next_check_at, _IS_RETRY.label("is_retry"))
    late = select(first.c.run_id).where(_is_overdue(first, now))
    late = late.order_by(first.c.next_check_at).limit(limit)
    statement = select(*RUN_COLUMNS).where(runs.c.run_id.in_(late)).order_by(runs.c.next_check_at)
    return await fetch_records(db, statement)


async def conflicts(db: Database) -> list[str]:
    """The newest runs with a conflict, at most 100 of the newest `BOUND` runs."""
    newest = (
        select(runs.c.run_id, runs.c.conflict)
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(BOUND)
        .subquery()
    )
    return await db.fetchcol(select(newest.c.run_id).where(newest.c.conflict).limit(100))


async def counts(db: Database, *, now: datetime) -> AttentionCounts:
    """Count what waits, by short indexes."""
    statement = select(
        _count(runs, is_tracked_as(Tracking.ACTIVE)).label("active"),
        _count(runs, runs.c.next_check_at <= now).label("due"),
        _count(runs, is_tracked_as(Tracking.LOST)).label("lost"),
        select(func.min(runs.c.next_check_at))
        .where(runs.c.next_check_at <= now)
        .scalar_subquery()
        .label("oldest_due_at"),
        *_waiting(None),
    )
    (found,) = await db.fetch(statement)
    return AttentionCounts(**found._asdict())


async def sweep_health(db: Database) -> list[SweepHealth]:
    """The state of sweeps by workspace; without workspaces that were never swept."""
    found = [SweepHealth(*row) for row in await db.fetch(select(SWEEPS))]
    return sorted(found, key=lambda each: each.workspace_id or "")


async def sweeping(db: Database, *, now: datetime) -> bool:
    """Whether any process is sweeping a history now."""
    held = leases.c.name.startswith("sweep:") & (leases.c.until > now)
    return await db.fetchrow(select(leases.c.name).where(held)) is not None


BOUND: Final = 10_000
"""Counts stop here."""
BILL_DAYS: Final = 7
"""Days, today included, over which bills are counted, by the run's end."""
RECENT_HOURS: Final = 2
"""Hours, the current one included, over which callbacks are counted, by the run's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """Gauges of the database; costs in USD, times UTC. An unknown workspace is "".

    `runs` counts by workspace, status and tracking. `callbacks` counts by workspace and outcome,
    for runs that ended within `RECENT_HOURS`. By workspace, for runs that ended today: `cost_today`
    is their cost, `quoted_today` the quotes of those without a bill, `failed_today` counts by retry
    advice. For runs that ended within `BILL_DAYS`: `not_final` may still be billed, `unpriced` got
    no bill. `due` runs wait to be read, `overdue` ones are not read in time (see that function);
    `awaiting_callback` are open runs without their callback. `waiting` deliveries are stored and
    not applied, the first since `oldest_waiting_at`; the newest delivery came at
    `last_callback_at`.
    """

    runs: dict[tuple[str, str, str], int]
    callbacks: dict[tuple[str, str], int]
    cost_today: dict[str, Decimal]
    quoted_today: dict[str, Decimal]
    not_final: dict[str, int]
    unpriced: dict[str, int]
    failed_today: dict[tuple[str, str], int]
    due: int
    overdue: int
    awaiting_callback: int
    oldest_due_at: datetime | None
    quarantined: int
    waiting: int
    oldest_waiting_at: datetime | None
    last_callback_at: datetime | None
    open_starts: int
    unresolved_starts: int

    def callback_health(self, workspace_id: str | None = None) -> CallbackHealth:
        """The recent callbacks, of one workspace or all."""
        counts = Counter[str]()
        for (of, outcome), count in self.callbacks.items():
            counts[outcome] += count if workspace_id in (None, of) else 0
        return CallbackHealth.of(counts)


async def read_gauges(db: Database, *, now: datetime, bound: int = BOUND) -> Gauges:
    """Read all gauges in one snapshot. Raises `StoreUnavailable`.

    Of the runs that wait for a read, the `bound` first due are counted.
    """
    hour = now.replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    two_hours, week = hour - timedelta(hours=RECENT_HOURS - 1), day - timedelta(days=BILL_DAYS - 1)
    of = "workspace_id"
    async with db.read() as connection:
        read = partial(rollups, connection)
        states = await read(STATE, by=(of, "status", "word"))
        came = await read(CALLBACK, by=(of, "word"), since=two_hours)
        costs = await read(COST, by=(of,), since=day)
        quotes = await read(QUOTE, by=(of,), since=day)
        failed = await read(FAILURE, by=(of, "word"), since=day)
        bills = await read(COST, by=(of, "word"), since=week)
        backlog = (await connection.execute(_backlog(now, bound))).one()
        rest = (await connection.execute(_REST)).one()
    return Gauges(
        runs={(one, status, word): count for one, status, word, count, _ in states if count},
        callbacks={(one, outcome): count for one, outcome, count, _ in came if count},
        cost_today={one: dollars(amount) for one, count, amount in costs if count},
        quoted_today={one: dollars(amount) for one, count, amount in quotes if count},
        not_final={one: count for one, billed, count, _ in bills if billed == OPEN},
        unpriced={one: count for one, billed, count, _ in bills if billed == UNPRICED},
        failed_today={(one, advice): count for one, advice, count, _ in failed if count},
        **backlog._asdict(),
        **rest._asdict(),
    )


def _backlog(now: datetime, bound: int) -> Select[*tuple[Any, ...]]:
    """Counts of the runs that wait for a read, of the `bound` first due."""
    waits = and_(
        runs.c.callback_expected,
        runs.c.callback_at.is_(None),
        runs.c.tracking == word(Tracking.ACTIVE),
        runs.c.precedence < Precedence.CALLBACK_FAILED,
    )
    columns = runs.c.next_check_at, waits.label("waits"), _IS_RETRY.label("is_retry")
    first = _next_reads(*columns, bound=bound)
    is_due = first.c.next_check_at <= now
    return select(
        func.count().filter(is_due).label("due"),
        func.count().filter(_is_overdue(first, now)).label("overdue"),
        func.count().filter(first.c.waits).label("awaiting_callback"),
        func.min(first.c.next_check_at).filter(is_due).label("oldest_due_at"),
    )


def _next_reads(*columns: Any, bound: int = BOUND) -> Subquery:
    """These columns of the `bound` runs whose next read comes first."""
    return (
        select(*columns)
        .where(runs.c.next_check_at.is_not(None))
        .order_by(runs.c.next_check_at)
        .limit(bound)
        .subquery()
    )


def _is_overdue(reads: Subquery, now: datetime) -> ColumnElement[bool]:
    return or_(reads.c.next_check_at <= now - LATE_AFTER, reads.c.is_retry)


def _count(table: Table, *condition: Any, bound: int | None = None) -> ScalarSelect[int]:
    rows = select(table.c[table.primary_key.columns.keys()[0]]).where(*condition).limit(bound)
    return select(func.count()).select_from(rows.subquery()).scalar_subquery()


def _waiting(bound: int | None) -> tuple[ColumnElement[Any], ...]:
    """What waits beside the runs, each counted up to `bound`."""
    count, is_waiting = partial(_count, bound=bound), deliveries.c.outcome == word("waiting")
    oldest = select(deliveries.c.received_at).where(is_waiting).order_by(deliveries.c.received_at)
    open_starts = count(starts, is_in(StartState.SENT)) + count(starts, is_in(StartState.IN_DOUBT))
    return (
        count(deliveries, IS_UNSEEN).label("quarantined"),
        count(deliveries, is_waiting).label("waiting"),
        oldest.limit(1).scalar_subquery().label("oldest_waiting_at"),
        open_starts.label("open_starts"),
        count(starts, starts.c.state == word("unresolved")).label("unresolved_starts"),
    )


_LAST_CALLBACK: Final = (
    select(deliveries.c.received_at)
    .where(deliveries.c.event_type.is_distinct_from(word(TEST_DELIVERY)))
    .order_by(deliveries.c.received_at.desc())
    .limit(1)
    .scalar_subquery()
)
_REST: Final = select(*_waiting(BOUND), _LAST_CALLBACK.label("last_callback_at"))
