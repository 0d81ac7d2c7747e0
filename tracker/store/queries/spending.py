"""Spending, and the use of each budget.

There are no counters: the use of a budget is computed from the rollups (costs of runs) and the
start log (reservations of starts without a run), so that it always follows from their state, and
callbacks and polls write nothing for budgets.

A start reserves its price under a lock of each budget that covers it, in the transaction that
stores its key, so that concurrent starts of any number of processes cannot exceed a budget.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Connection,
    Select,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
    union_all,
)

from tracker.core.errors import BudgetExceeded
from tracker.core.formatting import money
from tracker.core.rollup import CHARGED, DEAREST, QUOTED, SPENT, TAGGED, UNPRICED, dollars
from tracker.core.starts import Budget, Period, check_tag_key
from tracker.store.engine import Database
from tracker.store.queries.paging import between, unindexed
from tracker.store.schema import starts, techniques, word
from tracker.store.writing.rollups import ROLLUPS

RESERVED: Final = "reserved"
SEVERAL_WITHIN: Final = timedelta(minutes=15)
"""The answer to a start of several runs names only the first. The others stay reserved this long,
until the history shows them. It does not show their tags, so in a tag's budget they stay
reserved."""
MOST_ROWS: Final = 1000
"""Most techniques or tag values; the rest is one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The use of a budget in the period from `since` to `renews_at` (both `None` for `total`), in
    USD: `reserved` for starts in progress or in doubt, `quoted` (price or quote) for runs without
    a bill, `charged` by FLORA."""

    budget: Budget
    since: datetime | None
    renews_at: datetime | None
    reserved: Decimal
    quoted: Decimal
    charged: Decimal

    @property
    def used(self) -> Decimal:
        """The sum; may exceed the budget, by bills above quotes or by others' spending."""
        return self.reserved + self.quoted + self.charged

    @property
    def left(self) -> Decimal:
        """What may still be spent, at least 0."""
        return max(self.budget.usd - self.used, Decimal(0))

    @property
    def share(self) -> float:
        """The used share; 1 is all of it."""
        return float(self.used / self.budget.usd) if self.budget.usd else 1.0


async def usages(db: Database, budgets: Sequence[Budget], *, now: datetime) -> list[Usage]:
    """The use of each budget, in one snapshot."""

    async with db.read() as connection:
        return [await connection.run_sync(_usage, budget, now) for budget in budgets]


def lock(connection: Connection, budgets: Sequence[Budget]) -> None:
    """Lock the budgets until the commit."""
    if budgets and connection.dialect.name == "postgresql":  # SQLite has one writer
        digests = (sha256(f"tracker budget {budget.name}".encode()).digest() for budget in budgets)
        keys = sorted(int.from_bytes(digest[:8], signed=True) for digest in digests)
        connection.execute(_LOCK, {"keys": keys})


def check_room(
    connection: Connection, budgets: Sequence[Budget], *, price: Decimal | None, now: datetime
) -> None:
    """Raise `BudgetExceeded` unless `price` (USD) fits into each of the locked budgets."""
    for budget in budgets:
        usage = _usage(connection, budget, now)
        if price is None or usage.used + price > budget.usd:
            raise exceeded(usage, price)


# In the order of the list, so that processes cannot deadlock.
_LOCK: Final = select(
    func.pg_advisory_xact_lock(func.unnest(bindparam("keys", type_=ARRAY(BigInteger))))
)


def exceeded(
    usage: Usage, cost: Decimal | None, *, what: str = "this start costs"
) -> BudgetExceeded:
    """The error for a price (USD) that does not fit into what is left of a budget."""
    budget = usage.budget
    message = f"the budget {budget.name} has {money(usage.left)} of {money(budget.usd)} left"
    if cost is None:
        message += ", and FLORA shows no price for this technique, so it cannot be checked"
    else:
        message += f", and {what} {money(cost)}"
    if usage.renews_at is not None:
        message += f"; it starts again at {usage.renews_at:%Y-%m-%dT%H:%M:%SZ}"
    return BudgetExceeded(
        f"{message}. Nothing was sent",
        budget=budget.name,
        left=usage.left,
        renews_at=usage.renews_at,
        ever_fits=cost is not None and cost <= budget.usd,
    )


