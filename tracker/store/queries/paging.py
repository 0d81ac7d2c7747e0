"""Pages of lists, and their opaque cursors: the key of the last row of the page before.

Pages are read by key, not by offset, so that rows which come in meanwhile hide or repeat none.
"""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar

import orjson
from sqlalchemy import (
    ColumnElement,
    Double,
    Integer,
    Interval,
    Row,
    Select,
    Table,
    literal,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.core.errors import FieldFault, InvalidRequest
from tracker.store.engine import dump_json
from tracker.store.schema import UtcDateTime

T = TypeVar("T")


def matching(table: Table, **values: Any) -> list[ColumnElement[bool]]:
    """The conditions that these columns have these values; none for `None`."""
    return [table.c[name] == value for name, value in values.items() if value is not None]


def unindexed(column: ColumnElement[str]) -> ColumnElement[str]:
    """The text column as an expression, so that no index of it is used.

    SQLite knows nothing of how many rows have a value, and prefers such an index to a short one.
    """
    return column + ""


def between(
    at: ColumnElement[Any], since: datetime | None, until: datetime | None = None
) -> list[ColumnElement[bool]]:
    """The conditions that a time is not before `since`, and before `until`; none for `None`."""
    bounds = [] if since is None else [at >= since]
    return bounds if until is None else [*bounds, at < until]


def encode(first: str, second: str) -> str:
    """The cursor of a key; URL-safe."""
    text = dump_json([first, second])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode(cursor: str) -> tuple[str, str]:
    """The key of a cursor. Raises `InvalidRequest` for anything that `encode` did not return."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        first, second = orjson.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, TypeError) as exc:
        raise refusal() from exc
    if not isinstance(first, str) or not isinstance(second, str):
        raise refusal()
    return first, second


def cursor_at(value: datetime | timedelta | Decimal | float, last: str) -> str:
    """The cursor of a list sorted by a value and an id."""
    if isinstance(value, datetime):
        return encode(value.isoformat(), last)
    number = value // timedelta(microseconds=1) if isinstance(value, timedelta) else value
    return encode(str(number), last)


async def newest_first(
    connection: AsyncConnection,
    statement: Select[Any],
    key: Sequence[ColumnElement[Any]],
    *,
    cursor: str | None,
    limit: int,
) -> tuple[Sequence[Row[Any]], str | None]:
    """A page of rows, sorted by `key` (the columns of a time and an id) in descending order.

    Returns the rows and the cursor of the next page, if any. Raises `InvalidRequest` for an invalid
    cursor.
    """
    ordered = statement.where(*after(key, cursor)).order_by(*(each.desc() for each in key))
    rows = (await connection.execute(ordered.limit(limit + 1))).all()
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]._mapping
    return rows[:limit], cursor_at(last[key[0].name], str(last[key[1].name]))


def after(key: Sequence[ColumnElement[Any]], cursor: str | None) -> list[ColumnElement[bool]]:
    """The condition for rows after the cursor, in descending order; none without a cursor."""
    if cursor is None:
        return []
    shown, text = decode(cursor)
    try:
        value = _from_text(shown, key[0])
        last = int(text) if isinstance(key[1].type, Integer) else text
    except (ValueError, ArithmeticError) as exc:
        raise refusal() from exc
    if isinstance(last, int) and abs(last) >= 2**63:
        raise refusal()
    # Typed literals: the driver would bind a bare datetime in a format of its own.
    first = literal(value, key[0].type)
    later = tuple_(*key) < tuple_(first, literal(last, key[1].type))
    # SQLite enters an index of an expression by a plain comparison alone.
    return [key[0] <= first, later] if isinstance(value, float) else [later]


def _from_text(text: str, column: ColumnElement[Any]) -> datetime | timedelta | Decimal | float:
    """A value in a cursor. Raises `ValueError` or `ArithmeticError` for another type."""
    kind = column.type
    if isinstance(kind, Interval):
        return timedelta(microseconds=int(text))
    if isinstance(kind, UtcDateTime):
        return datetime.fromisoformat(text).astimezone(UTC)
    number = Decimal(text)
    if not number.is_finite():
        raise ValueError(text)
    return float(number) if isinstance(kind, Double) else number


def refusal() -> InvalidRequest:
    """The error for an invalid cursor."""
    fault = FieldFault("cursor", "unknown; omit it to read from the newest entry")
    return InvalidRequest("the cursor is not valid", [fault])
