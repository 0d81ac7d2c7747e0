"""Column types that mean the same on both engines.

What PostgreSQL has and SQLite lacks (times with a zone, exact decimals, JSON) is kept on SQLite in
the form that ad-hoc SQL reads best: times as text that sorts, money as a number that sums.
"""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Double, Integer, Numeric, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator, TypeEngine

from tracker.store.text import clean


class CleanText(TypeDecorator[str]):
    """Text of any length; what a database cannot hold is replaced on the way in."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Replace NUL and lone surrogates by U+FFFD."""
        return None if value is None else clean(value)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware moment in UTC.

    `timestamptz` on PostgreSQL; on SQLite text, `YYYY-MM-DD HH:MM:SS.ffffff`, which sorts by time.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Bring a moment into UTC; refuse one that does not say where it is."""
        if value is None or dialect.name == "postgresql":
            return value
        if value.tzinfo is None:
            raise ValueError(f"a moment without a zone cannot be stored: {value}")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Say that it is UTC."""
        if value is None or dialect.name == "postgresql":
            return value
        return value.replace(tzinfo=UTC)


class Money(TypeDecorator[Decimal]):
    """USD. Exact on PostgreSQL; on SQLite a double, which keeps 15 digits and can be summed."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """A number that SQLite can add up."""
        return dialect.type_descriptor(Double() if dialect.name == "sqlite" else Numeric())

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Decimal | float | None:
        """Hand SQLite the nearest double."""
        return float(value) if value is not None and dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """Read a double as the shortest decimal that it can stand for."""
        return Decimal(repr(value)) if isinstance(value, float) else value


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
"""A JSON value; `None` is SQL's NULL. Text on SQLite, `jsonb` on PostgreSQL."""

SerialId = BigInteger().with_variant(Integer(), "sqlite")
"""A number that the database counts up. SQLite counts only what is called plain INTEGER."""
