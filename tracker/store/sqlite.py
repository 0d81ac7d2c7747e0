"""Which of the pool's connections are fit for use: looked at each time that one is taken."""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, Final, TypeVar
from urllib.parse import quote
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tracker.core.errors import StoreError, StoreUnavailable
from tracker.store.url import DatabaseUrl

_REFUSED = "refused"


def use_only(engine: Engine, is_fit: Callable[[Any, Any], bool], why_not: str) -> None:
    """Use only connections for which `is_fit(connection, record)` holds.

    In place of another the pool makes a new one. Where that is no better the database is away, and
    whoever asked gets `ConnectionError`: the pool itself would say that the caller is to blame.
    """

    @event.listens_for(engine, "checkout")
    def look_at(connection: Any, record: Any, _: object) -> None:
        is_second = record.record_info.pop(_REFUSED, False)
        if is_fit(connection, record):
            return
        if is_second:
            raise ConnectionError(why_not)
        record.record_info[_REFUSED] = True
        raise DisconnectionError(why_not)


# SQLite under the database object: readers that cannot write, and one thread that does.
#
# A file can be taken away from under open connections: they would go on writing where nobody will
# ever read again. So a connection is used only while the path still names the file that it
# opened, and a commit counts only where it still does afterwards. Nothing here creates a file.


T = TypeVar("T")

TURN_SECONDS: Final = 2.0
"""How long a write waits for the writes of this process that came before it."""
BUSY_SECONDS: Final = 2.0
"""How long it then waits for another process to let go of the file."""
_PATIENT_SECONDS: Final = 5.0
"""The same for those whom nobody waits for at that moment: reads, which hardly ever wait, and
migrations."""
_DURABLE: Final = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL")

Identity = tuple[int, int] | None


