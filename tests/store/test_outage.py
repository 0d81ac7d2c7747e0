"""A database that is down is said so in time, and taken up again by itself."""

import asyncio
import select
import socket
import sqlite3
import struct
from contextlib import AsyncExitStack, closing, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from sqlalchemy import text

from tests.store.making import (
    TestWriter,
    apply_all,
    delivery,
    ids,
    open_inbox,
    open_writer,
    receipts,
    seen,
    taken_again,
)
from tests.support.logs import capture_logs
from tests.support.postgres import PostgresServer
from tests.support.waiting import assert_takes_less, eventually, free_port, let_pass
from tracker.core.errors import StoreError, StoreUnavailable
from tracker.store.coordination import check_writes
from tracker.store.engine import Database
from tracker.store.queries.runs import get_run
from tracker.store.url import DatabaseTimes


async def is_unavailable(writer: TestWriter, run_id: str) -> None:
    """The writer cannot take what was seen of a run."""
    with pytest.raises(StoreUnavailable):
        await writer.submit(seen(run_id))


async def test_a_locked_file_is_unavailable_and_then_free(sqlite_url: str, tmp_path: Path) -> None:
    """While someone holds SQLite's write lock, callers are told in time; then all goes on."""
    async with await Database.open(sqlite_url) as db, open_writer(db, deadline=0.5) as writer:
        await taken_again(writer, seen("run_before"))
        with closing(sqlite3.connect(tmp_path / "tracker.db", isolation_level=None)) as blocker:
            blocker.execute("BEGIN IMMEDIATE")
            # Half a second, and a pause of two.
            await assert_takes_less(3, partial(is_unavailable, writer, "run_meanwhile"))
            assert await get_run(db, "run_before")  # readers do not care
            blocker.execute("ROLLBACK")
        await eventually(lambda: writer.waiting == 0)
        await taken_again(writer, seen("run_after"))
        assert await get_run(db, "run_after")


async def test_a_file_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    """A path that is no file is a database that is not there, not a crash."""
    (tmp_path / "folder").mkdir()
    async with await Database.open(f"sqlite:///{tmp_path / 'folder'}") as db:
        with pytest.raises(StoreUnavailable):
            await db.ping()
        async with open_writer(db, deadline=0.3) as writer:
            with pytest.raises(StoreUnavailable):
                await writer.submit(seen("run_1"))


async def test_nobody_behind_the_port_is_unavailable_in_time() -> None:
    """Where nothing listens, callers are told within the deadline, and closing does not hang."""
    url = f"postgresql://tracker:secret@127.0.0.1:{free_port()}/tracker"
    async with await Database.open(url) as db, open_writer(db, deadline=0.5) as writer:

        async def refused() -> None:
            with pytest.raises(StoreUnavailable) as caught:
                await writer.submit(seen("run_1"))
            assert "secret" not in str(caught.value)

        await assert_takes_less(3, refused)  # half a second, and a pause of two
        with pytest.raises(StoreUnavailable):
            await db.ping()


