"""Carry everything over from one database to another, from one engine to the other too.

All rows are read in one transaction, which sees one moment, and written in one, which is committed
after the target was counted and compared with the source. So the target is complete or empty: what
broke off, however it did, left nothing behind, and is done by starting it again.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Protocol

from sqlalchemy import Dialect, Row, Select, Table, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.core.errors import SchemaOutdated, SettingsError, StoreError
from tracker.store import migrate
from tracker.store.engine import Database, migration_engine
from tracker.store.errors import FOREIGN, translate
from tracker.store.schema import metadata, sessions
from tracker.store.url import DatabaseUrl

# The database that a copy is written to: one transaction that nobody else gets a row into.


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


BATCH: Final = 1000
"""So many rows are in memory at a time, raw callbacks with them."""
SAMPLES: Final = 100
"""So many rows of each table are compared column by column, spread over all of it."""

TABLES: Final[Sequence[Table]] = [one for one in metadata.sorted_tables if one is not sessions]
"""Those that others refer to first. Sign-ins stay behind: a backup would bring ended ones back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far a copy has come: so many `rows` of a table's `total` are written."""

    table: str
    rows: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What was carried over: the rows of each table, and how many of them were `compared` one by
    one. `migrated` tells that the target had no tables before."""

    revision: str
    migrated: bool
    tables: dict[str, int]
    compared: int


async def copy(
    source: str, target: str, *, progress: Callable[[Step], None] = lambda _: None
) -> Copied:
    """Copy every row of the database at `source` to the empty one at `target`.

    Both are at this version's newest migration; a target without any tables is given them.
    `progress` is called after each batch of rows. What is written to the source meanwhile is not in
    the copy.

    Raises `SettingsError` for what is no URL or twice the same, `StoreError`, saying what to do,
    where one of them is not fit or the copy is not what the source is, `StoreUnavailable` where one
    does not answer. Then, and where it is cancelled, the target is as empty as it was.
    """
    origin, destination = DatabaseUrl.parse(source), DatabaseUrl.parse(target, "the target")
    if _place(origin) == _place(destination):
        raise SettingsError("a database cannot be copied to itself: name another target")
    with _naming(origin):
        await _check_source(source, origin)
    with _naming(destination):
        migrated = await _make_ready(target)
    async with AsyncExitStack() as stack:
        with _naming(origin):
            reading = await stack.enter_async_context(_snapshot(source))
        with _naming(destination):
            writing = await stack.enter_async_context(opened_target(destination))
            await _check_empty(writing)
        copying = _Copying(origin, reading, destination, writing, progress)
        tables = {table.name: await copying.copy(table) for table in TABLES}
        with _naming(destination):
            await writing.finish(TABLES)
    return Copied(
        revision=migrate.head(), migrated=migrated, tables=tables, compared=copying.compared
    )


def _place(url: DatabaseUrl) -> str:
    return str(Path(url.path).resolve()) if url.path else url.dsn


@contextmanager
def _naming(*what: object) -> Iterator[None]:
    """Errors say which of the two databases they are about."""
    try:
        yield
    except FOREIGN as exc:
        fault = translate(exc)
        raise type(fault)(": ".join(map(str, (*what, fault)))) from exc
    except StoreError as exc:
        raise type(exc)(": ".join(map(str, (*what, exc)))) from exc


async def _check_source(source: str, url: DatabaseUrl) -> None:
    if url.missing:
        raise StoreError("there is no such file, so there is nothing to copy")
    found = await migrate.current(source)
    if found is None:
        raise StoreError("there are no tables of the tracker, so there is nothing to copy")
    _check_revision(found)


async def _make_ready(target: str) -> bool:
    """Whether the target had to be given its tables."""
    found = await migrate.current(target)
    if found is None:
        await migrate.upgrade(target)
        return True
    _check_revision(found)
    return False


def _check_revision(found: str) -> None:
    """Between two revisions, nobody knows what a row of one is in the other."""
    if found == migrate.head():
        return
    needed = f"it is at revision {found}, and this version copies {migrate.head()}"
    if migrate.is_known(found):
        raise SchemaOutdated(f"{needed}: run `tracker db upgrade` with it as TRACKER_DATABASE_URL")
    raise StoreError(f"{needed}: copy with the version that made it")


@asynccontextmanager
async def _snapshot(source: str) -> AsyncIterator[AsyncConnection]:
    """A connection to the source on which everything is of one moment, however long it takes."""
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
                await without_time_outs(connection)
                yield connection
        finally:
            await engine.dispose()


async def _check_empty(target: Target) -> None:
    for table in TABLES:
        if (await target.connection.execute(select(table).limit(1))).first() is not None:
            raise StoreError(
                f"it is not empty ({table.name} has rows), and was not touched: name an empty one"
            )


class _Copying:
    """Copies tables, one after the other; `compared` counts the rows that were looked at singly."""

    def __init__(
        self,
        origin: DatabaseUrl,
        source: AsyncConnection,
        destination: DatabaseUrl,
        target: Target,
        progress: Callable[[Step], None],
    ) -> None:
        self.compared = 0
        self._origin = origin
        self._source = source
        self._destination = destination
        self._target = target
        self._progress = progress

    async def copy(self, table: Table) -> int:
        """Copy a table and return how many rows it has. Raises `StoreError` where the target does
        not hold then what the source does."""
        with _naming(self._origin, table.name):
            expected = tuple((await self._source.execute(_counted(table))).one())
        total = expected[0]
        done = 0
        samples: list[Row[Any]] = []
        between = max(1, total // SAMPLES)
        async with aclosing(self._batches(table)) as batches:
            async for batch in batches:
                with _naming(self._destination, table.name):
                    await self._target.put(table, batch)
                samples += batch[-done % between :: between]
                done += len(batch)
                self._progress(Step(table=table.name, rows=done, total=total))
        with _naming(self._destination, table.name):
            await self._compare(table, expected, samples)
        self.compared += len(samples)
        return done

    async def _batches(self, table: Table) -> AsyncGenerator[Sequence[Row[Any]]]:
        rows = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=BATCH)
        with _naming(self._origin, table.name):
            async with self._source.stream(rows) as result:
                async for batch in result.partitions():
                    yield batch

    async def _compare(
        self, table: Table, expected: tuple[int, ...], samples: Sequence[Row[Any]]
    ) -> None:
        connection = self._target.connection
        counted = tuple((await connection.execute(_counted(table))).one())
        if counted != expected:
            raise StoreError(f"the copy has {counted} rows and values, the source {expected}")
        for row in samples:
            key = (column == row._mapping[column] for column in table.primary_key.columns)
            found = (await connection.execute(select(table).where(*key))).one_or_none()
            for column in table.c:
                if found is None or not _same(found._mapping[column], row._mapping[column]):
                    raise StoreError(f"{column.name} of a row is not what the source has")


def _counted(table: Table) -> Select[*tuple[int, ...]]:
    """How many rows a table has, and how many values each of its columns."""
    return select(func.count(), *(func.count(column) for column in table.c)).select_from(table)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same as far as both engines can hold it: SQLite's amounts are
    doubles."""
    if isinstance(one, Decimal) and isinstance(other, Decimal):
        return float(one) == float(other)
    return bool(one == other)
