"""Ways in which a database is down: each a block, within which it is, and after which it is not.

Nothing here knows the tracker. What happens is what happens to databases in operation: servers
stop, crash, freeze, fail over and fill up, files are locked, moved away and fill their disk.
"""

import asyncio
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

from tests.support.databases import migrate
from tests.support.disk import SmallDisk
from tests.support.postgres import PostgresServer

Outage = Callable[[], AbstractAsyncContextManager[None]]
UP_FOR, DOWN_FOR = 1.5, 0.7
"""Seconds that a server which restarts again and again is up and down."""
WHO_ELSE = "datname = 'tracker' AND pid <> pg_backend_pid()"
FILE_LIMIT = 96 * 1024
"""Bytes to which a process may write a file."""
TABLES = ("runs", "deliveries", "run_tallies")


def postgres_outages(
    server: PostgresServer, disk: SmallDisk | None = None, log_disk: SmallDisk | None = None
) -> dict[str, Outage]:
    """What can happen to a server whose database `tracker` is meant. `disk` is where that lies and
    `log_disk` where the write-ahead log does (`postgres_on`), where they may fill up."""
    outages: dict[str, Outage] = {
        "stopped": partial(stopped, server, server.stop),
        "crashed": partial(stopped, server, server.crash),
        "restarting": partial(restarting, server, server.stop),
        "crashing": partial(restarting, server, server.crash),
        "frozen": partial(frozen, server),
        "killed": partial(killed, server),
        "read-only": partial(read_only, server),
        "crowded": partial(crowded, server),
        **{f"locked {table}": partial(locked, server, table) for table in TABLES},
    }
    if disk is not None:
        outages["disk full"] = partial(full, disk)
    if log_disk is not None:
        outages["log full"] = partial(log_full, server, log_disk)
    return outages


def sqlite_outages(
    file: Path, disk: SmallDisk | None = None, other: SmallDisk | None = None
) -> dict[str, Outage]:
    """What can happen to a file. `disk` is where it lies, where that may fill up, and `other` one
    on which nobody may write meanwhile."""
    outages: dict[str, Outage] = {
        "locked": partial(locked_file, file, "BEGIN IMMEDIATE"),
        "locked exclusively": partial(locked_file, file, "BEGIN EXCLUSIVE"),
        "moved away": partial(moved_away, file),
    }
    if disk is not None:
        outages["disk full"] = partial(full, disk)
    if other is not None:
        outages["read-only"] = partial(read_only_file, file, other)
    return outages


async def administrator(server: PostgresServer) -> Any:
    """A superuser's connection, which may write whatever the others may not."""
    settings = {"default_transaction_read_only": "off", "application_name": "administrator"}
    return await asyncpg.connect(server.url("tracker"), server_settings=settings)


@asynccontextmanager
async def stopped(server: PostgresServer, stop: Callable[[], None]) -> AsyncIterator[None]:
    """The server is gone; `stop` says how it went."""
    await asyncio.to_thread(stop)
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


@asynccontextmanager
async def restarting(server: PostgresServer, stop: Callable[[], None]) -> AsyncIterator[None]:
    """The server comes and goes."""
    done = asyncio.Event()

    async def go_on() -> None:
        while not done.is_set():
            await asyncio.to_thread(stop)
            await asyncio.sleep(DOWN_FOR)
            await asyncio.to_thread(server.start)
            with suppress(TimeoutError):
                async with asyncio.timeout(UP_FOR):
                    await done.wait()

    async with _meanwhile(go_on(), done):
        yield


@asynccontextmanager
async def frozen(server: PostgresServer) -> AsyncIterator[None]:
    """The server keeps its connections, takes new ones, and says nothing."""
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@asynccontextmanager
async def killed(server: PostgresServer) -> AsyncIterator[None]:
    """An administrator ends every connection, again and again."""
    done = asyncio.Event()

    async def go_on() -> None:
        connection = await administrator(server)
        while not done.is_set():
            query = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {WHO_ELSE}"
            await connection.execute(query)
            await asyncio.sleep(0.1)
        await connection.close()

    async with _meanwhile(go_on(), done):
        yield


@asynccontextmanager
async def read_only(server: PostgresServer) -> AsyncIterator[None]:
    """Sessions that begin meanwhile may not write, for as long as they last: a standby, which
    another server takes the place of."""
    connection = await administrator(server)
    query = "ALTER DATABASE tracker SET default_transaction_read_only = "
    await connection.execute(f"{query} on")
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {WHO_ELSE}"
    await connection.execute(end)
    try:
        yield
    finally:
        await connection.execute(f"{query} off")
        await connection.close()