def _usage(connection: Connection, budget: Budget, now: datetime) -> Usage:
    since, renews_at = budget.period.bounds(now)
    parts = Counter[str]()
    for part, amount in connection.execute(used(budget, since, renews_at, now)):
        parts[part] += int(amount or 0)
    return Usage(
        budget=budget,
        since=since,
        renews_at=renews_at,
        reserved=dollars(parts[RESERVED]),
        quoted=dollars(parts[QUOTED] + parts[UNPRICED]),
        charged=dollars(parts[CHARGED]),
    )


def used(
    budget: Budget, since: datetime | None, until: datetime | None, now: datetime
) -> CompoundSelect[Any]:
    """The use of a budget by part, in billionths of a dollar.

    One statement, so that a start that becomes a run is counted exactly once.
    """
    spent = [
        *(ROLLUPS.c[name] == value for name, value in budget.scope.items() if name != "tag"),
        *between(ROLLUPS.c.since, since, until),
    ]
    if budget.tag is None:
        spent.append(ROLLUPS.c.measure == word(SPENT))
    else:
        tagged = ROLLUPS.c.word == "=".join(budget.tag)
        spent += [ROLLUPS.c.measure == word(TAGGED), tagged]
    costs = select(ROLLUPS.c.status, cast(func.sum(ROLLUPS.c.amount), BigInteger))
    return union_all(
        costs.where(*spent).group_by(ROLLUPS.c.status), *_reservations(budget, since, until, now)
    )


