"""Keeping the tallies: many append what changed, one adds it up, and a reader sees the sum of both.

The writer writes, in the transaction that changes a run, what the run counts for no longer and what
it counts for now: rows that are only ever appended, so that receivers never wait for each other as
they would for one row of totals. Whoever wrote also folds them into `run_tallies`, a few seconds
later and in one transaction. The view `run_tallies_now` is both together: exact at every moment,
folded or not.

The views `run_facts` and `run_spending` say the same as `tracker.core.rollup.facts` in SQL, for
counting all runs anew.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Self

import structlog
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    Select,
    and_,
    cast,
    column,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    table,
    text,
    union_all,
)
from sqlalchemy.dialects import postgresql, sqlite

from tracker.core.errors import StoreError
from tracker.core.rollup import ALWAYS, MEASURES, STATE, Key
from tracker.store.engine import Database, migration_engine
from tracker.store.errors import FOREIGN, translate
from tracker.store.schema import CleanText, UtcDateTime, run_tallies, run_tally_changes, runs, word
from tracker.store.writing.writer import WriteOutcome

FOLD_LOCK: Final = 0x74616C6C79  # "tally"
"""PostgreSQL's advisory lock of whoever folds."""
PRUNED: Final = "pruned"
"""A measure of its own: until when the periods are whose runs may have been deleted."""
BEFORE: Final = datetime(1, 1, 2, tzinfo=UTC)
"""Before all periods: nothing has been deleted."""
REST: Final = 100_000
"""So many changes are folded in one transaction at most; the rest in the next."""

_KEY: Final = Key._fields
_COLUMNS: Final = (*_KEY, "runs", "amount")
_TYPES: Final[dict[str, Any]] = {"since": UtcDateTime, "bucket": Integer}


def _facts_in(view: str) -> Select[Any]:
    return select(
        table(
            view,
            column("run_id", CleanText),
            *(column(name, _TYPES.get(name, CleanText)) for name in _KEY),
            column("amount", BigInteger),
        )
    )


FACTS: Final = union_all(_facts_in("run_facts"), _facts_in("run_spending")).subquery("facts")


async def fold(db: Database) -> int:
    """Add what changed to the tallies; returns how many rows of changes that were.

    On PostgreSQL nothing is done, and 0 returned, while another process is at it.
    """
    work = _fold_postgres if db.dialect == "postgresql" else _fold_sqlite
    folded = 0
    while True:
        count = await db.write(work)
        folded += count
        if count < REST:
            return folded