@asynccontextmanager
async def crowded(server: PostgresServer) -> AsyncIterator[None]:
    """Others hold every connection that the server has, and the tracker's are ended."""
    connection = await administrator(server)
    others = []
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {WHO_ELSE} LIMIT 1"
    for _ in range(1000):
        try:
            others.append(await asyncpg.connect(server.url("postgres")))
        except asyncpg.TooManyConnectionsError:
            if not await connection.fetch(end):
                break
    try:
        yield
    finally:
        for other in (*others, connection):
            await other.close()


@asynccontextmanager
async def locked(server: PostgresServer, table: str) -> AsyncIterator[None]:
    """Someone has a table to himself."""
    connection = await administrator(server)
    async with connection.transaction():
        await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
    await connection.close()


@asynccontextmanager
async def full(disk: SmallDisk) -> AsyncIterator[None]:
    """Not a byte is left on the disk, whatever becomes free."""
    done = asyncio.Event()

    async def go_on() -> None:
        while not done.is_set():
            disk.fill()
            await asyncio.sleep(0.05)

    async with _meanwhile(go_on(), done):
        yield
    disk.clear()


@asynccontextmanager
async def log_full(server: PostgresServer, disk: SmallDisk) -> AsyncIterator[None]:
    """The server's write-ahead log finds no room, so that it ends itself."""
    disk.fill()
    with suppress(asyncpg.PostgresError, OSError):
        connection = await administrator(server)
        while True:
            await connection.execute("CREATE TABLE IF NOT EXISTS ballast (); DROP TABLE ballast")
            await connection.execute("SELECT pg_switch_wal()")
    try:
        yield
    finally:
        disk.clear()
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)


@asynccontextmanager
async def locked_file(file: Path, begin: str) -> AsyncIterator[None]:
    """Another process writes to the file, and does not come to an end."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA busy_timeout=5000")
        connection.execute(begin)
        yield
        connection.execute("ROLLBACK")


@asynccontextmanager
async def moved_away(file: Path) -> AsyncIterator[None]:
    """The folder of the file has another name, as when a volume is mounted over it."""
    folder = file.parent
    hidden = folder.with_name(f"{folder.name}.away")
    folder.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(folder)


@asynccontextmanager
async def at_its_limit(writer: int) -> AsyncIterator[None]:
    """A process may write no file beyond a size that its database has long passed, as where a quota
    is used up. A log that is shorter still finds room."""
    before = resource.prlimit(writer, resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(writer, resource.RLIMIT_FSIZE, before)


@asynccontextmanager
async def read_only_file(file: Path, disk: SmallDisk) -> AsyncIterator[None]:
    """In the place of the file's folder is a copy of it, on a disk on which nobody may write."""
    folder, copy = file.parent, disk.path / "copy"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA busy_timeout=5000")
        connection.execute("BEGIN IMMEDIATE")  # nobody writes while it is copied
        # By another process: one that closes a file lets go of all its locks on it.
        await asyncio.to_thread(subprocess.run, ["cp", "-r", folder, copy], check=True)
        connection.execute("ROLLBACK")
        disk.read_only(True)
        hidden = folder.with_name(f"{folder.name}.away")
        folder.rename(hidden)
        folder.symlink_to(copy)
    try:
        yield
    finally:
        folder.unlink()
        hidden.rename(folder)


@asynccontextmanager
async def _meanwhile(work: Any, done: asyncio.Event) -> AsyncIterator[None]:
    """Do `work`, which ends when `done` is set, for as long as the block lasts."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        done.set()
        await task


@asynccontextmanager
async def postgres_on(
    disk: SmallDisk | None, log_disk: SmallDisk | None, *, fsync: bool = False
) -> AsyncIterator[PostgresServer]:
    """A server whose database `tracker` lies on one disk, and its write-ahead log on another."""
    server = PostgresServer(fsync=fsync)
    try:
        if log_disk is not None:
            server.initialise()
            _put_log_on(server, log_disk)
        await asyncio.to_thread(server.start)
        connection = await asyncpg.connect(server.url())
        tablespace = ""
        if disk is not None:
            place = disk.path / "tablespace"
            place.mkdir()
            server.hand_over(place)
            await connection.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
            tablespace = "TABLESPACE small"
        await connection.execute(f"CREATE DATABASE tracker {tablespace}")
        await connection.close()
        await migrate(server.url("tracker"))
        yield server
    finally:
        await asyncio.to_thread(server.close)


def _put_log_on(server: PostgresServer, disk: SmallDisk) -> None:
    """Move the write-ahead log of a server that does not run to the disk."""
    log, place = server.data / "pg_wal", disk.path / "wal"
    shutil.move(log, place)
    log.symlink_to(place)
    server.hand_over(place)
