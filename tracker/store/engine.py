"""The database: one object that reads and writes, the same on SQLite and on PostgreSQL.

Reads go through an asynchronous engine, in transactions that cannot write. A write is a plain
function over a plain connection, run in one transaction: on PostgreSQL over asyncpg, on SQLite in
one thread of its own, so that a whole batch costs one hop between threads, and the writers of one
process never wait for a lock.
"""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib import import_module
from typing import Any, Final, Self, TypeVar

from sqlalchemy import Connection, Engine, Table, event, select
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tracker.core.errors import StoreUnavailable
from tracker.store.errors import (
    FOREIGN,
    WriteConflict,
    driver_errors,
    is_conflict,
    is_refusal,
    is_standby,
    translate,
)
from tracker.store.postgres import STATEMENT_SECONDS, connect_postgres
from tracker.store.sqlite import SqliteWriter, sqlite_migrations, sqlite_readers, use_only
from tracker.store.text import dump_json, load_json
from tracker.store.url import DatabaseUrl

T = TypeVar("T")

ANSWER_SECONDS: Final = 6.0
"""How long a read or a write may take on PostgreSQL in all, the wait for a connection included. It
takes two seconds more to let go of a connection on which the server says nothing."""
PING_SECONDS: Final = 3.0
ATTEMPTS: Final = 6
"""How often a transaction that lost a race is done before it counts as unavailable."""


def insert_on(dialect: str) -> Any:
    """The `insert` of a dialect, which has `on_conflict_do_...`. Loads that dialect alone."""
    return import_module(f"sqlalchemy.dialects.{dialect}").insert


class Database:
    """One database, open. Made by `Database.open`, ended by `close` or by leaving `async with`.

    `dialect` is "sqlite" or "postgresql"; `engine` is for reads alone, `url` for those who need a
    connection of another kind. `origin` tells this object's notices from those of other processes.
    """

    def __init__(
        self, url: DatabaseUrl, engine: AsyncEngine, writer: "_PostgresWriter | SqliteWriter"
    ) -> None:
        self.url = url
        self.dialect = url.dialect
        self.engine = engine
        self.origin = secrets.token_hex(6)
        self._writer = writer
        self._closed = False

    @classmethod
    async def open(cls, url: str, *, application_name: str = "tracker") -> Self:
        """Make ready to use the database at `url`; a connection is made only when it is needed.

        `url` is `sqlite:///FILE`, `postgresql://…` or `postgres://…`, with or without a driver.
        Raises `SettingsError` where it is neither.
        """
        parsed = DatabaseUrl.parse(url)
        if parsed.dialect == "sqlite":
            return cls(parsed, sqlite_readers(parsed, **_COMMON), SqliteWriter(parsed, **_COMMON))
        # A pool each: however many read, who writes finds a connection. One is kept for `send`.
        writing = _postgres_engine(parsed, application_name, connections=6, by_key=True)
        _leave_standbys(writing.sync_engine)
        reading = _postgres_engine(parsed, application_name, connections=8).execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
        return cls(parsed, reading, _PostgresWriter(writing))

    @property
    def engines(self) -> list[Engine]:
        """All engines that send statements, for whoever watches them."""
        return [self.engine.sync_engine, self._writer.engine]

    def insert(self, table: Table) -> Any:
        """An `INSERT` into `table` of this dialect, which has `on_conflict_do_...`."""
        return insert_on(self.dialect)(table)

    async def close(self) -> None:
        """Let what is being written finish, and close all connections; no other is made."""
        self._closed = True
        await self._writer.close()
        await self.engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Database {self.url}>"

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction that cannot write, for as long as the block lasts.

        All that is read within the block is of one moment.
        Raises `StoreUnavailable` where the database does not answer, `StoreError` for the rest.
        """
        self._refuse_closed()
        with _own_errors(FOREIGN):
            async with self._in_time(), self.engine.connect() as connection:
                yield connection

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` over a connection, in one transaction, and return what it returns.

        Whatever `work` raises rolls the transaction back. It is run again where another transaction
        came in between (`WriteConflict`, a deadlock), so it must not change anything but the
        database. Raises as `read` does.
        """
        return await self._until_done(FOREIGN, lambda: self._writer.run(work))

    async def send(self, statement: str, values: tuple[Any, ...]) -> list[Sequence[Any]]:
        """Send one statement, which is a transaction by itself, and return its rows.

        PostgreSQL alone, in its driver's own form (`$1`): what SQLAlchemy does for a transaction
        costs this process as much as storing fifty callbacks. Raises as `read` does.
        """
        foreign = (*FOREIGN, *driver_errors())
        return await self._until_done(foreign, lambda: self._writer.send(statement, values))

    async def _until_done(
        self, foreign: tuple[type[BaseException], ...], attempt: Callable[[], Awaitable[T]]
    ) -> T:
        self._refuse_closed()
        lost: tuple[type[BaseException], ...] = (WriteConflict, *foreign)
        with _own_errors(foreign):
            async with self._in_time():
                for number in range(1, ATTEMPTS + 1):
                    try:
                        return await attempt()
                    except lost as exc:
                        if not is_conflict(exc):
                            raise
                        conflict = exc
                    await asyncio.sleep(random.uniform(0, 0.01 * number))
        raise StoreUnavailable(
            "the database is too busy: other writers were always quicker"
        ) from conflict

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreUnavailable("the database is closed")

    def _in_time(self) -> asyncio.Timeout:
        # What is under way on SQLite is under way in a thread, and its waits end by themselves.
        return asyncio.timeout(ANSWER_SECONDS if self.dialect == "postgresql" else None)

    async def ping(self) -> None:
        """Return where the database answers a query; raise `StoreUnavailable` where it does not."""
        try:
            async with asyncio.timeout(PING_SECONDS), self.read() as connection:
                await connection.execute(_PING)
        except TimeoutError as exc:
            raise translate(exc) from exc


