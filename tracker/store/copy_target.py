"""The database that a copy is written to: one transaction that nobody else gets a row into."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from sqlalchemy import Dialect, Row, Table, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.store.engine import migration_engine
from tracker.store.faults import FOREIGN, translate
from tracker.store.tables import metadata
from tracker.store.url import DatabaseUrl

_TIME_OUTS: Final = (
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",  # from PostgreSQL 17 on
)

CACHE_KB: Final = 32 * 1024
"""What SQLite keeps in memory of the file: keys come in no order, so that every row touches pages
all over its indexes."""


class Target(Protocol):
    """Where rows go. `connection` reads what has been written so far."""

    connection: AsyncConnection

    async def put(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        """Write rows that hold every column of `table`, in its order."""

    async def finish(self, tables: Iterable[Table]) -> None:
        """Commit, when all rows are there."""


@asynccontextmanager
async def opened_target(url: DatabaseUrl) -> AsyncIterator[Target]:
    """A target whose rows were never there where the block ends before they are finished."""
    engine = migration_engine(url)
    try:
        async with engine.connect() as connection:
            kind = _Postgres if url.dialect == "postgresql" else _Sqlite
            target = kind(connection)
            await target.begin()
            yield target
    finally:
        await engine.dispose()


async def without_time_outs(connection: AsyncConnection) -> None:
    """Let the transaction of a PostgreSQL connection take as long as it takes."""
    settings = text("SELECT set_config(name, '0', true) FROM pg_settings WHERE name = ANY(:names)")
    await connection.execute(settings, {"names": list(_TIME_OUTS)})


class _Postgres:
    """COPY, in PostgreSQL's binary form."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection

    async def begin(self) -> None:
        """Keep all others from writing, who may go on reading: their rows could be ours."""
        await without_time_outs(self.connection)
        names = ", ".join(f'"{table.name}"' for table in metadata.sorted_tables)
        await self.connection.execute(text(f"LOCK TABLE {names} IN SHARE ROW EXCLUSIVE MODE"))
        self._driver: Any = (await self.connection.get_raw_connection()).driver_connection

    async def put(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        from asyncpg import InterfaceError, PostgresError  # noqa: PLC0415

        try:
            await self._driver.copy_records_to_table(
                table.name,
                columns=[column.name for column in table.c],
                records=_records(table, rows, self.connection.dialect),
            )
        except (PostgresError, InterfaceError, *FOREIGN) as exc:
            raise translate(exc) from exc

    async def finish(self, tables: Iterable[Table]) -> None:
        """Commit: numbers go on after the highest, and the planner knows what there is."""
        for table in tables:
            for column in table.c:
                if column.identity is not None:
                    sequence = func.pg_get_serial_sequence(table.name, column.name)
                    highest = select(func.setval(sequence, func.max(column)))
                    await self.connection.execute(highest.having(func.max(column).is_not(None)))
            await self.connection.execute(text(f'ANALYZE "{table.name}"'))
        await self.connection.commit()


class _Sqlite:
    """Prepared INSERTs, into a file that nobody else has open.

    A transaction of any size leaves the write-ahead log alone: it would be as large as the file
    itself, where the rollback journal of an empty file is small.
    """

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection

    async def begin(self) -> None:
        """Set what can be set before a transaction only; check keys as a tracker does."""
        await self._set("journal_mode=DELETE", f"cache_size=-{CACHE_KB}", "foreign_keys=ON")

    async def put(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        dialect = self.connection.dialect
        statement = str(insert(table).compile(dialect=dialect))
        await self.connection.exec_driver_sql(statement, _records(table, rows, dialect))

    async def finish(self, tables: Iterable[Table]) -> None:
        """Commit: numbers go on after the highest by themselves."""
        await self.connection.commit()
        await self._set("journal_mode=WAL")

    async def _set(self, *pragmas: str) -> None:
        driver: Any = (await self.connection.get_raw_connection()).driver_connection
        for pragma in pragmas:
            async with driver.execute(f"PRAGMA {pragma}"):
                pass


def _records(table: Table, rows: Sequence[Row[Any]], dialect: Dialect) -> list[tuple[Any, ...]]:
    """Rows of what the driver takes, as if SQLAlchemy had handed them over."""
    columns = []
    for column, values in zip(table.c, zip(*rows, strict=True), strict=True):
        process = column.type.dialect_impl(dialect).bind_processor(dialect)
        columns.append(values if process is None else map(process, values))
    return list(zip(*columns, strict=True))
