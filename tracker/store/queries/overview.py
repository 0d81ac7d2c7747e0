"""How things stand, for who looks at them every day: read from the tallies, never by counting runs.

Everything here costs the same with a million runs as with ten. Times are UTC, durations seconds,
costs USD; `now` is the moment that "the last hours" and "today" end with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    TableClause,
    cast,
    column,
    func,
    select,
    table,
)

from tracker.core.rollup import (
    ADOPTED,
    CALLBACK,
    COST,
    END,
    OPEN,
    QUOTE,
    SEEN,
    SETTLED,
    STATE,
    UNPRICED,
    Lag,
    dollars,
    lag_of,
)
from tracker.core.run import RunStatus
from tracker.store.engine import Database
from tracker.store.schema import CleanText, UtcDateTime, runs, techniques, word

HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)

TALLIES: Final[TableClause] = table(
    "run_tallies_now",
    column("measure", CleanText),
    column("since", UtcDateTime),
    *(column(name, CleanText) for name in ("workspace_id", "technique_id", "status", "word")),
    column("bucket", Integer),
    column("runs", BigInteger),
    column("amount", BigInteger),
)


class StateCount(NamedTuple):
    """So many runs have this status and tracking now."""

    status: str
    tracking: str
    runs: int


class HourOfEnds(NamedTuple):
    """The ends that became known within an hour, by how they did (`ended_via`).

    `adopted` are runs that had ended before the tracker heard of them, as a first sweep finds
    them; they are not part of `by_source`.
    """

    hour: datetime
    by_source: dict[str, int]
    adopted: int


@dataclass(frozen=True, slots=True)
class CallbackHealth:
    """What became of the callbacks of the runs that ended.

    `came` told the end first, `late` after it was known by other ways, `missed` have not come;
    `unexpected` belong to runs that were started elsewhere.
    """

    came: int
    late: int
    missed: int
    unexpected: int

    @property
    def expected(self) -> int:
        """How many should have come."""
        return self.came + self.late + self.missed

    @property
    def miss_rate(self) -> float | None:
        """The share of the expected ones that has not come; `None` where none was expected."""
        return self.missed / self.expected if self.expected else None


@dataclass(frozen=True, slots=True)
class Lags:
    """From FLORA's end of a run to ours: until it was known here, and until it was settled."""

    seen: Lag
    settled: Lag
    seen_by_source: dict[str, Lag]


