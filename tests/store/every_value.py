"""Rows for every table that there is, so that each column has a value in one and NULL in another.

Values follow from a column's type; only what a CHECK restricts is said here by name. So a table or
a column that is new is filled too, or this says that it cannot be.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    func,
    insert,
    select,
)

from tracker.store.copy import TABLES
from tracker.store.engine import migration_engine
from tracker.store.schema import CleanText, Money, UtcDateTime
from tracker.store.url import DatabaseUrl

Rows = dict[str, list[dict[str, Any]]]

ROWS: Final = 3
_FIRST = datetime(1, 1, 2, tzinfo=UTC)
_LAST = datetime(9999, 12, 30, 23, 59, 59, 999999, tzinfo=UTC)
_NOW = datetime(2026, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
# Keys in the order that PostgreSQL brings them into, so that what comes back is the same text.
_WHOLE = {"a": [1, 0.1, -2.5e-7, True, None, "猫"], "zz": {}, "big": 2**63 - 1, "text": '"\\\n'}

# What is asked first comes first: a SmallInteger is an Integer too.
_VALUES: Final[tuple[tuple[type, Sequence[Any]], ...]] = (
    (CleanText, ("plain", "Größe 猫 🐈 e\u0301 \u2028", "'; \"\\\t\n" + "long " * 2000)),
    (UtcDateTime, (_NOW, _FIRST, _LAST)),
    (Money, (Decimal("0.1"), Decimal("123456789.012345"), Decimal(0))),
    (JSON, (_WHOLE, [], "only text")),
    (LargeBinary, (bytes(range(256)), b"", b"\0\xff" * 5000)),
    (Boolean, (True, False, True)),
    (Double, (0.1, 100.0, 33.333333333333336)),
    (SmallInteger, (0, 1, 2)),
    (BigInteger, (-1, 2**63 - 1, 0)),
    (Integer, (1, 2**31 - 1, 7)),
)
_SERIAL: Final = (1, 7, 2**40)

# Runs: one that is active and leased, one that is settled, one that is lost.
_CHECKED: Final[dict[str, Sequence[Any]]] = {
    "runs.status": ("running", "completed", "failed"),
    "runs.precedence": (1, 5, 2),
    "runs.tracking": ("active", "settled", "lost"),
    "runs.settled_at": (None, _NOW, None),
    "runs.next_check_at": (_NOW, None, None),
    "runs.source": ("start", "callback", "history"),
    "runs.ended_via": (None, "callback", "poll"),
    "run_events.source": ("start", "callback", "history"),
    "run_events.status": ("pending", "running", "completed"),
    "deliveries.outcome": ("applied", "quarantined", "waiting"),
    "deliveries.applied_at": (_NOW, None, None),
    "starts.state": ("stored", "started", "unresolved"),
    "starts.run_id": (None, "run_1", None),
    "retention.what": ("runs", "bodies", "runs"),
    # They are added to the largest number when a tracker starts.
    "run_tally_changes.runs": (1, 0, -1),
    "run_tally_changes.amount": (1, 0, -1),
    "outbox.event": ("run.settled", "run.lost", "run.cost_changed"),
    "endpoints.state": ("enabled", "disabled", "enabled"),
    "endpoints.disabled_at": (None, _NOW, None),
    "messages.event": ("run.settled", "run.lost", "run.cost_changed"),
    "messages.state": ("pending", "delivered", "failed"),
    "messages.next_attempt_at": (_NOW, None, None),
    "messages.delivered_at": (None, _NOW, None),
}


def every_value() -> Rows:
    """The rows of each table. The last has NULL wherever nothing forbids it."""
    return {table.name: [_row(table, n) for n in range(ROWS)] for table in TABLES}


def _row(table: Table, number: int) -> dict[str, Any]:
    return {column.key: _value(column, number) for column in table.c}


def _value(column: Column[Any], number: int) -> Any:
    checked = _CHECKED.get(f"{column.table.name}.{column.key}")
    if checked is not None:
        return checked[number]
    if column.identity is not None:
        return _SERIAL[number]
    if column.nullable and number == ROWS - 1:
        return None
    for kind, values in _VALUES:
        if isinstance(column.type, kind):
            return values[number]
    raise AssertionError(f"no value is known for {column.table.name}.{column.key}: {column.type!r}")


async def fill(url: str, rows: Rows) -> None:
    """Put the rows into a database that has its tables."""
    engine = migration_engine(DatabaseUrl.parse(url))
    async with engine.begin() as connection:
        for table in TABLES:
            await connection.execute(insert(table), rows[table.name])
            for column in table.c:
                if column.identity is not None and connection.dialect.name == "postgresql":
                    sequence = func.pg_get_serial_sequence(table.name, column.name)
                    await connection.execute(select(func.setval(sequence, max(_SERIAL))))
    await engine.dispose()


async def everything(url: str) -> Rows:
    """All rows of a database, in the order of their keys in Python."""
    engine = migration_engine(DatabaseUrl.parse(url))
    found: Rows = {}
    async with engine.connect() as connection:
        for table in TABLES:
            result = await connection.execute(select(table))
            found[table.name] = in_order(
                table, [{column.key: row._mapping[column] for column in table.c} for row in result]
            )
    await engine.dispose()
    return found


def in_order(table: Table, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by their key, whatever the database's collation."""
    key = [column.key for column in table.primary_key.columns]
    return sorted(rows, key=lambda row: [row[name] for name in key])
