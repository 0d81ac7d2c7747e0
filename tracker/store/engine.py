"""The database: one object that reads and writes, the same on SQLite and on PostgreSQL.

Reads go through an asynchronous engine, in transactions that cannot write. A write is a plain
function over a plain connection, run in one transaction: on PostgreSQL over asyncpg, on SQLite in
one thread of its own, so that a whole batch costs one hop between threads, and the writes of one
process never wait for a lock.
"""

import asyncio
import math
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, Final, Self, TypeVar

import orjson
from sqlalchemy import ColumnElement, Connection, Engine, Executable, Row, Table, event, select
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, NullPool

from tracker.core.errors import StoreUnavailable
from tracker.core.formatting import clean
from tracker.store.errors import (
    FOREIGN,
    StoreBusy,
    StoreClosed,
    WriteConflict,
    is_conflict,
    is_refusal,
    is_standby,
    postgres_errors,
    translate,
)
from tracker.store.postgres import connect_postgres, is_standby_connection
from tracker.store.sqlite import (
    ONE_QUERY,
    SqliteFile,
    SqliteThread,
    check_connections,
    sqlite_migration_engine,
    sqlite_read_engine,
)
from tracker.store.url import DatabaseTimes, DatabaseUrl

T = TypeVar("T")
AnyRow = Row[*tuple[Any, ...]]
Values = Mapping[str, Any] | None

ATTEMPTS: Final = 6
"""How often a transaction with a conflict is run before the database counts as unavailable."""


def insert_on(dialect: str) -> Any:
    """The `insert` of a dialect, which has `on_conflict_do_...`. Loads that dialect alone."""
    return import_module(f"sqlalchemy.dialects.{dialect}").insert