async def recount(db: Database) -> int:
    """Count all runs anew, whatever the tallies say; returns how many rows that made.

    Others go on writing meanwhile; on SQLite they wait for one measure at a time, a few seconds
    where there are a million runs. Periods of which runs have been deleted stay as they are: what
    is gone cannot be counted again.
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


def forget(connection: Connection, run_ids: Sequence[str]) -> None:
    """Take runs that are about to be deleted off the states; their hours and days keep them.

    To be called in the transaction that deletes them.
    """
    # As the view has it; but to plan all of that takes longer than to delete the runs.
    state: tuple[ColumnElement[Any], ...] = (
        word(STATE),
        literal(ALWAYS, UtcDateTime),
        *(func.coalesce(runs.c[name], "") for name in ("workspace_id", "technique_id")),
        *(runs.c.status, runs.c.tracking),
        *(literal_column(number, Integer) for number in ("0", "-1", "0")),
    )
    mine = select(*state).where(runs.c.run_id.in_(run_ids))
    connection.execute(insert(run_tally_changes).from_select(_COLUMNS, mine))
    ends = select(func.max(runs.c.end_seen_at), func.max(runs.c.completed_at))
    last = connection.execute(ends.where(runs.c.run_id.in_(run_ids))).one()
    if any(last):
        # To the hour, in which it is as good: else each transaction would leave a tally of its own.
        hour = max(filter(None, last)).replace(minute=0, second=0, microsecond=0)
        mark = dict.fromkeys(_KEY, "") | {"measure": PRUNED, "since": hour}
        values = mark | {"bucket": 0, "runs": 1, "amount": 0}
        connection.execute(insert(run_tally_changes).values(**values))


def _fold_sqlite(connection: Connection) -> int:
    """The transaction has the file to itself, so that nothing comes in between."""
    last = select(run_tally_changes.c.id).order_by(run_tally_changes.c.id).limit(REST).subquery()
    upto = connection.execute(select(func.max(last.c.id))).scalar()
    if upto is None:
        return 0
    taken = run_tally_changes.c.id <= upto
    connection.execute(_add(sqlite.insert, _summed(run_tally_changes).where(taken)))
    return connection.execute(delete(run_tally_changes).where(taken)).rowcount


def _fold_postgres(connection: Connection) -> int:
    """One statement: what it deletes is what it adds, whatever others append meanwhile."""
    if not connection.execute(select(func.pg_try_advisory_xact_lock(FOLD_LOCK))).scalar():
        return 0
    count: int = connection.execute(_FOLD).scalar_one()
    return count


def _fold_statement() -> Any:
    first = select(run_tally_changes.c.id).order_by(run_tally_changes.c.id).limit(REST)
    gone = (
        delete(run_tally_changes)
        .where(run_tally_changes.c.id.in_(first))
        .returning(*(run_tally_changes.c[name] for name in _COLUMNS))
        .cte("gone")
    )
    added = _add(postgresql.insert, _summed(gone)).cte("added")
    return select(func.count()).select_from(gone).add_cte(added)


def _summed(of: Any) -> Select[Any]:
    """Rows of changes, added up by key and in its order: no two who fold lock crosswise."""
    key = [of.c[name] for name in _KEY]
    sums = (cast(func.sum(of.c[name]), BigInteger) for name in ("runs", "amount"))
    return select(*key, *sums).where(text("true")).group_by(*key).order_by(*key)


def _add(insert_into: Any, summed: Select[Any]) -> Any:
    """Add rows to the tallies, new keys and known ones."""
    adding = insert_into(run_tallies).from_select(_COLUMNS, summed)
    return adding.on_conflict_do_update(
        index_elements=[run_tallies.c[name] for name in _KEY],
        set_={name: run_tallies.c[name] + adding.excluded[name] for name in ("runs", "amount")},
    )


_FOLD: Final = _fold_statement()


def _recount(measure: str, connection: Connection) -> int:
    """In one snapshot: what is not in it has not been taken off or added yet, and will be folded.

    The lock comes before the snapshot and keeps those who fold away.
    """
    postgres = connection.dialect.name == "postgresql"
    if postgres:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("LOCK TABLE run_tallies IN SHARE ROW EXCLUSIVE MODE"))
    insert_into = postgresql.insert if postgres else sqlite.insert
    connection.execute(_add(insert_into, _summed(run_tally_changes)))
    connection.execute(delete(run_tally_changes))
    marks = select(func.max(run_tallies.c.since)).where(run_tallies.c.measure == word(PRUNED))
    mark = connection.execute(marks).scalar() or BEFORE

    def whole(of: Any) -> ColumnElement[bool]:
        """Of what all runs are still here."""
        same = of.c.measure == word(measure)
        return same if measure == STATE else and_(same, of.c.since > mark)

    connection.execute(delete(run_tallies).where(whole(run_tallies)))
    key = [FACTS.c[name] for name in _KEY]
    counted = select(*key, func.count(), cast(func.sum(FACTS.c.amount), BigInteger))
    anew = insert(run_tallies).from_select(_COLUMNS, counted.where(whole(FACTS)).group_by(*key))
    return connection.execute(anew).rowcount


# Who folds the tallies: every process that writes, a few seconds after it did.
#
# So nothing has to be scheduled, an idle tracker does nothing, and it does not matter which of
# the processes of a deployment are running. Nobody waits for it: readers add up what is not
# folded yet.


GATHER: Final = 3.0
"""Seconds from a commit to the fold that takes it in, so that those of many commits share one."""
RETRY: Final = 5.0
"""Seconds until a fold that failed is tried again."""
LAST_FOLD_WITHIN: Final = 2.0
"""Seconds that the end of a process waits for its last fold."""

log = structlog.get_logger(__name__)


class RollupCompactor:
    """Folds while the `async with` block lasts, and once more at its end. `committed` is a hook
    for the writer.

    With `background` false nothing happens before the end: a one-shot has no time to lose.
    """

    def __init__(self, db: Database, *, background: bool, gather: float = GATHER) -> None:
        self._db = db
        self._background = background
        self._gather = gather
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failing = False
        self._is_down = False

    async def __aenter__(self) -> Self:
        if self._background:
            self._changed.set()  # somebody may have been killed before it could fold
            self._task = asyncio.create_task(self._run(), name="tally-keeper")
        return self

    async def __aexit__(self, *_: object) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._changed.is_set() and not self._is_down:
            with suppress(TimeoutError):  # the next process does it
                async with asyncio.timeout(LAST_FOLD_WITHIN):
                    await self._fold()

    def committed(self, outcome: WriteOutcome) -> None:
        """The writer's hook: there may be something to fold."""
        self._changed.set()
        self._is_down = False  # whatever the last fold met

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._gather)
            if not await self._fold():
                await asyncio.sleep(RETRY)

    async def _fold(self) -> bool:
        self._changed.clear()
        try:
            await fold(self._db)
        except StoreError as error:
            if not self._failing:
                log.warning("tallies.not_folded", error=str(error))
            self._failing = self._is_down = True
            self._changed.set()
            return False
        except asyncio.CancelledError:
            self._changed.set()
            raise
        self._failing = self._is_down = False
        return True