def _reservations(
    budget: Budget, since: datetime | None, until: datetime | None, now: datetime
) -> Iterator[Select[Any, int]]:
    """Reservations: starts that may have taken effect, leased ones, and the further runs of starts
    of several runs."""
    of = starts.c
    scope = {"workspace_slot": budget.workspace_id, "technique_id": budget.technique_id}
    covered = between(of.reserved_at, since, until)
    covered += [unindexed(of[name]) == value for name, value in scope.items() if value is not None]
    if budget.tag is not None:
        key, value = budget.tag
        covered.append(of.tags[key].as_string() == value)
    several = and_(of.state == word("started"), of.reserved_runs > literal_column("1"))
    open_ones = of.state.in_([word("stored"), word("sent")])
    if budget.tag is None:
        several = and_(several, of.reserved_at > now - SEVERAL_WITHIN)
    # As runs are counted, so that no price overflows the sum.
    each = case((of.reserved_cost > DEAREST, DEAREST), else_=of.reserved_cost)
    price = each * of.reserved_runs
    states: list[tuple[ColumnElement[Any], list[ColumnElement[bool]]]] = [
        # One query for each index.
        (price, [open_ones, (of.state == word("sent")) | (of.lease_until > now)]),
        (price, [of.state == word("in_doubt")]),
        (price, [of.state == word("unresolved")]),
        (price - each, [several]),
    ]
    for usd, state in states:
        amount = func.coalesce(func.sum(usd), literal_column("0")) * literal_column("1000000000")
        yield select(literal_column(f"'{RESERVED}'"), cast(func.round(amount), BigInteger)).where(
            *state, *covered
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """The cost in USD of the runs of a day, a technique or a tag value (`of`; `None`: all others).

    `charged` was billed by FLORA, `quoted` is the price of runs without a bill, as far as it is
    known, and `unpriced` counts the runs that FLORA never billed.
    """

    of: datetime | str | None
    name: str | None = None
    runs: int = 0
    charged: Decimal = Decimal(0)
    quoted: Decimal = Decimal(0)
    unpriced: int = 0

    @property
    def total(self) -> Decimal:
        """Charged and quoted together."""
        return self.charged + self.quoted


def check_by(by: str) -> str:
    """`by` if `spending` can group by it; raises `ValueError`."""
    if by in ("day", "technique"):
        return by
    kind, colon, key = by.partition(":")
    if kind != "tag" or not colon:
        raise ValueError("must be day, technique or tag:KEY, such as tag:campaign")
    return f"tag:{check_tag_key(key)}"


async def spending(
    db: Database, by: str, *, since: datetime | None = None, workspace_id: str | None = None
) -> tuple[list[Spending], Spending]:
    """Spending by `day` (in order), `technique` or `tag:KEY` (highest first) of runs started since
    the UTC day of `since`; and the total."""
    measure, key = SPENT, ""
    of: ColumnElement[Any] = ROLLUPS.c.since
    where = between(ROLLUPS.c.since, since and Period.DAY.bounds(since)[0])
    if workspace_id is not None:
        where.append(ROLLUPS.c.workspace_id == workspace_id)
    columns = _sums()
    whole = select(*columns).where(ROLLUPS.c.measure == word(SPENT), *where)
    if by == "technique":
        of = ROLLUPS.c.technique_id
    elif by != "day":
        measure, key = TAGGED, by.removeprefix("tag:") + "="
        of = func.substr(ROLLUPS.c.word, literal_column(f"{len(key) + 1}"))
        where.append(func.substr(ROLLUPS.c.word, 1, len(key)) == key)
    grouped = select(of.label("of"), *columns).where(ROLLUPS.c.measure == word(measure), *where)
    grouped = grouped.group_by(of).having(func.sum(ROLLUPS.c.runs) != 0)
    order = [of] if by == "day" else [(columns[1] + columns[2]).desc(), of]
    # A tag may have as many values as there are runs, and not all runs have it.
    grouped = grouped.order_by(*order).limit(MOST_ROWS if key else None)
    async with db.read() as connection:
        found = (await connection.execute(grouped)).all()
        summed = (await connection.execute(whole)).all() if key else found
        total = _spending(None, *(sum(row[n] for row in summed) for n in range(-4, 0)))
        if by != "day":
            found = found[:MOST_ROWS]
        names: dict[str, str] = {}
        if by == "technique":
            ids = [row.of for row in found]
            called = select(techniques.c.technique_id, techniques.c.name)
            called = called.where(techniques.c.technique_id.in_(ids))
            names = {row[0]: row[1] for row in await connection.execute(called)}
            names[""] = "no technique"  # generations, and runs that were not read yet
    rows = [_spending(row.of or None, *row[1:], name=names.get(row.of)) for row in found]
    names_of = ("runs", "charged", "quoted", "unpriced")
    left = {one: getattr(total, one) - sum(getattr(row, one) for row in rows) for one in names_of}
    if by == "day" or not left["runs"]:
        return rows, total
    return [*rows, Spending(of=None, **left)], total


async def tag_keys(db: Database, *, since: datetime) -> list[str]:
    """The tag keys of runs started since that day, those with the fewest values first."""
    if db.dialect == "postgresql":
        key: Any = func.split_part(ROLLUPS.c.word, "=", 1)
    else:
        key = func.substr(ROLLUPS.c.word, 1, func.instr(ROLLUPS.c.word, "=") - 1)
    day, _ = Period.DAY.bounds(since)
    values = func.count(ROLLUPS.c.word.distinct())
    found = select(key.label("key"), values.label("number")).group_by("key")
    found = found.where(ROLLUPS.c.measure == word(TAGGED), ROLLUPS.c.since >= day)
    return [row.key for row in await db.fetch(found.order_by("number", "key"))]


def _sums() -> list[ColumnElement[Any]]:
    def of(column: ColumnElement[Any], *parts: str) -> ColumnElement[Any]:
        counted = func.sum(column).filter(ROLLUPS.c.status.in_([word(part) for part in parts]))
        return func.coalesce(cast(counted, BigInteger), literal_column("0"))

    runs, amount = ROLLUPS.c.runs, ROLLUPS.c.amount
    every = of(runs, CHARGED, QUOTED, UNPRICED)
    return [every, of(amount, CHARGED), of(amount, QUOTED, UNPRICED), of(runs, UNPRICED)]


def _spending(
    of: Any, runs: int, charged: int, quoted: int, unpriced: int, *, name: str | None = None
) -> Spending:
    return Spending(
        of=of,
        name=name,
        runs=runs,
        charged=dollars(charged),
        quoted=dollars(quoted),
        unpriced=unpriced,
    )