class Database:
    """One database, open. Made by `Database.open`, ended by `close` or by leaving `async with`.

    `dialect` is "sqlite" or "postgresql"; `engine` is for reads alone. `origin` distinguishes
    notices of this object from those of other processes. `refuses_writes` is whether the last write
    found the database unavailable (reads may go on: a full disk can be read), `writes_checked_at`
    when a row was last stored to see that, by `time.monotonic`.
    """

    def __init__(
        self, url: DatabaseUrl, engine: AsyncEngine, transactions: "_PostgresPool | SqliteThread"
    ) -> None:
        self.url = url
        self.dialect = url.dialect
        self.engine = engine
        self._one_query = engine.execution_options(**{ONE_QUERY: True})
        self.origin = secrets.token_hex(6)
        self._transactions = transactions
        self._foreign: tuple[type[BaseException], ...] = FOREIGN
        if self.dialect == "postgresql":
            self._foreign = postgres_errors()
        self._conflicts: tuple[type[BaseException], ...] = (WriteConflict, *self._foreign)
        self._closed = False
        self.refuses_writes = False
        self.writes_checked_at = -math.inf

    @classmethod
    async def open(
        cls, url: str, *, application_name: str = "tracker", times: DatabaseTimes | None = None
    ) -> Self:
        """Open the database at `url`; a connection is made when it is first needed.

        `url` is `sqlite:///FILE`, `postgresql://…` or `postgres://…`, with or without a driver.
        Raises `SettingsError` where it is neither.
        """
        parsed = DatabaseUrl.parse(url)
        if times is not None:
            parsed = replace(parsed, times=times)
        if parsed.dialect == "sqlite":
            file = SqliteFile(parsed.path)
            reading = sqlite_read_engine(parsed, file, **_COMMON)
            return cls(parsed, reading, SqliteThread(parsed, file, **_COMMON))
        # A pool each, so that reads leave connections for writes. `send` keeps one.
        # A write finds rows by their keys: its statements are planned once, and a plan for a small
        # table would go on to read all of it when it is large. Reads join by keys alone: for a
        # batch of many rows, PostgreSQL would rather read all starts.
        writing = _postgres_engine(parsed, application_name, connections=6, avoiding=["seqscan"])
        reading = _postgres_engine(
            parsed, application_name, connections=8, avoiding=["hashjoin", "mergejoin"]
        ).execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        return cls(parsed, reading, _PostgresPool(writing))

    @property
    def engines(self) -> list[Engine]:
        """All engines that send statements, for tracing."""
        return [self.engine.sync_engine, self._transactions.engine]

    def insert(self, table: Table) -> Any:
        """An `INSERT` into `table` of this dialect, which has `on_conflict_do_...`."""
        return insert_on(self.dialect)(table)

    def upsert(
        self,
        table: Table,
        key: Mapping[str, Any],
        values: Mapping[str, Any],
        where: ColumnElement[bool] | None = None,
    ) -> Any:
        """An `INSERT` of a row or, where there is one of this key, its update, if `where` holds."""
        new = self.insert(table).values(**key, **values)
        return new.on_conflict_do_update(index_elements=[*key], set_=values, where=where)

    async def close(self) -> None:
        """Finish the writes under way and close all connections; no other is made."""
        self._closed = True
        await self._transactions.close()
        await self.engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A connection in a transaction that cannot write; the block reads one snapshot.

        Raises `StoreUnavailable` if the database does not answer, `StoreError` for the rest.
        """
        return self._read(self.engine)

    @asynccontextmanager
    async def _read(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        async with self._guarded(), engine.connect() as connection:
            try:
                yield connection
            finally:
                if self._closed:  # its pool is gone, which closes only what it holds
                    await connection.invalidate()

    async def fetch(self, query: Executable, values: Values = None) -> Sequence[AnyRow]:
        """The rows of one query; `values` are of its parameters. Raises as `read` does."""
        async with self._read(self._one_query) as connection:
            return (await connection.execute(query, values)).all()

    async def fetchrow(self, query: Executable, values: Values = None) -> AnyRow | None:
        """The first row of one query, if any. Raises as `read` does."""
        async with self._read(self._one_query) as connection:
            return (await connection.execute(query, values)).first()

    async def fetchcol(self, query: Executable) -> list[Any]:
        """The first value of each row of one query. Raises as `read` does."""
        return [row[0] for row in await self.fetch(query)]

    async def fetchval(self, query: Executable, values: Values = None) -> Any | None:
        """The first value of the first row of one query, if any. Raises as `read` does."""
        async with self._read(self._one_query) as connection:
            return (await connection.execute(query, values)).scalar()

    async def write(self, work: Callable[[Connection], T], *, seconds: float | None = None) -> T:
        """Run `work` over a connection, in one transaction, and return its result. On PostgreSQL
        it may take `seconds`, in place of `DatabaseTimes.answer`, and each of its statements a
        second more than `DatabaseTimes.statement`.

        Whatever `work` raises rolls the transaction back. After a conflict with another transaction
        (`WriteConflict`, a deadlock) it is run again, so it must change nothing but the database.
        Raises as `read` does.
        """
        if seconds is not None and self.dialect == "postgresql":
            work = partial(_at_length, seconds, work)
        return await self._retry(partial(self._transactions.run, work), seconds)

    async def execute(self, statement: Executable, values: Values = None) -> int:
        """Execute one statement in a transaction of its own; how many rows it changed. Raises as
        `read` does."""
        return await self.write(lambda connection: connection.execute(statement, values).rowcount)

    async def execute_row(self, statement: Executable, values: Values = None) -> AnyRow | None:
        """As `execute`; the first row that the statement returns, if any."""
        return await self.write(lambda connection: connection.execute(statement, values).first())

    async def send(self, statement: str, values: tuple[Any, ...]) -> list[Sequence[Any]]:
        """Send one statement, which is a transaction by itself, and return its rows.

        It is in the driver's own form (`?` on SQLite, `$1` on PostgreSQL): SQLAlchemy's work for a
        transaction costs this process as much as storing fifty callbacks. Raises as `read` does.
        """
        if self._transactions.engine.dispatch.before_cursor_execute:  # tracing would miss it
            return await self.write(partial(_send_traced, statement, values))
        return await self._retry(partial(self._transactions.send, statement, values))

    async def _retry(self, attempt: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        try:
            async with self._guarded(seconds):
                for number in range(1, ATTEMPTS + 1):
                    try:
                        done = await attempt()
                    except self._conflicts as exc:
                        if not is_conflict(exc):
                            raise
                        conflict = exc
                    else:
                        self.refuses_writes = False
                        return done
                    await asyncio.sleep(random.uniform(0, 0.01 * number))
                raise StoreUnavailable(
                    "the database is too busy: every attempt met a conflict"
                ) from conflict
        except StoreUnavailable as error:
            self.refuses_writes = not isinstance(error, StoreBusy | StoreClosed)
            raise

    @asynccontextmanager
    async def _guarded(self, seconds: float | None = None) -> AsyncIterator[None]:
        """Limit the time, on PostgreSQL, to `seconds` or `DatabaseTimes.answer`, and raise the
        tracker's own errors in place of foreign ones.

        A task that is cancelled meanwhile ends as cancelled: if the server does not answer, closing
        the connection fails too, and that error would hide the cancellation.
        """
        if self._closed:
            raise StoreClosed("the database is closed")
        task = asyncio.current_task()
        cancelled_before = task.cancelling() if task else 0
        try:
            # On SQLite a write runs in a thread, and its waits end by themselves.
            limit = seconds or self.url.times.answer if self.dialect == "postgresql" else None
            async with asyncio.timeout(limit):
                yield
        except self._foreign as exc:
            if task and task.cancelling() > cancelled_before:
                raise asyncio.CancelledError from exc
            raise translate(exc) from exc

    async def ping(self) -> None:
        """Return if the database answers a query; raise `StoreUnavailable` if it does not."""
        try:
            async with asyncio.timeout(self.url.times.ping):
                await self.fetchval(select(1))
        except TimeoutError as exc:
            raise translate(exc) from exc


def _at_length(seconds: float, work: Callable[[Connection], T], connection: Connection) -> T:
    """`work`, each of whose statements may take so many seconds on PostgreSQL."""
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(seconds * 1000)}")
    return work(connection)


def _send_traced(
    statement: str, values: tuple[Any, ...], connection: Connection
) -> list[Sequence[Any]]:
    result = connection.exec_driver_sql(statement, values)
    return list(result.all()) if result.returns_rows else []


class _PostgresPool:
    """Runs write transactions over a pool of asyncpg connections."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.engine = engine.sync_engine
        self._bare = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._closed = False
        self._kept: list[tuple[AsyncConnection, Any]] = []
        """Connections for `send`, as SQLAlchemy and as asyncpg have them: checking one out of the
        pool and back in costs as much as the statement."""

    async def run(self, work: Callable[[Connection], T]) -> T:
        async with self._engine.begin() as connection:
            return await connection.run_sync(work)

    async def send(self, statement: str, values: tuple[Any, ...]) -> list[Sequence[Any]]:
        connection, driver = await self._take()
        try:
            rows: list[Sequence[Any]] = await driver.fetch(statement, *values)
            is_usable = True
        except BaseException as error:
            # Otherwise its state is unknown, and whether its server takes any writes.
            is_usable = is_refusal(error)
            raise
        finally:
            if is_usable and not self._closed:
                self._kept.append((connection, driver))
            else:
                await _discard(connection)
        return rows

    async def _take(self) -> tuple[AsyncConnection, Any]:
        while self._kept:
            connection, driver = self._kept.pop()
            if not driver.is_closed():
                return connection, driver
            await _discard(connection)
        connection = await self._bare.connect()
        return connection, (await connection.get_raw_connection()).driver_connection

    async def close(self) -> None:
        self._closed = True
        while self._kept:
            connection, _ = self._kept.pop()
            await connection.close()
        await self._engine.dispose()


