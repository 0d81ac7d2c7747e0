"""SQLite: connections that cannot write, and one thread that does.

A file can be removed or replaced while connections to it are open; they would go on writing where
nothing is read any more. So a connection is used only while the path still names the file that it
opened, and a commit counts only if it still does afterwards. Only migrations create a file.

The write-ahead log beside it is found by its name alone, and belongs to the file that is gone:
SQLite would write its pages into the new one. So it is moved away first.
"""

import asyncio
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from threading import Lock, Thread
from threading import enumerate as all_threads
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tracker.core.errors import StoreUnavailable
from tracker.core.log import get_logger
from tracker.store.url import DatabaseUrl

T = TypeVar("T")

log = get_logger(__name__)

_DURABLE: Final = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL")


@contextmanager
def only_service(url: str) -> Iterator[None]:
    """Log a warning if another long-running process works on the SQLite file at `url`: each of them
    waits for the other's commits. With PostgreSQL, do nothing.

    A file beside it is locked, because closing the database's own would drop SQLite's locks. The
    lock ends with the process, however it ends.
    """
    parsed = DatabaseUrl.parse(url)
    with ExitStack() as stack:
        if parsed.dialect == "sqlite":
            try:
                lock = stack.enter_context(open(f"{parsed.path}.lock", "ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning(
                    "database.shared",
                    path=str(parsed.path),
                    advice="another `tracker serve` or `tracker worker` works on this file: stop "
                    "one of them, or use PostgreSQL",
                )
            except OSError:  # no such folder, or none to write to: opening the database says so
                pass
        yield


FileId = tuple[int, int] | None
"""The file that a path names at one moment, by device and number; `None` for none."""


class _Pin:
    """One file by its id, which no other is given as long as it is pinned (on Linux)."""

    def __init__(self) -> None:
        self.id: FileId = None
        self._handle: int | None = None

    def put(self, path: str | None) -> None:
        """Pin the file at `path` in place of the one before; `None` pins none."""
        if self._handle is not None:
            os.close(self._handle)
        self.id = self._handle = None
        if path is None:
            return
        with suppress(OSError):
            if hasattr(os, "O_PATH"):
                # Another kind of handle would drop SQLite's locks when it is closed.
                self._handle = os.open(path, os.O_PATH)
            self.id = _file_id(path if self._handle is None else self._handle)


class SqliteFile:
    """The file at `path`, which may be replaced by another, and the log beside it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = Lock()
        self._used = _Pin()
        self._log = _Pin()  # of the file in use
        self._log_path = ""

    def now(self) -> FileId:
        """The file that is there now."""
        return _file_id(self.path)

    def is_opened_by(self, _connection: object, record: Any) -> bool:
        """Whether a pooled connection, by its record, leads to the file that is there now."""
        return bool(record.info["file"] == self.now())

    def used(self, _connection: object, record: Any) -> None:
        """Note the log of the file that a pooled connection was just used for."""
        opened, found = record.info.get("file"), _file_id(self._log_path)
        with self._lock:
            if self._log_path and opened is not None and self.now() == opened:
                if opened != self._used.id:
                    self._used.put(self.path)
                if found != self._log.id:
                    self._log.put(self._log_path)

    def close(self) -> None:
        """Let go of both, for good."""
        with self._lock:
            self._log_path = ""
            self._used.put(None)
            self._log.put(None)

    def about_to_open(self) -> FileId:
        """The file that is there, without the log of the one that was there before. Raises
        `OSError` if that cannot be moved away."""
        with self._lock:
            found = self.now()
            if found is None or found == self._used.id:
                return found
            path = self._log_path = f"{os.path.realpath(self.path)}-wal"
            if self._log.id is not None and _file_id(path) == self._log.id:
                away = f"{path}.{self._log.id[1]}"
                os.rename(path, away)
                with suppress(FileNotFoundError):
                    os.unlink(f"{path.removesuffix('wal')}shm")  # the index of that log
                log.warning("database.replaced", path=self.path, log=away, advice=_REPLACED)
            self._used.put(self.path)
            self._log.put(None)
            return found


_REPLACED: Final = (
    "the last commits to the file that was there before may be in this log alone: keep both "
    "together, or delete both. Stop the tracker before you replace its file"
)


class SqliteThread:
    """Runs write transactions in one thread, over one connection: SQLite has a single writer."""

    def __init__(self, url: DatabaseUrl, file: SqliteFile, **options: Any) -> None:
        self._file = file
        self._times = url.times
        self.engine = _write_engine(url, file, **options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-writer")

    async def run(self, work: Callable[[Connection], T]) -> T:
        return await self._in_thread(partial(self._run, work))

    async def send(self, statement: str, values: tuple[Any, ...]) -> list[Sequence[Any]]:
        return await self._in_thread(partial(self._send, statement, values))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        writing = self._thread.submit(work)
        done = asyncio.wrap_future(writing)
        try:
            await asyncio.wait([done], timeout=self._times.queue)
            if not done.done() and writing.cancel():
                raise StoreUnavailable("the database is too busy: too many writes are queued")
            return await done
        finally:
            done.cancel()  # if the caller was: a queued write is dropped, a result ignored

    def _run(self, work: Callable[[Connection], T]) -> T:
        with self.engine.begin() as connection:
            opened = connection.info["file"]
            result = work(connection)
        self._check_file(opened)
        return result

    def _send(self, statement: str, values: tuple[Any, ...]) -> list[Sequence[Any]]:
        with closing(self.engine.raw_connection()) as connection:
            opened = connection.info["file"]
            rows: list[Sequence[Any]] = connection.cursor().execute(statement, values).fetchall()
        self._check_file(opened)
        return rows

    def _check_file(self, opened: object) -> None:
        if self._file.now() != opened:
            raise StoreUnavailable(f"the database's file is not at {self._file.path} any more")

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self.engine.dispose)
        self._thread.shutdown()
        self._file.close()
        await join_stopped(self._times.busy)


def driver_execute(connection: Connection) -> Callable[[str, Sequence[Any]], Any]:
    """Executes statements in the driver's own form within the connection's transaction.

    SQLAlchemy's work for a statement costs as much as storing three callbacks. It is done where
    statements are traced, because the trace sees no others, and for the asynchronous driver. Else
    errors are those of `sqlite3`.
    """
    if connection.dialect.is_async or connection.engine.dispatch.before_cursor_execute:
        return lambda text, values: connection.exec_driver_sql(text, tuple(values))
    execute: Callable[[str, Sequence[Any]], Any] = connection.connection.cursor().execute
    return execute


ONE_QUERY: Final = "tracker_one_query"
"""Execution option of a connection that reads by one query, which needs no transaction."""


def sqlite_read_engine(url: DatabaseUrl, file: SqliteFile, **options: Any) -> AsyncEngine:
    """An engine whose connections cannot write."""
    engine = create_async_engine(
        _file_url("sqlite+aiosqlite", url),
        pool_timeout=url.times.long_busy,
        connect_args=_creator(url.times.long_busy, "PRAGMA query_only=ON"),
        **options,
    )

    @event.listens_for(engine.sync_engine, "begin")
    def began(connection: Connection) -> None:
        if not connection.get_execution_options().get(ONE_QUERY):
            driver: Any = connection.connection.driver_connection
            driver.begins = True

    _check_file(engine.sync_engine, file)
    return engine


def _creator(busy_seconds: float, *pragmas: str) -> dict[str, Any]:
    """How SQLAlchemy opens a connection of aiosqlite."""
    set_up = partial(_set_up, busy_seconds=busy_seconds, pragmas=pragmas)
    return {"async_creator_fn": partial(_open, set_up)}


async def _open(set_up: Callable[[sqlite3.Connection], None], *place: Any, **options: Any) -> Any:
    """A connection of aiosqlite, set up in its thread. If the caller is cancelled it is closed,
    which aiosqlite itself, and SQLAlchemy for an event, would leave to the garbage collector."""
    made: list[sqlite3.Connection] = []
    is_abandoned = False

    def connect() -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*place, **options)
        try:
            if not is_abandoned:
                set_up(connection)
        finally:
            # Only now: closing it in another thread while this one uses it ends the process.
            made.append(connection)
            if is_abandoned:
                connection.close()
        return connection

    opening = _connection_class()(connect, iter_chunk_size=64)
    opening._thread.daemon = True  # as SQLAlchemy would
    try:
        return await opening
    except BaseException:
        is_abandoned = True
        for connection in made:
            connection.close()
        raise


@cache
def _connection_class() -> Any:
    import aiosqlite  # noqa: PLC0415 - not loaded for PostgreSQL

    class SqliteConnection(aiosqlite.Connection):
        """Stops its thread once. Whoever is cancelled while SQLAlchemy closes a connection stops it
        at once, and the closing that still runs would wait for ever for a thread that has ended."""

        begins = False
        """Whether the next statement begins a transaction."""

        async def close(self) -> None:
            if self._running:
                await super().close()

        def stop(self) -> asyncio.Future[Any] | None:
            _STOPPED.add(self._thread)
            return super().stop() if self._running else None

        def cursor(self) -> Any:
            return _Cursor(self)

        async def rollback(self) -> None:
            self.begins = False
            if self.in_transaction:
                await super().rollback()

    return SqliteConnection


class _Cursor:
    """A cursor for SQLAlchemy, which opens one, executes, fetches and closes. aiosqlite's own waits
    for the connection's thread four times then, and each time costs more than most queries: this
    one waits for it once, unless there are many rows."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._cursor: sqlite3.Cursor | None = None  # where rows are left to read
        self._rows: list[Any] = []
        self.description: Any = None
        self.arraysize = 1
        self.rowcount = -1
        self.lastrowid: int | None = None

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, statement: str, values: Sequence[Any] = ()) -> None:
        def run() -> None:
            driver = self._connection._conn
            if self._connection.begins:
                self._connection.begins = False
                driver.execute("BEGIN")
            cursor = driver.cursor().execute(statement, values)
            self._rows = cursor.fetchmany(_FIRST_ROWS)
            self._note(cursor)

        await self._connection._execute(run)

    async def executemany(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        await self._connection._execute(
            lambda: self._note(self._connection._conn.cursor().executemany(statement, rows))
        )

    def _note(self, cursor: sqlite3.Cursor) -> None:
        self.description = cursor.description
        self.rowcount, self.lastrowid = cursor.rowcount, cursor.lastrowid
        if len(self._rows) == _FIRST_ROWS:
            self._cursor = cursor
        else:
            cursor.close()

    async def fetchmany(self, size: int) -> list[Any]:
        """The next rows, `size` at most."""
        rows, self._rows = self._rows[:size], self._rows[size:]
        if self._cursor and len(rows) < size:
            rows += await self._connection._execute(self._cursor.fetchmany, size - len(rows))
        return rows

    async def fetchall(self) -> list[Any]:
        """All rows that are left."""
        rows, self._rows = self._rows, []
        if self._cursor:
            rows += await self._connection._execute(self._cursor.fetchall)
        return rows

    async def close(self) -> None:
        if self._cursor:
            await self._connection._execute(self._cursor.close)


_FIRST_ROWS: Final = 256

_STOPPED: Final[WeakSet[Thread]] = WeakSet()
"""Threads of connections that end. Each calls back into the event loop before it does."""


async def join_stopped(seconds: float) -> None:
    """Wait, at most so long for each, until the threads of connections that end have ended. Whoever
    is cancelled while one is opened or closed does not wait for it, and a thread that outlives the
    event loop prints a traceback."""
    # Not `_STOPPED` itself, to which other threads with event loops of their own may add.
    for thread in [one for one in all_threads() if one in _STOPPED]:
        await asyncio.to_thread(thread.join, seconds)


def sqlite_migration_engine(url: DatabaseUrl, **options: Any) -> AsyncEngine:
    """An engine that may create the file, without foreign keys: SQLite changes a table by making a
    new one, which must not touch the rows that refer to it."""
    folder = Path(url.path).absolute().parent
    if not folder.is_dir():
        raise StoreUnavailable(
            f"the database file cannot be created: there is no directory {folder}; create it, or "
            "choose another place"
        )
    address = URL.create("sqlite+aiosqlite", database=url.path)
    engine = create_async_engine(
        address,
        poolclass=NullPool,
        connect_args=_creator(url.times.long_busy, *_DURABLE),
        **options,
    )

    @event.listens_for(engine.sync_engine, "do_connect")
    def connecting(*_: object) -> None:
        _create(Path(url.path).resolve())

    _begin(engine.sync_engine, "BEGIN IMMEDIATE")
    return engine


def _create(file: Path) -> None:
    """Create a missing file for its owner alone; SQLite's log gets the same mode."""
    with suppress(FileExistsError):
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.fchmod(descriptor, 0o600)  # whatever the umask
        os.close(descriptor)


def _write_engine(url: DatabaseUrl, file: SqliteFile, **options: Any) -> Engine:
    engine = create_engine(_file_url("sqlite", url), pool_size=1, max_overflow=0, **options)
    pragmas = (
        *_DURABLE,
        "PRAGMA foreign_keys=ON",
        # The statement journal is kept in memory, not in a file for each commit.
        "PRAGMA temp_store=MEMORY",
        # Keys come in no order, so that a checkpoint writes pages all over the file: do it after
        # 32 MB of the log instead of 4.
        "PRAGMA wal_autocheckpoint=8000",
    )

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        _set_up(connection, url.times.busy, pragmas)

    # Take the lock at once: a transaction that reads before it writes may fail.
    _begin(engine, "BEGIN IMMEDIATE")
    _check_file(engine, file)
    return engine


def _file_url(driver: str, url: DatabaseUrl) -> URL:
    """The address of the file, which is not created."""
    path = quote(os.fsencode(url.path))  # its bytes: they may be no UTF-8
    return URL.create(driver, database=f"file:{path}", query={"mode": "rw", "uri": "true"})


def _set_up(connection: sqlite3.Connection, busy_seconds: float, pragmas: Sequence[str]) -> None:
    """Set the options of a new connection."""
    connection.isolation_level = None  # see `_begin`
    for pragma in (f"PRAGMA busy_timeout={int(busy_seconds * 1000)}", *pragmas):
        _set(connection, pragma, time.monotonic() + busy_seconds)


def _set(connection: sqlite3.Connection, pragma: str, give_up: float) -> None:
    """Set one option. SQLite itself does not wait where several processes change a new file to
    write-ahead logging at once: all but one are told at once that it is locked."""
    while True:
        try:
            return connection.execute(pragma).close()
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY  # of whichever kind
            if not is_busy or time.monotonic() >= give_up:
                raise
        time.sleep(0.01)


def _begin(engine: Engine, begin: str) -> None:
    """Begin transactions here, because Python's driver begins them late or not at all."""

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        driver_execute(connection)(begin, ())


def _check_file(engine: Engine, file: SqliteFile) -> None:
    """Use no connection to a file that is not at its path any more."""

    @event.listens_for(engine, "do_connect")
    def connecting(_dialect: object, record: Any, *_: object) -> None:
        # Before it is opened: if it is replaced meanwhile, the connection is made again.
        record.info["file"] = file.about_to_open()

    event.listen(engine, "checkin", file.used)
    reason = f"there is another file at {file.path} each time"
    check_connections(engine, file.is_opened_by, reason)


def _file_id(path: str | int) -> FileId:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_connections(engine: Engine, is_usable: Callable[[Any, Any], bool], reason: str) -> None:
    """Use only connections of the pool for which `is_usable(connection, record)` holds.

    The pool replaces another by a new one. If that is not usable either, the database is
    unavailable: `ConnectionError` is raised, where the pool would blame the caller.
    """

    @event.listens_for(engine, "checkout")
    def on_checkout(connection: Any, record: Any, _: object) -> None:
        is_second = record.record_info.pop("refused", False)
        if is_usable(connection, record):
            return
        if is_second:
            raise ConnectionError(reason)
        record.record_info["refused"] = True
        raise DisconnectionError(reason)
