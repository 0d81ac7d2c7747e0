"""The write statements for SQLite, whose single writer locks the whole file while it runs.

The text of each statement is made once, and the driver gets rows in SQLite's own form, many at a
time. Lists of keys travel as one JSON text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Final

from sqlalchemy import JSON, Column, Connection, Table, bindparam, func, update

from tracker.store.engine import Database
from tracker.store.errors import StoreRefused
from tracker.store.rows import RUN_COLUMNS, run_row
from tracker.store.schema import (
    Money,
    UtcDateTime,
    deliveries,
    outbox,
    run_events,
    run_outputs,
    run_tally_changes,
    runs,
)
from tracker.store.sqlite import driver_execute
from tracker.store.text import dump_json
from tracker.store.writing.statements import (
    DELETE_OUTPUTS,
    DELIVERY_COLUMNS,
    EVENT_COLUMNS,
    OUTBOX_COLUMNS,
    OUTPUT_COLUMNS,
    ROLLUP_COLUMNS,
    STARTED_COLUMNS,
    BatchChanges,
    Receipt,
    Rows,
    Statements,
    close_starts,
    new_delivery,
)

_SIZES: Final = (1, 2, 4, *range(8, 64, 8), 64, 96, 128)
"""How many rows one statement inserts: the next size, filled up with rows that are not inserted."""


class RowInsert:
    """An insert of any number of rows into these columns of a table.

    After each statement the driver asks for Python's lock again, for which it may wait while other
    threads compute. So rows go many at a time, in statements of a few fixed sizes: the driver keeps
    each that it has prepared, with the values that it had last.
    """

    def __init__(self, table: Table, names: Sequence[str], *, on_conflict: str = "") -> None:
        columns = [table.c[name] for name in names]
        into = f"INSERT INTO {table.name} ({', '.join(each.name for each in columns)})"
        row = f"({', '.join('?' * len(columns))})"
        self._texts = {
            size: f"{into} SELECT * FROM (VALUES {', '.join([row] * size)}) "  # noqa: S608
            f"WHERE column1 IS NOT NULL {on_conflict}"
            for size in _SIZES
        }
        self._plain = plain_rows(columns)
        self._nothing = (None,) * len(columns)

    def statements(self, rows: Rows) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Statements in the driver's form, each with its values."""
        rows = self._plain(rows)
        for first in range(0, len(rows), _SIZES[-1]):
            some = rows[first : first + _SIZES[-1]]
            size = next(size for size in _SIZES if size >= len(some))
            filled = [*some, *[self._nothing] * (size - len(some))]
            yield self._texts[size], tuple(chain.from_iterable(filled))

    def __call__(self, connection: Connection, rows: Rows) -> None:
        if rows:
            execute = driver_execute(connection)
            for text, values in self.statements(rows):
                execute(text, values)


@lru_cache(4096)  # most times of a run are equal
def _moment(value: datetime) -> str:
    """As `UtcDateTime` stores it on SQLite."""
    if value.tzinfo is not UTC:
        value = value.astimezone(UTC)
    return value.isoformat(" ", "microseconds")[:-6]  # without its +00:00


_FORMS: Final[dict[type, Callable[[Any], Any]]] = {
    UtcDateTime: _moment,
    Money: float,
    JSON: dump_json,
}
"""How SQLite stores what it has no type for; the types of `tracker.store.schema` do the same."""


def plain_rows(columns: Iterable[Column[Any]]) -> Callable[[Rows], Rows]:
    """A function that converts rows of these columns to the driver's own types."""
    forms = [
        (position, form)
        for position, column in enumerate(columns)
        if (form := _FORMS.get(type(column.type))) is not None
    ]

    def plain(rows: Rows) -> Rows:
        made: Rows = []
        for row in rows:
            values = list(row)
            for position, form in forms:
                if values[position] is not None:
                    values[position] = form(values[position])
            made.append(tuple(values))
        return made

    return plain if forms else lambda rows: rows


_ALL_BUT_KEY: Final = (each.name for each in RUN_COLUMNS if not each.primary_key)
UPSERT_RUNS: Final = RowInsert(
    runs,
    [each.key for each in RUN_COLUMNS],
    on_conflict="ON CONFLICT (run_id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _ALL_BUT_KEY),
)
INSERT_EVENTS: Final = RowInsert(run_events, EVENT_COLUMNS)
INSERT_ROLLUPS: Final = RowInsert(run_tally_changes, ROLLUP_COLUMNS)
INSERT_OUTBOX: Final = RowInsert(outbox, OUTBOX_COLUMNS)
INSERT_OUTPUTS: Final = RowInsert(run_outputs, OUTPUT_COLUMNS)
CLOSE_STARTS: Final = close_starts(*(bindparam(name) for name in STARTED_COLUMNS))

INSERT_DELIVERIES: Final = RowInsert(deliveries, (*DELIVERY_COLUMNS, "body"))
SELECT_STORED: Final = """
SELECT delivery_id, outcome, body, body_removed_at IS NOT NULL
FROM deliveries
WHERE delivery_id IN (SELECT value FROM json_each(?))
"""
COUNT_RECEIPTS: Final = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("stored"))
    .values(
        receipts=deliveries.c.receipts + bindparam("more"),
        last_received_at=func.max(
            deliveries.c.last_received_at,
            bindparam("last", type_=deliveries.c.last_received_at.type),
        ),
    )
)


class SqliteStatements(Statements):
    """One prepared statement for each table. The transaction has the file to itself."""

    def write(self, connection: Connection, changes: BatchChanges) -> None:
        UPSERT_RUNS(connection, [run_row(record) for record in changes.records])
        INSERT_EVENTS(connection, changes.events)
        INSERT_ROLLUPS(connection, changes.rollups)
        INSERT_OUTBOX(connection, changes.outbox)
        if changes.replaced_outputs:
            connection.execute(DELETE_OUTPUTS, {"run_ids": changes.replaced_outputs})
        INSERT_OUTPUTS(connection, changes.outputs)
        if changes.started:
            rows = [dict(zip(STARTED_COLUMNS, row, strict=True)) for row in changes.started]
            connection.execute(CLOSE_STARTS, rows)

    async def store(self, db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
        rows = [(*new_delivery(one).values(), one.delivery.body) for one in receipts]
        whole = [*INSERT_DELIVERIES.statements(rows)]
        if len(whole) == 1:
            with suppress(StoreRefused):  # nothing is stored: perhaps one of them was before
                await db.send(*whole[0])
                return {}
        return await db.write(partial(_store, receipts))


def _store(receipts: Sequence[Receipt], connection: Connection) -> dict[str, str | None]:
    keys = dump_json([receipt.delivery.delivery_id for receipt in receipts])
    before = {row[0]: row for row in driver_execute(connection)(SELECT_STORED, (keys,))}
    outcomes: dict[str, str | None] = {}
    new: Rows = []
    repeated = []
    for receipt in receipts:
        one = receipt.delivery
        if (row := before.get(one.delivery_id)) is None:
            new.append((*new_delivery(receipt).values(), one.body))
            continue
        _, outcome, body, body_is_gone = row
        # A body that retention has removed cannot be compared: see the statement for PostgreSQL.
        is_same = body == one.body or body_is_gone
        outcomes[one.delivery_id] = outcome if is_same else None
        if is_same:
            more, last = len(receipt.positions), receipt.last_received_at
            repeated.append({"stored": one.delivery_id, "more": more, "last": last})
    INSERT_DELIVERIES(connection, new)
    if repeated:
        connection.execute(COUNT_RECEIPTS, repeated)
    return outcomes