async def _discard(connection: AsyncConnection) -> None:
    """Close a connection instead of returning it to its pool."""
    await connection.invalidate()
    await connection.close()


# JSON that both databases take.

_INT64: Final = 2**63


def dump_json(value: Any) -> str:
    """`value` as JSON text that both engines take.

    Numbers that JSON or the databases cannot hold become floats or null. Raises `ValueError` for
    values that are no JSON, or are nested too deep.
    """
    with suppress(TypeError):  # orjson refuses surrogates and integers of more than 64 bits
        text = orjson.dumps(value).decode()
        if "\\u0000" not in text:
            return text
    try:
        return orjson.dumps(_clean_value(value)).decode()
    except (TypeError, RecursionError) as exc:
        raise ValueError(f"this cannot be stored as JSON: {exc}") from exc


def _clean_value(value: Any) -> Any:
    match value:
        case str():
            return clean(value)
        case bool():
            return value
        case int() if not -_INT64 <= value < _INT64:
            try:
                return float(value)
            except OverflowError:
                return None
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {clean(str(key)): _clean_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_clean_value(item) for item in value]
    return value


_COMMON: Final[dict[str, Any]] = {
    # Rows hold prompts and links, which do not belong into a log.
    "hide_parameters": True,
    "json_serializer": dump_json,
    "json_deserializer": orjson.loads,
}


