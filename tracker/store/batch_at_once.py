"""A batch of callbacks on PostgreSQL in two statements and no transaction around them.

A transaction that locks what it reads is five round trips to the server, and between any two of
them this process turns to its clients. Callbacks seldom meet anybody else who writes the same runs.
So the runs are read without a lock, and one statement, which is a transaction by itself, writes
everything, provided that all is still as it was read. Where it is not, nothing is written, and the
batch goes the other way.

The statements go to the driver directly: what SQLAlchemy does for each, beyond making its text
once, costs this process more than the driver does.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Integer,
    and_,
    bindparam,
    case,
    exists,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.types import UserDefinedType

from tracker.core.entry import Entry
from tracker.core.record import Record
from tracker.store.batch import DELIVERY_COLUMNS, Came, Outcome, Rules, merged, run_ids_of
from tracker.store.batch_postgres import (
    DELIVERIES,
    Writing,
    how_many,
    incoming,
    is_any_of,
    to_json,
    writing_values,
)
from tracker.store.faults import WriteConflict
from tracker.store.rows import RUN_COLUMNS, record_of
from tracker.store.tables import deliveries, runs

_DIALECT: Final = dialect()  # type: ignore[no-untyped-call]


class _TransactionId(UserDefinedType[int]):
    """PostgreSQL's number of a transaction."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid"


_VERSION: Final[ColumnElement[int]] = literal_column("runs.xmin", _TransactionId())
"""The transaction that wrote a row as it is: another, once anybody has changed it."""
_DIVISION_BY_ZERO: Final = "22012"
_ZERO, _ONE = (literal_column(digit, Integer()) for digit in "01")
_OUTPUT_COUNT: Final = [each.name for each in RUN_COLUMNS].index("output_count")


class _Text:
    """A statement as the driver takes it: its text, and the `names` of its parameters."""

    def __init__(self, statement: Any) -> None:
        compiled = statement.compile(dialect=_DIALECT)
        self.text = str(compiled)
        self.names: tuple[str, ...] = tuple(compiled.positiontup)
        self._pick = itemgetter(*self.names)

    def values(self, **given: Any) -> tuple[Any, ...]:
        """The parameters' values in the order of the text."""
        return tuple(self._pick(given))


def _look() -> Any:
    """Whether any of the deliveries has come before, and those of the runs that are known, each
    with its version; one row at least."""
    one = select(
        exists(select(1).where(is_any_of(deliveries.c.delivery_id, "delivery_ids")))
        .select()
        .scalar_subquery()
        .label("is_repeated")
    ).subquery("one")
    joined = one.outerjoin(runs, is_any_of(runs.c.run_id, "run_ids"))
    return select(one.c.is_repeated, _VERSION.label("version"), *RUN_COLUMNS).select_from(joined)


def _write() -> Any:
    """All of it, or, where a row is missing among what was written, a division by zero, which takes
    the rest back. Rows are locked in the door's order: deliveries, then known runs, both by id,
    then those that are new."""
    came = incoming("came", DELIVERY_COLUMNS)
    stored = (
        insert(deliveries)
        .from_select(DELIVERIES, select(*(came.c[name] for name in DELIVERIES)))
        .on_conflict_do_nothing(index_elements=[deliveries.c.delivery_id])
        .returning(deliveries.c.delivery_id)
        .cte("stored")
    )
    locked = (
        select(runs.c.run_id)
        .where(is_any_of(runs.c.run_id, "known"), how_many(stored) >= _ZERO)
        .order_by(runs.c.run_id)
        .with_for_update(key_share=True)
        .cte("locked")
    )
    # What is counted has happened, all of it.
    writing = Writing.of(how_many(locked) >= _ZERO, version=_VERSION)
    is_all = and_(
        how_many(stored) == bindparam("deliveries", type_=Integer),
        writing.written == bindparam("runs", type_=Integer),
    )
    return select(_ONE // case((is_all, _ONE), else_=_ZERO), writing.sent).add_cte(*writing.besides)


LOOK: Final = _Text(_look())
WRITE: Final = _Text(_write())


async def pass_at_once(
    connection: Any, entries: Sequence[Entry], rules: Rules, origin: str
) -> Outcome:
    """Commit what callbacks say, in their order, and return what came of each.

    `connection` is asyncpg's own, and in no transaction. Raises `WriteConflict` where a delivery
    has come before, a run has outputs or gets some, or somebody else was quicker; nothing is
    written then.
    """
    came = Came.among(entries)
    repeated = came.repeated_here
    found = await connection.fetch(
        LOOK.text, *LOOK.values(delivery_ids=[*came.at], run_ids=run_ids_of(entries, repeated))
    )
    versions, before = _known(found)
    passed, changes = merged(entries, before, rules, repeated=repeated)
    if changes.outputs:
        raise WriteConflict
    values = WRITE.values(
        came=to_json(DELIVERIES, came.rows),
        deliveries=len(came.rows),
        runs=len(changes.records),
        **writing_values(changes, origin, versions=versions),
    )
    try:
        await connection.fetch(WRITE.text, *values)
    except Exception as error:
        if getattr(error, "sqlstate", None) == _DIVISION_BY_ZERO:
            raise WriteConflict from None
        raise
    return Outcome(passed, changes.due, changes.news)


def _known(found: Sequence[Any]) -> tuple[dict[str, int], dict[str, Record]]:
    """Versions and records of the runs that `LOOK` found."""
    if found[0][0]:
        raise WriteConflict
    versions: dict[str, int] = {}
    records: dict[str, Record] = {}
    for _, version, *row in found:  # whose values the driver reads as SQLAlchemy told it to
        if version is None:
            break  # the one row of no run
        if row[_OUTPUT_COUNT]:
            raise WriteConflict
        record = record_of(row, None)
        versions[record.run.run_id], records[record.run.run_id] = version, record
    return versions, records
