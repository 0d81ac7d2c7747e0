"""The figures of the overview and of metrics, and what needs attention.

Each comes from the rollups or from at most `BOUND` rows of a short index, and never from counting
all runs: a scrape costs the same with ten runs as with a million. Times are UTC, durations seconds,
costs USD; "the last hours" and "today" end at `now`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    ScalarSelect,
    Select,
    Subquery,
    Table,
    and_,
    cast,
    func,
    or_,
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.core.record import TEST_DELIVERY, Record
from tracker.core.rollup import (
    ADOPTED,
    CALLBACK,
    COST,
    END,
    FAILURE,
    OPEN,
    QUOTE,
    SEEN,
    STATE,
    UNPRICED,
    Lag,
    dollars,
    lag_of,
)
from tracker.core.run import Precedence, RunStatus, Tracking
from tracker.store.engine import Database
from tracker.store.queries.deliveries import IS_UNSEEN
from tracker.store.queries.paging import between
from tracker.store.queries.runs import RUN_COLUMNS, fetch_records, is_tracked_as
from tracker.store.queries.starts import StartState, is_in
from tracker.store.queries.techniques import technique_names
from tracker.store.schema import deliveries, runs, starts, word
from tracker.store.writing.rollups import ROLLUPS

HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)
MISS_RATE: Final = 0.1
"""The share of missing callbacks that is too high."""
MIN_CALLBACKS: Final = 10
"""Expected callbacks below which the share means nothing."""


class StateCount(NamedTuple):
    """The number of runs with this status and tracking now."""

    status: str
    tracking: str
    runs: int


class HourOfEnds(NamedTuple):
    """The runs whose end became known within an hour, by status and by source (`ended_via`).

    `adopted` runs had ended before the tracker learned of them, for example in a first sweep; they
    are in neither.
    """

    hour: datetime
    by_status: dict[str, int]
    by_source: dict[str, int]
    adopted: int


@dataclass(frozen=True, slots=True)
class CallbackHealth:
    """The callbacks of ended runs: `came` reported the end first, `late` after another source,
    `missed` did not come."""

    came: int
    late: int
    missed: int

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Self:
        """The health that these numbers of runs by outcome show."""
        return cls(*(counts.get(one.name, 0) for one in fields(cls)))

    @property
    def expected(self) -> int:
        return self.came + self.late + self.missed

    @property
    def miss_rate(self) -> float | None:
        """The share of expected callbacks that did not come; `None` if none was expected."""
        return self.missed / self.expected if self.expected else None

    @property
    def misses_too_many(self) -> bool:
        """Whether the share is too high, and enough callbacks were expected."""
        return self.expected >= MIN_CALLBACKS and self.missed / self.expected >= MISS_RATE


class TechniqueCost(NamedTuple):
    """The cost of the settled runs of one technique, in USD.

    The bills of `not_final` runs may still change; `quoted` is the sum of their quotes where they
    have no cost; `unpriced` runs never got a bill.
    """

    technique_id: str | None
    technique_name: str | None = None
    runs: int = 0
    completed: int = 0
    failed: int = 0
    unpriced: int = 0
    not_final: int = 0
    cost: Decimal = Decimal(0)
    quoted: Decimal = Decimal(0)


async def states(db: Database) -> list[StateCount]:
    """The number of runs by status and tracking, without zeros."""
    by = ("status", "word")
    rows = await _rollups(db, STATE, by=by)
    return [StateCount(status, tracking, count) for status, tracking, count, _ in rows if count]


async def ends_by_hour(db: Database, *, now: datetime, hours: int = 24) -> list[HourOfEnds]:
    """Finished runs of the last `hours` hours, including empty hours, the current one last."""
    first = _first_of(hours, now)
    found = {at: HourOfEnds(at, {}, {}, 0) for at in (first + n * HOUR for n in range(hours))}
    by = ("since", "status", "word", "bucket")
    rows = await _rollups(db, END, by=by, since=first)
    for since, status, via, bucket, count, _ in rows:
        hour = found.get(since)
        if hour is None:  # stored by a process whose clock is ahead
            continue
        if bucket == ADOPTED:
            found[since] = hour._replace(adopted=hour.adopted + count)
        elif count:
            hour.by_status[status] = hour.by_status.get(status, 0) + count
            hour.by_source[via] = hour.by_source.get(via, 0) + count
    return list(found.values())


async def callback_health(db: Database, *, now: datetime, hours: int = 24) -> CallbackHealth:
    """Callbacks of runs that ended in the last `hours` hours, the current one included."""
    since = _first_of(hours, now)
    rows = await _rollups(db, CALLBACK, by=("word",), since=since)
    return CallbackHealth.of({outcome: count for outcome, count, _ in rows})


async def lags(db: Database, *, now: datetime, hours: int = 24) -> Lag:
    """Detection delay in the last `hours` hours: from FLORA's end of a run until it was known here,
    without adopted runs."""
    rows = await _rollups(db, SEEN, by=("bucket",), since=_first_of(hours, now))
    return lag_of(rows)


async def costs(db: Database, *, now: datetime, days: int = 1) -> list[TechniqueCost]:
    """Costs of runs that ended in the last `days` UTC days, today included, highest first."""
    by = ("measure", "technique_id", "status", "word")
    since = now.replace(hour=0, minute=0, second=0, microsecond=0) - (days - 1) * DAY
    rows = await _rollups(db, COST, QUOTE, by=by, since=since)
    found: dict[str, TechniqueCost] = {}
    for measure, technique_id, status, billed, count, amount in rows:
        so_far = found.get(technique_id) or TechniqueCost(technique_id or None)
        if measure == QUOTE:
            found[technique_id] = so_far._replace(quoted=so_far.quoted + dollars(amount))
            continue
        found[technique_id] = so_far._replace(
            runs=so_far.runs + count,
            completed=so_far.completed + count * (status == RunStatus.COMPLETED),
            failed=so_far.failed + count * (status == RunStatus.FAILED),
            unpriced=so_far.unpriced + count * (billed == UNPRICED),
            not_final=so_far.not_final + count * (billed in (OPEN, UNPRICED)),
            cost=so_far.cost + dollars(amount),
        )
    names = await technique_names(db, [each for each in found if each])
    named = [
        cost._replace(technique_name=names.get(technique_id))
        for technique_id, cost in found.items()
        if cost.runs
    ]
    return sorted(named, key=lambda each: (-each.cost, each.technique_name or ""))


async def rollups(
    connection: AsyncConnection, *measures: str, by: Sequence[str], since: datetime | None = None
) -> list[tuple[Any, ...]]:
    """Rollups, grouped by these columns: their values, the number of runs, the amount."""
    columns = [ROLLUPS.c[name] for name in by]
    sums = (cast(func.sum(ROLLUPS.c[name]), BigInteger) for name in ("runs", "amount"))
    statement = (
        select(*columns, *sums)
        .where(ROLLUPS.c.measure.in_([word(each) for each in measures]))
        .where(*between(ROLLUPS.c.since, since))
        .group_by(*columns)
        .order_by(*columns)
    )
    return [tuple(row) for row in await connection.execute(statement)]


async def _rollups(db: Database, *measures: str, **options: Any) -> list[tuple[Any, ...]]:
    async with db.read() as connection:
        return await rollups(connection, *measures, **options)


def _first_of(hours: int, now: datetime) -> datetime:
    return now.replace(minute=0, second=0, microsecond=0) - (hours - 1) * HOUR


# What waits or needs a person, and the gauges of metrics.

LATE_AFTER: Final = timedelta(seconds=60)
"""How long a read may be due before it counts as overdue."""
APPLIED_WITHIN: Final = timedelta(minutes=1)
"""How long an acknowledged callback may wait to be applied."""
_IS_RETRY: Final = and_(
    runs.c.last_error.is_not(None), runs.c.missing == 0, runs.c.tracking == word(Tracking.ACTIVE)
)
"""The last read brought no answer of FLORA; that a run does not exist is one."""


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
