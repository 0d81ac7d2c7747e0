"""Rollups: counts of runs by state, hour and day, and what they cost.

The transaction that changes a run appends what the run counts for no longer, and what it counts for
now, to `run_tally_changes`: rows that are only appended, so that writers never wait for each other
as they would for a row of totals. A few seconds later one process compacts them into `run_tallies`.
The view `run_tallies_now` adds both: it is exact at every moment.

The views `run_facts` and `run_spending` compute `tracker.core.rollup.facts` in SQL, for `recount`.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Integer,
    MetaData,
    Select,
    Table,
    and_,
    cast,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    union_all,
)

from tracker.core.errors import StoreError
from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.rollup import ALWAYS, MEASURES, STATE, RollupKey, facts
from tracker.core.waiting import cancel, repeat
from tracker.store.engine import Database, insert_on, migration_engine
from tracker.store.errors import FOREIGN, translate
from tracker.store.schema import (
    CleanText,
    UtcDateTime,
    rollup_columns,
    run_tallies,
    run_tally_changes,
    runs,
    word,
)

if TYPE_CHECKING:
    from tracker.store.writing.writer import WriteOutcome

COMPACT_LOCK: Final = 0x74616C6C79  # "tally": the same in every version
"""PostgreSQL's advisory lock of the process that compacts."""
PRUNED: Final = "pruned"
"""A measure of its own: up to when periods may lack runs that retention deleted."""
BEGINNING: Final = datetime(1, 1, 2, tzinfo=UTC)
"""Before all times: nothing has been deleted."""
MAX_CHANGES: Final = 10_000
"""The most changes that one transaction compacts: a fraction of a second, also where the database
is slow. A transaction that took too long would be as long the next time."""

LONGEST_KEY: Final = 640
"""Characters of the texts of a key in `run_tallies`, each of up to four bytes: PostgreSQL's index
takes 2,704 bytes in all. Changes of longer keys, as of three long ids, are never compacted."""

_KEY: Final = RollupKey._fields
COLUMNS: Final = (*_KEY, "runs", "amount")
_TEXTS: Final = ("workspace_id", "technique_id", "status", "word")
_FITS: Final = (
    sum((func.length(run_tally_changes.c[name]) for name in _TEXTS), literal_column("0", Integer))
    <= LONGEST_KEY
)


ROLLUPS: Final = Table("run_tallies_now", MetaData(), *rollup_columns())
"""The view `run_tallies_now`."""


def _facts_in(view: str) -> Select[Any]:
    rows = Table(view, MetaData(), Column("run_id", CleanText), *rollup_columns())
    return select(*(rows.c[name] for name in ("run_id", *_KEY, "amount")))


FACTS: Final = union_all(_facts_in("run_facts"), _facts_in("run_spending")).subquery("facts")


async def compact(db: Database) -> int:
    """Add the changes to the rollups; returns how many rows of changes that were.

    On PostgreSQL it does nothing and returns 0 while another process compacts.
    """
    work = _compact_postgres if db.dialect == "postgresql" else _compact_sqlite
    total = 0
    while True:
        count = await db.write(work)
        total += count
        if count < MAX_CHANGES:
            return total


async def recount(db: Database) -> int:
    """Rebuild the rollups from all runs; returns how many rows they have.

    Others can write meanwhile; on SQLite they wait for one measure at a time, a few seconds with a
    million runs. Periods that lack deleted runs stay as they are.
    """
    if db.dialect == "sqlite":
        return sum([await db.write(partial(_recount, measure)) for measure in MEASURES])
    engine = migration_engine(db.url).execution_options(isolation_level="REPEATABLE READ")
    made = 0
    try:
        for measure in MEASURES:
            async with engine.begin() as connection:
                made += await connection.run_sync(partial(_recount, measure))
    except FOREIGN as exc:
        raise translate(exc) from exc
    finally:
        await engine.dispose()
    return made


def remove_states(connection: Connection, run_ids: Sequence[str]) -> None:
    """Take runs off the counts by state; hours and days keep them.

    To be called in the transaction that deletes the runs, before they are deleted.
    """
    # The same as the view's rows, but planning the view takes longer than deleting the runs.
    state: tuple[ColumnElement[Any], ...] = (
        word(STATE),
        literal(ALWAYS, UtcDateTime),
        *(func.coalesce(runs.c[name], "") for name in ("workspace_id", "technique_id")),
        *(runs.c.status, runs.c.tracking),
        *(literal_column(number, Integer) for number in ("0", "-1", "0")),
    )
    mine = select(*state).where(runs.c.run_id.in_(run_ids))
    connection.execute(insert(run_tally_changes).from_select(COLUMNS, mine))
    ends = select(func.max(runs.c.end_seen_at), func.max(runs.c.completed_at))
    last = connection.execute(ends.where(runs.c.run_id.in_(run_ids))).one()
    if any(last):
        # Rounded to the hour: otherwise each transaction would leave a row of its own.
        hour = max(filter(None, last)).replace(minute=0, second=0, microsecond=0)
        mark = dict.fromkeys(_KEY, "") | {"measure": PRUNED, "since": hour}
        values = mark | {"bucket": 0, "runs": 1, "amount": 0}
        connection.execute(insert(run_tally_changes).values(**values))