def migration_engine(url: DatabaseUrl) -> AsyncEngine:
    """An engine for migrations: without time-outs on this side, on SQLite without foreign keys."""
    if url.dialect == "postgresql":
        connect = partial(connect_postgres, url, "tracker-migrations", is_limited=False)
        return create_async_engine(
            "postgresql+asyncpg://", async_creator=connect, poolclass=NullPool, **_COMMON
        )
    return sqlite_migration_engine(url, **_COMMON)


def _postgres_engine(
    url: DatabaseUrl, application_name: str, *, connections: int, avoiding: Sequence[str]
) -> AsyncEngine:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=partial(connect_postgres, url, application_name, avoiding=avoiding),
        poolclass=_OpenFirstPool,
        pool_size=connections // 2,
        max_overflow=connections - connections // 2,
        pool_timeout=url.times.statement,
        pool_use_lifo=True,
        **_COMMON,
    )

    # asyncpg notices when the server closes a connection. Asking it costs nothing, and SQLAlchemy's
    # own pre-ping costs three round trips. One to a standby that was not asked for is used once,
    # since its data is older, and there may be a primary again.
    def is_usable(adapter: Any, record: Any) -> bool:
        connection = adapter.driver_connection
        was_used = record.info.setdefault("was_used", False)
        record.info["was_used"] = True
        is_stale = was_used and not url.wanted_server and is_standby_connection(connection)
        return not (connection.is_closed() or is_stale)

    check_connections(engine.sync_engine, is_usable, "the server closes its connections")

    @event.listens_for(engine.sync_engine, "handle_error")
    def on_error(context: ExceptionContext) -> None:
        # All are replaced if the server takes no writes, as after a failover the same address leads
        # to another. If one is lost, SQLAlchemy would replace open ones too.
        takes_no_writes = is_standby(context.original_exception)
        context.is_disconnect = context.is_disconnect or takes_no_writes
        context.invalidate_pool_on_disconnect = takes_no_writes

    return engine


class _OpenFirstPool(AsyncAdaptedQueuePool):
    """Hands out open connections before it makes one in the place of one that was lost.

    While the server accepts no others (all that it has are in use, the role's password was
    changed), those that are open are used.
    """

    # SQLAlchemy names the pool's log by it, and what is logged under `tracker` is shown.
    __module__ = AsyncAdaptedQueuePool.__module__

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        idle = []
        if record.dbapi_connection is None and not self._pool.full():
            idle = [self._pool.get(block=False) for _ in range(self._pool.qsize())]
        for each in (record, *reversed(idle)):
            super()._do_return_conn(each)
