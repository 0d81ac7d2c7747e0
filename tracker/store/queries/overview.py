"""The figures of the overview, read from the rollups and never by counting runs.

Times are UTC, durations seconds, costs USD; "the last hours" and "today" end at `now`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import BigInteger, MetaData, Table, cast, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.core.rollup import (
    ADOPTED,
    CALLBACK,
    COST,
    END,
    OPEN,
    QUOTE,
    SEEN,
    STATE,
    UNPRICED,
    Lag,
    dollars,
    lag_of,
)
from tracker.core.run import RunStatus
from tracker.store.engine import Database
from tracker.store.queries.paging import between
from tracker.store.schema import rollup_columns, runs, techniques, word

HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)
MISS_RATE: Final = 0.1
"""The share of missing callbacks that is too high."""
MIN_CALLBACKS: Final = 10
"""Expected callbacks below which the share means nothing."""

ROLLUPS: Final = Table("run_tallies_now", MetaData(), *rollup_columns())


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
    """The callbacks of ended runs.

    `came` reported the end first, `late` after another source, `missed` did not come; `unexpected`
    belong to runs that were started elsewhere.
    """

    came: int
    late: int
    missed: int
    unexpected: int

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


async def technique_names(db: Database, technique_ids: Sequence[str]) -> dict[str, str]:
    """Names of techniques, from the catalogue or else from their newest run."""
    if not technique_ids:
        return {}
    known = select(techniques.c.technique_id, techniques.c.name).where(
        techniques.c.technique_id.in_(technique_ids)
    )
    async with db.read() as connection:
        names = {row.technique_id: row.name for row in await connection.execute(known)}
        for technique_id in technique_ids:
            if technique_id not in names:
                newest = (
                    select(runs.c.technique_name)
                    .where(runs.c.technique_id == technique_id)
                    .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
                    .limit(1)
                )
                name = (await connection.execute(newest)).scalar()
                if name:
                    names[technique_id] = name
    return names


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