async def test_a_server_that_accepts_and_says_nothing_is_unavailable() -> None:
    """A server that hangs is as good as none: the wait for it ends, although no attempt to connect
    does."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"postgresql://t@127.0.0.1:{silent.getsockname()[1]}/t"
        async with (
            await Database.open(url, times=DatabaseTimes(connect=3600.0)) as db,
            open_writer(db, deadline=60) as writer,
        ):
            told = asyncio.create_task(is_unavailable(writer, "run_1"))
            await eventually(lambda: select.select([silent], [], [], 0)[0])  # it is being connected
            let_pass(60)
            for _ in range(5):  # at once, so that no pause of the process matters
                await asyncio.sleep(0)
            assert told.done()
            await told

            async def pinged() -> None:
                with pytest.raises(StoreUnavailable):
                    await db.ping()

            await assert_takes_less(5.5, pinged)  # three seconds, and a pause of two


async def test_terminated_connections_cost_no_callback(postgres_url: str) -> None:
    """When an administrator has ended all our connections, callers notice nothing."""
    async with (
        AsyncExitStack() as stack,
        await Database.open(postgres_url) as db,
        open_inbox(db) as inbox,
    ):
        administrator = await asyncpg.connect(postgres_url)
        stack.push_async_callback(administrator.close)
        await inbox.store(delivery("run_0"))
        for number in range(1, 4):
            await administrator.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await asyncio.gather(*(inbox.store(delivery(run)) for run in ids(f"run_{number}", 20)))
            assert await apply_all(db) == (21 if number == 1 else 20)
            assert await get_run(db, f"run_{number}_0007")
        assert set((await receipts(db)).values()) == {1}


async def test_a_restarted_server_is_found_again(own_postgres: PostgresServer) -> None:
    """A stopped server means `StoreUnavailable`; once it is back, the same writer goes on."""
    async with (
        await Database.open(own_postgres.url("tracker")) as db,
        open_writer(db, deadline=0.5) as writer,
    ):
        await taken_again(writer, seen("run_before"))
        await asyncio.to_thread(own_postgres.stop)
        for run in ("run_1", "run_2"):  # half a second, and a pause of two
            await assert_takes_less(3, partial(is_unavailable, writer, run))
        assert writer.trouble is not None
        with pytest.raises(StoreUnavailable):
            await get_run(db, "run_before")
        await asyncio.to_thread(own_postgres.start)

        await taken_again(writer, seen("run_after"))
        assert writer.trouble is None
        assert await get_run(db, "run_before")
        assert await get_run(db, "run_after")


async def test_acknowledged_means_on_disk(own_postgres: PostgresServer) -> None:
    """What was answered before the server crashed is there when it has recovered."""
    async with await Database.open(own_postgres.url("tracker")) as db:
        async with open_inbox(db, deadline=60, max_group=3) as inbox:
            calls = [asyncio.ensure_future(inbox.store(delivery(run))) for run in ids("run", 300)]
            await asyncio.wait(calls[:30])
            await asyncio.to_thread(own_postgres.crash)
            let_pass(60)
            answers = await asyncio.gather(*calls, return_exceptions=True)
        acknowledged = {
            f"whd_{run}"
            for run, answer in zip(ids("run", 300), answers, strict=True)
            if not isinstance(answer, BaseException)
        }
        assert len(acknowledged) >= 30
        await asyncio.to_thread(own_postgres.start)
        assert await eventually(lambda: _all_there(db, acknowledged))


async def _all_there(db: Database, acknowledged: set[str]) -> bool:
    try:
        return acknowledged <= set(await receipts(db))
    except StoreUnavailable:
        return False


async def test_a_lock_that_is_not_given_ends_the_wait(postgres_url: str) -> None:
    """A table that someone has locked means `StoreUnavailable`, and nothing stays broken."""
    async with (
        await Database.open(postgres_url) as db,
        open_writer(db, deadline=0.4) as writer,
    ):
        owner = await asyncpg.connect(postgres_url)
        async with owner.transaction():
            await owner.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(StoreUnavailable):
                await writer.submit(seen("run_1"))
        await owner.close()
        await eventually(lambda: writer.waiting == 0)
        await taken_again(writer, seen("run_2"))
        assert await get_run(db, "run_2")


async def test_a_standby_is_left_for_the_server_that_takes_its_place(postgres_url: str) -> None:
    """A connection that takes no writes is given up: the same address leads elsewhere by then."""
    name = urlsplit(postgres_url).path[1:]
    able = {"default_transaction_read_only": "off"}
    administrator = await asyncpg.connect(postgres_url, server_settings=able)
    setting = f'ALTER DATABASE "{name}" SET default_transaction_read_only ='
    await administrator.execute(f"{setting} on")
    async with await Database.open(postgres_url) as db, open_inbox(db, deadline=60) as inbox:
        meanwhile = inbox.store(delivery("run_meanwhile"))
        await eventually(lambda: inbox.trouble)
        let_pass(60)
        with pytest.raises(StoreUnavailable, match="read-only"):
            await meanwhile
        await administrator.execute(f"{setting} off")
        await eventually(lambda: inbox.waiting == 0)

        async def stored() -> bool:
            with suppress(StoreUnavailable):
                return bool(await inbox.store(delivery("run_after")))
            return False

        await eventually(stored)
        assert await apply_all(db) >= 1
        assert await get_run(db, "run_after")
    await administrator.close()


async def test_a_pooler_without_a_free_connection_is_unavailable() -> None:
    """Some answer with the code of an internal error, which says nothing of what was to be sent."""
    fields = b"SFATAL\0CXX000\0MMaxClientsInSessionMode: max clients reached\0\0"
    refusal = b"E" + struct.pack("!i", len(fields) + 4) + fields

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(refusal)
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"postgresql://one@127.0.0.1:{port}/tracker?sslmode=disable"
    async with server, await Database.open(url) as db:
        for use in (db.ping, partial(db.execute, text("SELECT 1")), partial(db.send, "", ())):
            with pytest.raises(StoreUnavailable, match="max clients reached"):
                await use()


async def test_a_role_that_may_not_write_waits_until_it_may(postgres_url: str) -> None:
    """As after a restore by another role: readiness says so, and what waits is then stored."""
    parts = urlsplit(postgres_url)
    role = f"writer_of_{parts.path[1:]}"
    owner = await asyncpg.connect(postgres_url)
    granted = f'ALL TABLES IN SCHEMA public TO "{role}"'
    await owner.execute(f'CREATE ROLE "{role}" LOGIN; GRANT SELECT ON {granted}')
    try:
        url = postgres_url.replace(f"{parts.username}@", f"{role}@", 1)
        async with await Database.open(url) as db, open_inbox(db, deadline=60) as inbox:
            waiting = inbox.store(delivery("run_1"))
            await eventually(lambda: inbox.trouble)
            with pytest.raises(StoreUnavailable, match="permission denied"):
                await check_writes(db)
            assert not waiting.done()
            await owner.execute(f"GRANT INSERT, UPDATE, DELETE ON {granted}")
            await waiting
            await check_writes(db)
    finally:
        await owner.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')
        await owner.close()


async def test_a_database_that_comes_and_goes_is_said_once(sqlite_url: str, tmp_path: Path) -> None:
    """Not at every turn: the log says that it is away, and that it is back."""
    path, away = tmp_path / "tracker.db", tmp_path / "away.db"
    async with await Database.open(sqlite_url) as db, open_writer(db, deadline=0.5) as writer:
        with capture_logs() as lines:
            for number in range(3):
                path.rename(away)
                with pytest.raises(StoreUnavailable):
                    await writer.submit(seen(f"run_meanwhile_{number}"))
                away.rename(path)
                await eventually(lambda: writer.waiting == 0)
                await taken_again(writer, seen(f"run_after_{number}"))
    said = [line["event"] for line in lines]
    assert said == ["writer.unavailable", "writer.recovered"]


async def test_reads_cannot_write(db: Database) -> None:
    """A reader's connection refuses to change anything."""
    with pytest.raises(StoreError):
        async with db.read() as connection:
            await connection.execute(text("DELETE FROM runs"))


async def test_a_cancelled_task_ends_while_the_server_is_silent(
    own_postgres: PostgresServer,
) -> None:
    """To end a task in the middle of a transaction ends it, although its connection fails too."""
    async with await Database.open(own_postgres.url("tracker")) as db:
        is_within = asyncio.Event()

        async def read() -> None:
            async with db.read() as connection:
                await connection.execute(text("SELECT 1"))
                is_within.set()
                await asyncio.sleep(30)

        reading = asyncio.create_task(read())
        await is_within.wait()
        own_postgres.freeze()
        try:
            reading.cancel()
            await asyncio.wait([reading])
        finally:
            own_postgres.thaw()
        assert reading.cancelled()