class TechniqueCost(NamedTuple):
    """What the settled runs of one technique cost, in USD.

    `not_final` of them may still be billed more or less, so that `cost` is at least so much;
    `quoted` is what those among them without a cost were quoted, and `unpriced` those whose cost
    never came.
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


async def states(db: Database, *, workspace_id: str | None = None) -> list[StateCount]:
    """How many runs are in which state now; a state that no run is in is left out."""
    by = (TALLIES.c.status, TALLIES.c.word)
    rows = await _tallied(db, STATE, by=by, workspace_id=workspace_id)
    return [StateCount(status, tracking, count) for status, tracking, count, _ in rows if count]


async def ends_by_hour(
    db: Database, *, now: datetime, hours: int = 24, workspace_id: str | None = None
) -> list[HourOfEnds]:
    """The ends of the last `hours` hours, the present one last; each hour is there."""
    first = _first_of(hours, now)
    found = {at: HourOfEnds(at, {}, 0) for at in (first + n * HOUR for n in range(hours))}
    by = (TALLIES.c.since, TALLIES.c.word, TALLIES.c.bucket)
    rows = await _tallied(db, END, by=by, since=first, workspace_id=workspace_id)
    for since, via, bucket, count, _ in rows:
        hour = found.get(since)
        if hour is None:  # whoever saw it has a clock that is ahead
            continue
        if bucket == ADOPTED:
            found[since] = hour._replace(adopted=hour.adopted + count)
        elif count:
            hour.by_source[via] = hour.by_source.get(via, 0) + count
    return list(found.values())


async def callback_health(
    db: Database, *, now: datetime, hours: int = 24, workspace_id: str | None = None
) -> CallbackHealth:
    """The callbacks of the runs that ended in the last `hours` hours, the present one included."""
    since = _first_of(hours, now)
    rows = await _tallied(
        db, CALLBACK, by=(TALLIES.c.word,), since=since, workspace_id=workspace_id
    )
    found = {outcome: count for outcome, count, _ in rows}
    return CallbackHealth(
        *(found.get(name, 0) for name in ("came", "late", "missed", "unexpected"))
    )


async def lags(
    db: Database, *, now: datetime, hours: int = 24, workspace_id: str | None = None
) -> Lags:
    """How soon the ends of the last `hours` hours were known and settled here.

    Runs that had ended before the tracker heard of them do not count.
    """
    by = (TALLIES.c.measure, TALLIES.c.word, TALLIES.c.bucket)
    since = _first_of(hours, now)
    rows = await _tallied(db, SEEN, SETTLED, by=by, since=since, workspace_id=workspace_id)

    def of(wanted: str, source: str | None = None) -> Lag:
        return lag_of(
            (bucket, count, amount)
            for measure, word, bucket, count, amount in rows
            if measure == wanted and source in (None, word)
        )

    by_source = {source: of(SEEN, source) for source in sorted({row[1] for row in rows})}
    return Lags(
        of(SEEN), of(SETTLED), {source: lag for source, lag in by_source.items() if lag.runs}
    )


async def costs(
    db: Database, *, now: datetime, days: int = 1, workspace_id: str | None = None
) -> list[TechniqueCost]:
    """What the runs that ended today (UTC), or in the last `days` days, cost; the dearest first."""
    by = (TALLIES.c.measure, TALLIES.c.technique_id, TALLIES.c.status, TALLIES.c.word)
    since = now.replace(hour=0, minute=0, second=0, microsecond=0) - (days - 1) * DAY
    rows = await _tallied(db, COST, QUOTE, by=by, since=since, workspace_id=workspace_id)
    found: dict[str, TechniqueCost] = {}
    for measure, technique_id, status, billed, count, amount in rows:
        so_far = found.get(technique_id) or TechniqueCost(technique_id or None)
        if measure == QUOTE:
            found[technique_id] = so_far._replace(quoted=so_far.quoted + dollars(amount))
            continue
        found[technique_id] = so_far._replace(
            runs=so_far.runs + count,
            completed=so_far.completed + (count if status == RunStatus.COMPLETED else 0),
            failed=so_far.failed + (count if status == RunStatus.FAILED else 0),
            unpriced=so_far.unpriced + (count if billed == UNPRICED else 0),
            not_final=so_far.not_final + (count if billed in (OPEN, UNPRICED) else 0),
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
    """What techniques are called: by the catalogue, else as their newest run has it."""
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


async def _tallied(
    db: Database,
    *measures: str,
    by: Sequence[ColumnElement[Any]],
    since: datetime | None = None,
    workspace_id: str | None = None,
) -> list[tuple[Any, ...]]:
    """Rows of what is asked `by`, how many runs, and their amount."""
    sums = (cast(func.sum(TALLIES.c[name]), BigInteger) for name in ("runs", "amount"))
    statement = (
        select(*by, *sums)
        .where(TALLIES.c.measure.in_([word(each) for each in measures]))
        .group_by(*by)
        .order_by(*by)
    )
    if since is not None:
        statement = statement.where(TALLIES.c.since >= since)
    if workspace_id is not None:
        statement = statement.where(TALLIES.c.workspace_id == workspace_id)
    async with db.read() as connection:
        return [tuple(row) for row in await connection.execute(statement)]


def _first_of(hours: int, now: datetime) -> datetime:
    """The beginning of the first of the last `hours` hours."""
    return now.replace(minute=0, second=0, microsecond=0) - (hours - 1) * HOUR