def remove(connection: Connection, record: Record) -> None:
    """Subtract everything that a run counts for, in the transaction that deletes it."""
    rows = [dict(zip(COLUMNS, (*key, -1, -amount), strict=True)) for key, amount in facts(record)]
    connection.execute(insert(run_tally_changes), rows)


def _compact_sqlite(connection: Connection) -> int:
    """The transaction has the file to itself, so no change comes in between."""
    first = _first_changes().subquery()
    last = connection.execute(select(func.max(first.c.id))).scalar()
    return 0 if last is None else _compact_all(connection, run_tally_changes.c.id <= last)


def _compact_all(connection: Connection, *which: ColumnElement[bool]) -> int:
    """Compact these changes, in a transaction that no other process compacts beside."""
    taken = and_(_FITS, *which)
    connection.execute(_add(connection.dialect.name, _summed(run_tally_changes).where(taken)))
    return connection.execute(delete(run_tally_changes).where(taken)).rowcount


def _compact_postgres(connection: Connection) -> int:
    """One statement adds what it deletes, whatever is appended meanwhile."""
    if not connection.execute(select(func.pg_try_advisory_xact_lock(COMPACT_LOCK))).scalar():
        return 0
    deleted = (
        delete(run_tally_changes)
        .where(run_tally_changes.c.id.in_(_first_changes()))
        .returning(*(run_tally_changes.c[name] for name in COLUMNS))
        .cte("deleted")
    )
    added = _add("postgresql", _summed(deleted)).cte("added")
    statement = select(func.count()).select_from(deleted).add_cte(added)
    count: int = connection.execute(statement).scalar_one()
    return count


def _first_changes() -> Select[Any]:
    of = run_tally_changes.c
    return select(of.id).where(_FITS).order_by(of.id).limit(MAX_CHANGES)


def _summed(of: Any) -> Select[Any]:
    """Changes, summed by key and in its order, so that no two processes deadlock."""
    key = [of.c[name] for name in _KEY]
    sums = (cast(func.sum(of.c[name]), BigInteger) for name in ("runs", "amount"))
    return select(*key, *sums).where(text("true")).group_by(*key).order_by(*key)


def _add(dialect: str, summed: Select[Any]) -> Any:
    adding = insert_on(dialect)(run_tallies).from_select(COLUMNS, summed)
    return adding.on_conflict_do_update(
        index_elements=[run_tallies.c[name] for name in _KEY],
        set_={name: run_tallies.c[name] + adding.excluded[name] for name in ("runs", "amount")},
    )


def _recount(measure: str, connection: Connection) -> int:
    """In one snapshot: changes that are not in it are appended later, and compacted.

    The lock comes before the snapshot and keeps other processes from compacting.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("LOCK TABLE run_tallies IN SHARE ROW EXCLUSIVE MODE"))
    _compact_all(connection)
    marks = select(func.max(run_tallies.c.since)).where(run_tallies.c.measure == word(PRUNED))
    pruned_until = connection.execute(marks).scalar() or BEGINNING

    def is_complete(of: Any) -> ColumnElement[bool]:
        """Whether all runs of the period are stored."""
        same = of.c.measure == word(measure)
        return same if measure == STATE else and_(same, of.c.since > pruned_until)

    for table in (run_tallies, run_tally_changes):
        connection.execute(delete(table).where(is_complete(table)))
    key = [FACTS.c[name] for name in _KEY]
    counted = select(*key, func.count(), cast(func.sum(FACTS.c.amount), BigInteger))
    counted = counted.where(is_complete(FACTS)).group_by(*key)
    made = connection.execute(insert(run_tally_changes).from_select(COLUMNS, counted)).rowcount
    _compact_all(connection)
    return made


COMPACT_AFTER: Final = 3.0
"""Seconds from a commit to compacting, so that many commits share it."""
RETRY: Final = 5.0
"""Seconds until failed compacting is tried again."""

log = get_logger(__name__)


@dataclass(eq=False)
class RollupCompactor:
    """Compacts a few seconds after commits of this process, and once more when the block ends.

    Used as `async with RollupCompactor(…) as compactor`; `committed` is a hook of the writer. With
    `background` false nothing happens before the end: a one-shot command has no time to lose. Every
    process that writes has one, so nothing has to be scheduled and an idle tracker does nothing.
    """

    database: Database
    _: KW_ONLY
    background: bool
    delay: float = COMPACT_AFTER
    retry: float = RETRY

    def __post_init__(self) -> None:
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_down = False

    async def __aenter__(self) -> Self:
        if self.background:
            self._changed.set()  # a process may have been killed before it could compact
            compacting = repeat("rollups", self._compact_next, pauses=(self.retry, self.retry))
            self._task = asyncio.create_task(compacting, name="rollup-compactor")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Compact once more. Raises `StoreUnavailable`; then the next process does."""
        task, self._task = self._task, None
        await cancel(task)
        if self._changed.is_set() and not self._is_down:
            await self._compact()

    def committed(self, outcome: "WriteOutcome") -> None:
        self._changed.set()
        self._is_down = False

    async def _compact_next(self) -> None:
        await self._changed.wait()
        await asyncio.sleep(self.delay)
        await self._compact()

    async def _compact(self) -> None:
        self._changed.clear()
        try:
            await compact(self.database)
        except BaseException as error:
            self._is_down = isinstance(error, StoreError)
            self._changed.set()
            raise
        self._is_down = False