_PING: Final = select(1)


@contextmanager
def _own_errors(foreign: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Raise the tracker's own error in place of a `foreign` one.

    A task that was told to end while it was inside ends. Where the server says nothing, letting go
    of the connection fails too, and that error would hide that it was told.
    """
    task = asyncio.current_task()
    told = task.cancelling() if task else 0
    try:
        yield
    except foreign as exc:
        if task and task.cancelling() > told:
            raise asyncio.CancelledError from exc
        raise translate(exc) from exc


class _PostgresWriter:
    """Writes through a pool of asyncpg connections."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.engine = engine.sync_engine
        self._bare = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._closed = False
        self._kept: list[tuple[AsyncConnection, Any]] = []
        """Connections for `send`, as SQLAlchemy and as asyncpg have them. To take one from the
        pool, and to give it back, costs as much as what is sent over it."""

    async def run(self, work: Callable[[Connection], T]) -> T:
        async with self._engine.begin() as connection:
            return await connection.run_sync(work)

    async def send(self, statement: str, values: tuple[Any, ...]) -> list[Sequence[Any]]:
        if self.engine.dispatch.before_cursor_execute:  # a tracer, for one, who would miss it
            async with self._engine.begin() as traced:
                return list((await traced.exec_driver_sql(statement, values)).all())
        connection, driver = await self._take()
        try:
            rows: list[Sequence[Any]] = await driver.fetch(statement, *values)
        except BaseException as error:
            if is_refusal(error):
                await self._keep(connection, driver)
            else:  # nobody knows what is under way on it, nor whether its server takes any writes
                await _end(connection)
            raise
        await self._keep(connection, driver)
        return rows

    async def _keep(self, connection: AsyncConnection, driver: Any) -> None:
        if self._closed:
            await _end(connection)
        else:
            self._kept.append((connection, driver))

    async def _take(self) -> tuple[AsyncConnection, Any]:
        while self._kept:
            connection, driver = self._kept.pop()
            if not driver.is_closed():
                return connection, driver
            await _end(connection)
        connection = await self._bare.connect()
        return connection, (await connection.get_raw_connection()).driver_connection

    async def close(self) -> None:
        self._closed = True
        while self._kept:
            connection, _ = self._kept.pop()
            await connection.close()
        await self._engine.dispose()


async def _end(connection: AsyncConnection) -> None:
    """Close a connection, in place of giving it back to its pool."""
    await connection.invalidate()
    await connection.close()


_COMMON: Final[dict[str, Any]] = {
    # Rows hold other people's prompts and links: they have no place in a log.
    "hide_parameters": True,
    "json_serializer": dump_json,
    "json_deserializer": load_json,
}


def migration_engine(url: DatabaseUrl) -> AsyncEngine:
    """An engine for migrations alone: no time-out on our side, and on SQLite no foreign keys."""
    if url.dialect == "postgresql":
        connect = partial(connect_postgres, url, "tracker-migrations", command_timeout=None)
        return create_async_engine(
            "postgresql+asyncpg://", async_creator=connect, poolclass=NullPool, **_COMMON
        )
    return sqlite_migrations(url, **_COMMON)


def _postgres_engine(
    url: DatabaseUrl, application_name: str, *, connections: int, by_key: bool = False
) -> AsyncEngine:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=partial(connect_postgres, url, application_name, by_key=by_key),
        pool_size=connections // 2,
        max_overflow=connections - connections // 2,
        pool_timeout=STATEMENT_SECONDS,
        pool_use_lifo=True,
        **_COMMON,
    )

    # asyncpg notices when the server hangs up. Asking it costs nothing, where SQLAlchemy's own
    # pre-ping costs three round trips.
    use_only(engine.sync_engine, _is_open, "the server closes its connections")
    return engine


def _is_open(adapter: Any, _: object) -> bool:
    return not adapter.driver_connection.is_closed()


def _leave_standbys(engine: Engine) -> None:
    """Give connections up that take no writes: after a failover the same address, asked anew,
    leads to another server, and the old one would be held for as long as it lives."""

    @event.listens_for(engine, "handle_error")
    def refused(context: ExceptionContext) -> None:
        if is_standby(context.original_exception):
            context.is_disconnect = True