class SqliteWriter:
    """Writes in one thread over one connection: SQLite has one writer at a time anyhow."""

    def __init__(self, url: DatabaseUrl, **options: Any) -> None:
        self._path = url.path
        self.engine = _writer(url, **options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-writer")

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction, and return when it is committed."""
        writing = self._thread.submit(self._run, work)
        done = asyncio.wrap_future(writing)
        try:
            await asyncio.wait([done], timeout=TURN_SECONDS)
            if not done.done() and writing.cancel():
                raise StoreUnavailable("the database is too busy: writes wait for those before")
            return await done
        finally:
            done.cancel()  # where the caller was: then it is not begun, or nobody hears of its end

    def _run(self, work: Callable[[Connection], T]) -> T:
        with self.engine.begin() as connection:
            opened = connection.info["file"]
            result = work(connection)
        if _identity(self._path) != opened:
            raise StoreUnavailable(f"the database's file is not at {self._path} any more")
        return result

    async def send(self, statement: str, values: tuple[Any, ...]) -> list[Sequence[Any]]:
        """Refuses: statements in the driver's form are for PostgreSQL."""
        raise StoreError("on SQLite everything is written in a transaction")

    async def close(self) -> None:
        """Let what is being written finish, and close the connection."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.engine.dispose)
        self._thread.shutdown()
        for thread in tuple(_LEFT):
            await asyncio.to_thread(thread.join, BUSY_SECONDS)


def sqlite_readers(url: DatabaseUrl, **options: Any) -> AsyncEngine:
    """An engine whose connections cannot write."""
    engine = create_async_engine(
        _existing("sqlite+aiosqlite", url),
        pool_timeout=_PATIENT_SECONDS,
        connect_args={"async_creator_fn": _open},
        **options,
    )
    _prepare(engine.sync_engine, "BEGIN", _PATIENT_SECONDS, "PRAGMA query_only=ON")
    _keep_to_the_file(engine.sync_engine, url.path)
    return engine


async def _open(*place: Any, **options: Any) -> Any:
    """A connection of aiosqlite's. Where nobody waits for it any more it is closed: aiosqlite
    itself would leave it to the garbage collector."""
    import aiosqlite  # noqa: PLC0415 - not needed, and not loaded, where PostgreSQL is used

    made: list[sqlite3.Connection] = []
    is_left = False

    def connect() -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*place, **options)
        made.append(connection)
        if is_left:
            connection.close()
        return connection

    opening = aiosqlite.Connection(connect, iter_chunk_size=64)
    opening._thread.daemon = True  # as SQLAlchemy would
    try:
        return await opening
    except BaseException:
        is_left = True
        for connection in made:
            connection.close()
        _LEFT.add(opening._thread)
        raise


_LEFT: Final[WeakSet[Thread]] = WeakSet()
"""Threads of connections that nobody waited for. Each has a last word for the event loop."""


def sqlite_migrations(url: DatabaseUrl, **options: Any) -> AsyncEngine:
    """An engine that may create the file, and minds no foreign keys: SQLite changes a table by
    making it anew, which must not touch the rows that refer to it."""
    folder = Path(url.path).absolute().parent
    if not folder.is_dir():
        raise StoreUnavailable(
            f"the database's file cannot be made: there is no directory {folder}; make it, or set "
            "TRACKER_DATABASE_URL to another place"
        )
    address = URL.create("sqlite+aiosqlite", database=url.path)
    engine = create_async_engine(address, poolclass=NullPool, **options)

    @event.listens_for(engine.sync_engine, "do_connect")
    def connecting(*_: object) -> None:
        _make(Path(url.path).resolve())

    _prepare(engine.sync_engine, "BEGIN IMMEDIATE", _PATIENT_SECONDS, *_DURABLE)
    return engine


def _make(file: Path) -> None:
    """Make the file for its owner alone, where there is none; SQLite's log has the same mode."""
    with suppress(FileExistsError):
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.fchmod(descriptor, 0o600)  # whatever the umask
        os.close(descriptor)


def _writer(url: DatabaseUrl, **options: Any) -> Engine:
    engine = create_engine(_existing("sqlite", url), pool_size=1, max_overflow=0, **options)
    _prepare(
        engine,
        # Take the lock at once: who reads first and writes later may have to give up.
        "BEGIN IMMEDIATE",
        BUSY_SECONDS,
        *_DURABLE,
        "PRAGMA foreign_keys=ON",
        # What a statement of many rows may have to take back again is kept in memory, not in a file
        # that each commit would create and remove.
        "PRAGMA temp_store=MEMORY",
        # Keys come in no order, so that each checkpoint writes pages all over the file: do it at
        # every 32 MB of the log, not at every 4.
        "PRAGMA wal_autocheckpoint=8000",
    )
    _keep_to_the_file(engine, url.path)
    return engine


def _existing(driver: str, url: DatabaseUrl) -> URL:
    """The address of the file, where there is one: an empty one in its place would help nobody."""
    return URL.create(
        driver, database=f"file:{quote(url.path)}", query={"mode": "rw", "uri": "true"}
    )


def _prepare(engine: Engine, begin: str, busy_seconds: float, *pragmas: str) -> None:
    """Begin transactions ourselves, because Python's driver begins them late or not at all."""
    busy = f"PRAGMA busy_timeout={int(busy_seconds * 1000)}"

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (busy, *pragmas):
            cursor.execute(pragma)
        cursor.close()

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _keep_to_the_file(engine: Engine, path: str) -> None:
    """Use no connection to a file that is not at `path` any more."""

    @event.listens_for(engine, "do_connect")
    def connecting(_dialect: object, record: Any, *_: object) -> None:
        # Before it is opened: should it be exchanged meanwhile, the connection is made anew.
        record.info["file"] = _identity(path)

    def is_the_file(_: object, record: Any) -> bool:
        return bool(record.info["file"] == _identity(path))

    use_only(engine, is_the_file, f"there is another file at {path} each time")


def _identity(path: str) -> Identity:
    """Which file a path names at this moment; `None` for none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
