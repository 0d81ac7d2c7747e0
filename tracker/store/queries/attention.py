"""What a metric wants to know of the database: a few numbers, the same whichever process asks.

Each comes from the tallies or from a short index, of which `BOUND` rows at most are looked at: a
scrape costs the same with a million runs as with ten, and however much has piled up.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ScalarSelect,
    Select,
    Table,
    and_,
    cast,
    column,
    func,
    select,
    table,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.core.record import TRIAL, Record
from tracker.core.rollup import CALLBACK, COST, FAILURE, OPEN, QUOTE, STATE, UNPRICED, dollars
from tracker.core.run import Standing, Tracking
from tracker.store.engine import Database
from tracker.store.queries.overview import TALLIES
from tracker.store.queries.starts import StartState, is_in
from tracker.store.rows import RUN_COLUMNS, read_records
from tracker.store.schema import CleanText, UtcDateTime, deliveries, leases, runs, starts, word

# What wants somebody's eye: reads that are overdue, and where the sweeps of each workspace stand.
#
# Times are UTC.


LATE_AFTER: Final = timedelta(seconds=60)
"""How long a read may be due before somebody should know of it."""

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
    """Where the sweeps of one workspace stand.

    `complete_at` is the end of the last complete one, `through` and `generations_through` the
    moments, by FLORA's clock, through which its history is verified; `last_error` is why the last
    one failed, `None` where it did not (or has not ended: then `last_finished_at` is `None`), and
    `generations_error` why it could not read generations.
    """

    workspace_id: str | None
    last_started_at: datetime
    last_finished_at: datetime | None
    last_error: str | None
    complete_started_at: datetime | None
    complete_at: datetime | None
    through: datetime | None
    generations_through: datetime | None
    generations_error: str | None = None


async def overdue(
    db: Database, *, now: datetime, after: timedelta = LATE_AFTER, limit: int = 20
) -> list[Record]:
    """The runs whose next read has been due for longer than `after`, the longest first.

    There are none where a worker keeps up. They come without their outputs.
    """
    statement = (
        select(*RUN_COLUMNS)
        .where(runs.c.next_check_at <= now - after)
        .order_by(runs.c.next_check_at)
        .limit(limit)
    )
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
        return await read_records(connection, rows)


async def conflicts(db: Database, *, among: int = 10_000, limit: int = 100) -> list[str]:
    """Of the newest `among` runs those about whose end two sources disagreed, newest first."""
    newest = (
        select(runs.c.run_id, runs.c.conflict)
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(among)
        .subquery()
    )
    async with db.read() as connection:
        found = await connection.scalars(
            select(newest.c.run_id).where(newest.c.conflict).limit(limit)
        )
        return list(found)


async def sweep_health(db: Database) -> list[SweepHealth]:
    """Where the sweeps of each workspace stand; one that was never swept is left out."""
    names = (
        *("workspace_id", "last_started_at", "last_finished_at", "last_error"),
        *("complete_started_at", "complete_finished_at", "through", "generations_through"),
        "last_generations_error",
    )
    statement = select(*(SWEEPS.c[name] for name in names))
    async with db.read() as connection:
        found = [SweepHealth(*row) for row in await connection.execute(statement)]
    return sorted(found, key=lambda each: each.workspace_id or "")


async def sweeping(db: Database, *, now: datetime) -> bool:
    """Whether some process is sweeping a history at this moment."""
    held = leases.c.name.startswith("sweep:") & (leases.c.until > now)
    async with db.read() as connection:
        return (await connection.execute(select(leases.c.name).where(held))).first() is not None


BOUND: Final = 10_000
"""No count goes beyond this: of so many, more would tell nobody more."""
BILL_DAYS: Final = 7
"""Bills of runs that ended in the last so many days, today included, are counted."""
RECENT_HOURS: Final = 2
"""The present hour and the one before: the callbacks of the runs that ended in them are recent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """How things stand in the database; costs in USD, times UTC. An unknown workspace is "".

    `runs` counts by workspace, status and tracking, `callbacks` by workspace and what became of
    them (of the runs that ended in the last `RECENT_HOURS`). By workspace, of the runs that ended
    today, `cost_today` is what they cost and `quoted_today` what those without a bill were quoted;
    of those that ended in the last `BILL_DAYS`, `not_final` may still be billed, `unpriced` never
    were. `failed_today` counts by workspace and retry advice. `due`
    runs wait to be read, `overdue` ones for longer than `LATE_AFTER`; `awaiting_callback` are open
    runs whose callback has not come. `waiting` deliveries are stored and not applied, the first of
    them since `oldest_waiting_at`. `last_callback_at` is when the newest delivery first came.
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


async def read_gauges(db: Database, *, now: datetime) -> Gauges:
    """Read all of them, as of one moment. Raises `StoreUnavailable`."""
    hour = now.replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    async with db.read() as connection:
        states = await _tallied(connection, STATE, "workspace_id", "status", "word")
        came = await _tallied(
            connection,
            CALLBACK,
            *("workspace_id", "word"),
            since=hour - timedelta(hours=RECENT_HOURS - 1),
        )
        costs = await _tallied(connection, COST, "workspace_id", since=day)
        quotes = await _tallied(connection, QUOTE, "workspace_id", since=day)
        failed = await _tallied(connection, FAILURE, "workspace_id", "word", since=day)
        since = day - timedelta(days=BILL_DAYS - 1)
        bills = await _tallied(connection, COST, "workspace_id", "word", since=since)
        backlog = (await connection.execute(_backlog(now))).one()
        rest = (await connection.execute(_REST)).one()
    return Gauges(
        runs={(key[0], key[1], key[2]): count for key, (count, _) in states.items() if count},
        callbacks={(key[0], key[1]): count for key, (count, _) in came.items() if count},
        cost_today={key[0]: dollars(amount) for key, (count, amount) in costs.items() if count},
        quoted_today={key[0]: dollars(amount) for key, (count, amount) in quotes.items() if count},
        not_final={key[0]: count for key, (count, _) in bills.items() if key[1] == OPEN},
        unpriced={key[0]: count for key, (count, _) in bills.items() if key[1] == UNPRICED},
        failed_today={(key[0], key[1]): count for key, (count, _) in failed.items() if count},
        due=backlog.due,
        overdue=backlog.overdue,
        awaiting_callback=backlog.awaiting_callback,
        oldest_due_at=backlog.oldest_due_at,
        **rest._asdict(),
    )


async def _tallied(
    connection: AsyncConnection, measure: str, *names: str, since: datetime | None = None
) -> dict[tuple[str, ...], tuple[int, int]]:
    """How many runs, and their amount, by the columns of those names."""
    by = [TALLIES.c[name] for name in names]
    sums = (cast(func.sum(TALLIES.c[name]), BigInteger) for name in ("runs", "amount"))
    statement = select(*by, *sums).where(TALLIES.c.measure == word(measure)).group_by(*by)
    if since is not None:
        statement = statement.where(TALLIES.c.since >= since)
    rows = await connection.execute(statement)
    return {tuple(row[:-2]): (row[-2], row[-1]) for row in rows}


def _backlog(now: datetime) -> Select[*tuple[Any, ...]]:
    """The runs that are to be read, the longest due first."""
    waits = and_(
        runs.c.callback_expected,
        runs.c.callback_at.is_(None),
        runs.c.tracking == word(Tracking.ACTIVE),
        runs.c.standing < Standing.CALLBACK_FAILED,
    )
    first = (
        select(runs.c.next_check_at, waits.label("waits"))
        .where(runs.c.next_check_at.is_not(None))
        .order_by(runs.c.next_check_at)
        .limit(BOUND)
        .subquery()
    )
    is_due = first.c.next_check_at <= now
    return select(
        func.count().filter(is_due).label("due"),
        func.count().filter(first.c.next_check_at <= now - LATE_AFTER).label("overdue"),
        func.count().filter(first.c.waits).label("awaiting_callback"),
        func.min(first.c.next_check_at).filter(is_due).label("oldest_due_at"),
    )


def _count(table: Table, *condition: Any) -> ScalarSelect[int]:
    rows = select(table.c[table.primary_key.columns.keys()[0]]).where(*condition).limit(BOUND)
    return select(func.count()).select_from(rows.subquery()).scalar_subquery()


_LAST_CALLBACK: Final = (
    select(deliveries.c.received_at)
    .where(deliveries.c.event_type.is_distinct_from(word(TRIAL)))
    .order_by(deliveries.c.received_at.desc())
    .limit(1)
    .scalar_subquery()
)
_OLDEST_WAITING: Final = (
    select(deliveries.c.received_at)
    .where(deliveries.c.outcome == word("waiting"))
    .order_by(deliveries.c.received_at)
    .limit(1)
    .scalar_subquery()
)
_REST: Final = select(
    _count(deliveries, deliveries.c.outcome == word("quarantined")).label("quarantined"),
    _count(deliveries, deliveries.c.outcome == word("waiting")).label("waiting"),
    _OLDEST_WAITING.label("oldest_waiting_at"),
    _LAST_CALLBACK.label("last_callback_at"),
    (_count(starts, is_in(StartState.SENT)) + _count(starts, is_in(StartState.IN_DOUBT))).label(
        "open_starts"
    ),
    _count(starts, starts.c.state == word("unresolved")).label("unresolved_starts"),
)
