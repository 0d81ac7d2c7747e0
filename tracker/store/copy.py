"""Copy all rows from one database to another, of the same kind or the other.

All rows are read in one transaction, which sees one snapshot, and written in one, which is
committed after the target was counted and compared with the source. So the target is complete or
empty, and a copy that was interrupted is simply started again.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Dialect,
    Row,
    Select,
    Table,
    func,
    insert,
    inspect,
    literal,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.core.errors import SchemaOutdated, SettingsError, StoreError
from tracker.store import migrate
from tracker.store.engine import Database, migration_engine
from tracker.store.errors import FOREIGN, postgres_errors, translate
from tracker.store.schema import metadata, sessions
from tracker.store.url import DatabaseUrl

ROWS: Final = 1000
"""Rows in memory at a time, with the bodies of callbacks."""
SAMPLES: Final = 100
"""How many rows of each table are compared column by column, spread over all of it."""
CACHE_KB: Final = 32 * 1024
"""SQLite's cache: keys come in no order, so that each row touches pages all over its indexes."""

TABLES: Final[Sequence[Table]] = [one for one in metadata.sorted_tables if one is not sessions]
"""Referenced tables first. Sign-ins are left out, so that a copy does not revive ended ones."""

_TIME_OUTS: Final = (
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",  # from PostgreSQL 17 on
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The progress of a copy: `rows` of a table's `total` are written."""

    table: str
    rows: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """The result: the number of rows of each table, and of those `compared` column by column.

    `migrated` is true if the target lacked tables before.
    """

    revision: str
    migrated: bool
    tables: dict[str, int]
    compared: int


async def copy(
    source: str,
    target: str,
    *,
    names: tuple[str, str] = ("the source", "the target"),
    progress: Callable[[Step], None] = lambda _: None,
    at_a_time: int = ROWS,
) -> Copied:
    """Copy every row of the database at `source` to the empty one at `target`.

    Both are at this version's newest migration; a target without tables is migrated. `names` are
    what errors call the two. `progress` is called after each batch of rows, of which `at_a_time`
    are in memory. What is written to the source meanwhile is not copied.

    Raises `SettingsError` for an invalid URL or the same one twice, `StoreError`, with what to do,
    if one of the databases is unsuitable or the copy differs from the source, `StoreUnavailable` if
    one does not answer. After an error or a cancellation the target is as empty as before.
    """
    origin, destination = map(DatabaseUrl.parse, (source, target), names)
    if _place(origin) == _place(destination):
        raise SettingsError("a database cannot be copied to itself: name another target")
    from_, to = (f"{name} {url}" for name, url in zip(names, (origin, destination), strict=True))
    with _naming(from_):
        if await _revision(source) is None:
            lacking = "is no such file" if origin.missing else "are no tables of the tracker"
            raise StoreError(f"there {lacking}, so there is nothing to copy")
    with _naming(to):
        if migrated := await _lacks_tables(target):
            await migrate.upgrade(target)
    async with AsyncExitStack() as stack:
        with _naming(from_):
            reading = await stack.enter_async_context(_snapshot(source))
        with _naming(to):
            writing = await stack.enter_async_context(_open_target(destination))
            await _check_empty(writing.connection)
        compared = 0
        tables: dict[str, int] = {}
        for table in TABLES:
            with _naming(from_, table.name):
                expected = await _counts(reading, table)
            total, done = expected[0], 0
            samples: list[Row[Any]] = []
            between = max(1, total // SAMPLES)
            async with aclosing(_batches(reading, table, from_, at_a_time)) as batches:
                async for batch in batches:
                    with _naming(to, table.name):
                        await writing.write(table, batch)
                    samples += batch[-done % between :: between]
                    done += len(batch)
                    progress(Step(table=table.name, rows=done, total=total))
            with _naming(to, table.name):
                await _compare(writing.connection, table, expected, samples)
            tables[table.name] = done
            compared += len(samples)
        with _naming(to):
            await writing.commit()
    return Copied(revision=migrate.head(), migrated=migrated, tables=tables, compared=compared)


def _place(url: DatabaseUrl) -> str:
    return str(Path(url.path).resolve()) if url.path else url.dsn


@contextmanager
def _naming(*what: str) -> Iterator[None]:
    """Errors name the database that they are about."""
    try:
        yield
    except (*FOREIGN, StoreError) as exc:
        error = exc if isinstance(exc, StoreError) else translate(exc)
        raise type(error)(": ".join((*what, str(error)))) from exc


async def _revision(url: str) -> str | None:
    """This version's newest revision, or `None` if there are no tables. Raises `StoreError` for
    any other."""
    found = await migrate.current(url)
    if found in (None, migrate.head()):
        return found
    needed = f"it is at revision {found}, and this version copies {migrate.head()}"
    if migrate.is_known(found):
        raise SchemaOutdated(f"{needed}: run `tracker db upgrade` with it as TRACKER_DATABASE_URL")
    raise StoreError(f"{needed}: copy with the version that made it")


async def _lacks_tables(target: str) -> bool:
    """Whether the target has to be migrated: there are no tables, or only some and no rows, as
    where a copy was killed while it migrated. Raises as `_revision` does."""
    try:
        return await _revision(target) is None
    except SchemaOutdated:
        if await migrate.connected(target, _has_rows):
            raise
        return True


def _has_rows(connection: Connection) -> bool:
    there = inspect(connection).get_table_names()
    tables = (one for one in metadata.sorted_tables if one.name in there)
    first = (select(literal(1)).select_from(one).limit(1) for one in tables)
    return any(connection.scalar(row) is not None for row in first)


@asynccontextmanager
async def _snapshot(source: str) -> AsyncIterator[AsyncConnection]:
    """A connection to one snapshot of the source, for any length of time."""
    async with await Database.open(source) as db:
        if db.dialect == "sqlite":
            async with db.read() as connection:
                yield connection
            return
        engine = migration_engine(db.url).execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
        try:
            async with engine.connect() as connection:
                await _disable_time_outs(connection)
                yield connection
        finally:
            await engine.dispose()


async def _disable_time_outs(connection: AsyncConnection) -> None:
    settings = text("SELECT set_config(name, '0', true) FROM pg_settings WHERE name = ANY(:names)")
    await connection.execute(settings, {"names": list(_TIME_OUTS)})


async def _batches(
    source: AsyncConnection, table: Table, name: str, size: int
) -> AsyncGenerator[Sequence[Row[Any]]]:
    rows = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=size)
    with _naming(name, table.name):
        async with source.stream(rows) as result:
            async for batch in result.partitions():
                yield batch


async def _check_empty(target: AsyncConnection) -> None:
    for table in TABLES:
        if (await target.execute(select(table).limit(1))).first() is not None:
            raise StoreError(
                f"it is not empty ({table.name} has rows), and was not touched: name an empty one"
            )


async def _compare(
    target: AsyncConnection, table: Table, expected: tuple[int, ...], samples: Sequence[Row[Any]]
) -> None:
    """Raise `StoreError` unless the target has as many rows and values, and the same samples."""
    found = await _counts(target, table)
    if found != expected:
        raise StoreError(f"the copy has {found} rows and values, the source {expected}")
    for row in samples:
        key = (column == row._mapping[column] for column in table.primary_key.columns)
        copied = (await target.execute(select(table).where(*key))).one_or_none()
        for column in table.c:
            if copied is None or not _same(copied._mapping[column], row._mapping[column]):
                raise StoreError(f"{column.name} of a row is not what the source has")


async def _counts(connection: AsyncConnection, table: Table) -> tuple[int, ...]:
    """The number of rows, and of values in each column."""
    counts: Select[*tuple[int, ...]] = select(
        func.count(), *(func.count(column) for column in table.c)
    ).select_from(table)
    return tuple((await connection.execute(counts)).one())


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, as far as SQLite's doubles can hold them."""
    if isinstance(one, Decimal) and isinstance(other, Decimal):
        return float(one) == float(other)
    return bool(one == other)


class _PostgresTarget:
    """Writes by COPY, in PostgreSQL's binary form."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection

    async def begin(self) -> None:
        """Others can read but not write: their rows would be mixed with the copied ones."""
        await _disable_time_outs(self.connection)
        names = ", ".join(f'"{table.name}"' for table in metadata.sorted_tables)
        await self.connection.execute(text(f"LOCK TABLE {names} IN SHARE ROW EXCLUSIVE MODE"))
        self._driver: Any = (await self.connection.get_raw_connection()).driver_connection

    async def write(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        """Write rows with every column of `table`, in its order."""
        try:
            await self._driver.copy_records_to_table(
                table.name,
                columns=[column.name for column in table.c],
                records=_records(table, rows, self.connection.dialect),
            )
        except postgres_errors() as exc:
            raise translate(exc) from exc

    async def commit(self) -> None:
        """Commit, after setting sequences to the highest number and updating statistics."""
        for table in TABLES:
            for column in table.c:
                if column.identity is not None:
                    sequence = func.pg_get_serial_sequence(table.name, column.name)
                    highest = select(func.setval(sequence, func.max(column)))
                    await self.connection.execute(highest.having(func.max(column).is_not(None)))
            await self.connection.execute(text(f'ANALYZE "{table.name}"'))
        await self.connection.commit()


class _SqliteTarget:
    """Writes by prepared INSERTs, into a file that nothing else has open.

    It uses a rollback journal, which is small for an empty file; a write-ahead log would be as
    large as the file itself.
    """

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection

    async def begin(self) -> None:
        """Set what can be set only before a transaction; check foreign keys as the tracker does."""
        await self._set("journal_mode=DELETE", f"cache_size=-{CACHE_KB}", "foreign_keys=ON")

    async def write(self, table: Table, rows: Sequence[Row[Any]]) -> None:
        dialect = self.connection.dialect
        statement = str(insert(table).compile(dialect=dialect))
        await self.connection.exec_driver_sql(statement, _records(table, rows, dialect))

    async def commit(self) -> None:
        """Commit; numbers continue after the highest by themselves."""
        await self.connection.commit()
        await self._set("journal_mode=WAL")

    async def _set(self, *pragmas: str) -> None:
        driver: Any = (await self.connection.get_raw_connection()).driver_connection
        for pragma in pragmas:
            async with driver.execute(f"PRAGMA {pragma}"):
                pass


@asynccontextmanager
async def _open_target(url: DatabaseUrl) -> AsyncIterator[_PostgresTarget | _SqliteTarget]:
    """A target that stays empty if the block ends before `commit`."""
    engine = migration_engine(url)
    try:
        async with engine.connect() as connection:
            kind = _PostgresTarget if url.dialect == "postgresql" else _SqliteTarget
            target = kind(connection)
            await target.begin()
            yield target
    finally:
        await engine.dispose()


def _records(table: Table, rows: Sequence[Row[Any]], dialect: Dialect) -> list[tuple[Any, ...]]:
    """Rows of the driver's own types, as SQLAlchemy would pass them."""
    columns = []
    for column, values in zip(table.c, zip(*rows, strict=True), strict=True):
        process = column.type.dialect_impl(dialect).bind_processor(dialect)
        columns.append(values if process is None else map(process, values))
    return list(zip(*columns, strict=True))
