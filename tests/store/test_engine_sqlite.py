"""SQLite under the database object: whose turn it is, and which file a path names."""

import asyncio
import shutil
import sqlite3
import sys
import threading
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from sqlalchemy import Connection, event, func, insert, select, text

from tests.store.making import callback, open_writer, receipts, taken_again
from tests.support.databases import copy_sqlite
from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.core.errors import StoreUnavailable
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.errors import translate
from tracker.store.schema import leases
from tracker.store.sqlite import _STOPPED, join_stopped
from tracker.store.url import DatabaseTimes


class LongWrite:
    """A write that goes on until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, connection: Connection) -> str:
        """Wait in the writer's thread."""
        self.begun.set()
        assert self.may_end.wait(30)
        return "written"


async def test_a_write_does_not_wait_for_ever_for_its_turn(sqlite_url: str) -> None:
    """What has not begun in time never does; what has begun is brought to its end."""
    done: list[str] = []

    async def third() -> bool:
        with suppress(StoreUnavailable):  # its turn is slow, too
            await db.write(lambda _: done.append("third"))
        return bool(done)

    async with await Database.open(sqlite_url, times=DatabaseTimes(queue=0.1)) as db:
        long = LongWrite()
        first = asyncio.create_task(db.write(long))
        await eventually(long.begun.is_set)
        with pytest.raises(StoreUnavailable, match="too busy"):
            await db.write(lambda _: done.append("second"))
        long.may_end.set()
        assert await first == "written"
        await eventually(third)
    assert done == ["third"]


async def test_a_write_that_nobody_waits_for_any_more_is_not_begun(sqlite_url: str) -> None:
    """Its caller went away while it waited for its turn."""
    done: list[str] = []
    async with await Database.open(sqlite_url) as db:
        long = LongWrite()
        first = asyncio.create_task(db.write(long))
        await eventually(long.begun.is_set)
        second = asyncio.create_task(db.write(lambda _: done.append("second")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        long.may_end.set()
        await first
        await db.write(lambda _: done.append("third"))
    assert done == ["third"]


async def test_a_file_that_was_moved_away_is_unavailable_until_it_is_back(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Nothing is written to it where nobody would read it, and no empty one takes its place."""
    path, away = tmp_path / "tracker.db", tmp_path / "away.db"
    async with await Database.open(sqlite_url) as db, open_writer(db) as writer:
        await writer.submit(callback("run_before"))
        path.rename(away)
        with pytest.raises(StoreUnavailable):
            await writer.submit(callback("run_meanwhile"))
        with pytest.raises(StoreUnavailable):
            await db.ping()
        assert not path.exists()
        away.rename(path)
        await eventually(lambda: writer.waiting == 0)
        await taken_again(writer, callback("run_after"))
        assert set(await receipts(db)) == {"whd_run_before", "whd_run_after"}


async def test_another_file_in_its_place_is_the_database_from_then_on(
    sqlite_url: str, tmp_path: Path
) -> None:
    """As when a backup is put back: both readers and writers go over to it."""
    path, old = tmp_path / "tracker.db", tmp_path / "old.db"
    async with await Database.open(sqlite_url) as db, open_writer(db) as writer:
        await writer.submit(callback("run_before"))
        copy_sqlite(path, tmp_path / "new.db")
        await writer.submit(callback("run_lost"))
        path.rename(old)
        for log in ("tracker.db-wal", "tracker.db-shm"):
            (tmp_path / log).unlink()
        (tmp_path / "new.db").rename(path)
        await writer.submit(callback("run_after"))
        assert set(await receipts(db)) == {"whd_run_before", "whd_run_after"}


async def test_the_log_of_the_file_before_is_not_written_into_another(
    sqlite_url: str, tmp_path: Path
) -> None:
    """SQLite finds the log by its name: it would make a mixture of both files, and a backup that
    was put back would be lost. It is kept, since commits may be in it alone."""
    path, old, backup = (tmp_path / f"{name}.db" for name in ("tracker", "old", "backup"))
    async with await Database.open(sqlite_url) as db, open_writer(db) as writer:
        for number in range(40):
            await writer.submit(callback(f"run_gone_{number}"))
        await db.execute(text("DELETE FROM run_events"))
        with closing(sqlite3.connect(path)) as one:
            one.execute("DELETE FROM deliveries")
            one.commit()
            one.execute(f"VACUUM INTO '{backup}'")  # other pages than in the log
        await writer.submit(callback("run_last"))
        await asyncio.gather(*(receipts(db) for _ in range(3)))  # readers with connections
        path.rename(old)
        backup.rename(path)
        await writer.submit(callback("run_after"))
        for _ in range(4):
            assert set(await receipts(db)) == {"whd_run_after"}
        assert await db.fetchval(text("PRAGMA integrity_check")) == "ok"
    (log,) = tmp_path.glob("tracker.db-wal.*")
    log.rename(tmp_path / "old.db-wal")
    async with await Database.open(f"sqlite:///{old}") as db:
        assert set(await receipts(db)) == {"whd_run_last"}


async def test_a_file_that_was_removed_is_not_taken_for_a_copy_in_its_place() -> None:
    """On a disk the copy may be given the number of the file that was removed."""
    with TemporaryDirectory(dir="/var/tmp") as folder:
        path, backup = Path(folder, "tracker.db"), Path(folder, "backup.db")
        await migrate.upgrade(f"sqlite:///{path}")
        async with await Database.open(f"sqlite:///{path}") as db, open_writer(db) as writer:
            await writer.submit(callback("run_kept"))
            with closing(sqlite3.connect(path)) as one:
                one.execute(f"VACUUM INTO '{backup}'")
            for number in range(40):
                await writer.submit(callback(f"run_gone_{number}"))
            path.unlink()
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await writer.submit(callback("run_refused"))
                with pytest.raises(StoreUnavailable):
                    await receipts(db)
            shutil.copyfile(backup, path)
            await writer.submit(callback("run_after"))
            assert set(await receipts(db)) == {"whd_run_kept", "whd_run_after"}
            assert await db.fetchval(text("PRAGMA integrity_check")) == "ok"


async def test_the_log_of_the_new_file_is_left_to_it(sqlite_url: str, tmp_path: Path) -> None:
    """Another process, which sees later that the file was replaced, moves no log that is in use."""
    path, backup = tmp_path / "tracker.db", tmp_path / "backup.db"
    async with (
        await Database.open(sqlite_url) as db,
        open_writer(db) as writer,
        await Database.open(sqlite_url) as other,
    ):
        with closing(sqlite3.connect(path)) as one:
            one.execute(f"VACUUM INTO '{backup}'")
        await writer.submit(callback("run_gone"))
        assert set(await receipts(other)) == {"whd_run_gone"}
        backup.rename(path)
        await writer.submit(callback("run_after"))
        assert set(await receipts(other)) == {"whd_run_after"}
        await writer.submit(callback("run_later"))
        assert set(await receipts(other)) == {"whd_run_after", "whd_run_later"}
    assert len([*tmp_path.glob("tracker.db-wal.*")]) == 1


async def test_a_file_that_is_exchanged_again_and_again_is_unavailable(
    sqlite_url: str, tmp_path: Path
) -> None:
    """However unlucky the moments: that is no fault of the caller's."""
    path, new = tmp_path / "tracker.db", tmp_path / "new.db"

    def exchange(*_: object) -> None:
        shutil.copy(path, new)
        new.rename(path)

    async with await Database.open(sqlite_url) as db:
        for engine in db.engines:
            event.listen(engine, "connect", exchange)
        with pytest.raises(StoreUnavailable):
            await db.ping()
        with pytest.raises(StoreUnavailable):
            await db.write(lambda connection: connection.execute(text("SELECT 1")).scalar())
        for engine in db.engines:
            event.remove(engine, "connect", exchange)
        await db.ping()


async def test_a_commit_into_a_file_that_is_gone_does_not_count(
    sqlite_url: str, tmp_path: Path
) -> None:
    """It was taken away in the middle: whoever waits is not told that all is well."""

    def work(connection: Connection) -> str:
        connection.execute(text("DELETE FROM sweeps"))
        (tmp_path / "tracker.db").rename(tmp_path / "away.db")
        return "done"

    async with await Database.open(sqlite_url) as db:
        with pytest.raises(StoreUnavailable, match="not at"):
            await db.write(work)


async def test_a_file_that_never_was_is_not_made(tmp_path: Path) -> None:
    """Only a migration makes one: an empty database would help nobody."""
    path = tmp_path / "none.db"
    async with await Database.open(f"sqlite:///{path}") as db:
        with pytest.raises(StoreUnavailable):
            await db.ping()
        with pytest.raises(StoreUnavailable):
            await db.write(lambda connection: connection.execute(text("SELECT 1")).scalar())
    assert not path.exists()


def test_a_file_of_another_user_is_named_as_the_cause(tmp_path: Path) -> None:
    """SQLite's own words do not say what to do after a command was run as another user."""
    path = tmp_path / "tracker.db"
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE runs (run_id TEXT)")

    def drop(place: Path, mode: str) -> None:
        with closing(sqlite3.connect(f"file:{place}?mode={mode}", uri=True)) as file:
            file.execute("DROP TABLE runs")

    for place, mode in ((path, "ro"), (tmp_path, "rw")):
        with pytest.raises(sqlite3.OperationalError) as raised:
            drop(place, mode)
        assert "must be writable for the user" in str(translate(raised.value))


@pytest.mark.parametrize("moment", ["opened", "set up"])
async def test_a_connection_that_nobody_waits_for_is_closed(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its reader was cancelled while it was opened, and did not wait for it. It is not closed while
    its thread uses it, which would end the process."""
    made: list[sqlite3.Connection] = []
    begun, go_on = threading.Event(), threading.Event()
    failures: list[Exception] = []
    connect = sqlite3.connect

    def wait_in(now: str) -> None:
        if now == moment:
            begun.set()
            go_on.wait(30)

    class Slow(sqlite3.Connection):
        def execute(self, *statement: Any) -> sqlite3.Cursor:
            wait_in("set up")
            try:
                return super().execute(*statement)
            except Exception as error:
                failures.append(error)
                raise

    def slowly(*place: Any, **options: Any) -> sqlite3.Connection:
        made.append(connect(*place, factory=Slow, **options))
        wait_in("opened")
        return made[-1]

    async def read() -> None:
        async with db.read() as connection:
            await connection.execute(text("SELECT 1"))

    def is_closed() -> bool:
        try:
            made[0].total_changes  # noqa: B018 - it is asked whether it may be
        except sqlite3.ProgrammingError:
            return True
        return False

    monkeypatch.setattr(sqlite3, "connect", slowly)
    async with await Database.open(sqlite_url) as db:
        reading = asyncio.create_task(read())
        assert await asyncio.to_thread(begun.wait, 30)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert not is_closed()
        go_on.set()
        await eventually(is_closed)
    assert not failures


@pytest.mark.parametrize("closes", ["later", "meanwhile"])
async def test_a_reader_that_is_cancelled_twice_leaves_nothing_that_waits(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, closes: str
) -> None:
    """The second time while its connection is closed, whose thread then ends earlier. Closing the
    database waits for that thread, which calls back into the event loop."""
    begun, go_on = threading.Event(), threading.Event()
    threads = set(threading.enumerate())
    connect = sqlite3.connect

    class SlowCursor(sqlite3.Cursor):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if "slow" in statement:
                begun.set()
                go_on.wait(30)
            return super().execute(statement, *values)

    class Slow(sqlite3.Connection):
        def cursor(self, *_: Any) -> Any:
            return super().cursor(SlowCursor)

    async with await Database.open(sqlite_url) as db:
        monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Slow))
        before = asyncio.all_tasks()
        reading = asyncio.create_task(db.fetchval(text("SELECT 'slow'")))
        assert await asyncio.to_thread(begun.wait, 30)
        reading.cancel()
        await eventually(lambda: asyncio.all_tasks() > {*before, reading})
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        if closes == "later":
            go_on.set()
            await eventually(lambda: asyncio.all_tasks() == before)
        else:
            asyncio.get_running_loop().call_later(0.1, go_on.set)
    started = set(threading.enumerate()) - threads
    assert [one.name for one in started if "worker_thread" in one.name] == []


def test_databases_close_in_several_threads_at_once() -> None:
    """While one waits for the threads of its connections, those of another may end."""
    ended, interval = [threading.Thread() for _ in range(5_000)], sys.getswitchinterval()

    def end_connections() -> None:
        for thread in ended:
            _STOPPED.add(thread)

    async def wait_meanwhile() -> None:
        while other.is_alive():
            await join_stopped(0.0)

    other = threading.Thread(target=end_connections)
    sys.setswitchinterval(1e-6)
    try:
        other.start()
        asyncio.run(wait_meanwhile())
    finally:
        sys.setswitchinterval(interval)
        other.join()


_COUNTING = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 1000])
async def test_every_row_of_a_query_is_read_however_many_there_are(
    sqlite_url: str, rows: int
) -> None:
    """The first come with the statement, the others on their own."""
    async with await Database.open(sqlite_url) as db:
        found = await db.fetchcol(text(f"{_COUNTING} LIMIT {rows}"))
    assert found == list(range(1, rows + 1))


async def test_rows_are_read_in_parts_of_any_size(sqlite_url: str) -> None:
    """Also one at a time, as drivers do where no size is given."""
    async with await Database.open(sqlite_url) as db, db.read() as connection:
        result = await connection.execute(text(f"{_COUNTING} LIMIT 6"))
        parts = [result.fetchmany(), [result.fetchone()], result.fetchmany(2), result.fetchall()]
    assert [[row[0] for row in part if row] for part in parts] == [[1], [2], [3, 4], [5, 6]]


async def test_a_stream_reads_what_it_is_asked_for(sqlite_url: str) -> None:
    """Here there is no end of rows."""
    found: list[int] = []
    async with await Database.open(sqlite_url) as db, db.read() as connection:
        async with connection.stream(text(_COUNTING).execution_options(yield_per=100)) as result:
            async for row in result:
                found.append(row[0])
                if len(found) == 1000:
                    break
        assert (await connection.execute(text("SELECT 1"))).scalar() == 1
    assert found == list(range(1, 1001))


async def test_a_block_reads_one_snapshot(sqlite_url: str) -> None:
    """It is the one of its first query, whatever is committed after that."""
    count = select(func.count()).select_from(leases)
    async with await Database.open(sqlite_url) as db:
        async with db.read() as connection:
            before = (await connection.execute(count)).scalar()
            await db.execute(insert(leases).values(name="a", holder="b", until=utc_now()))
            assert (await connection.execute(count)).scalar() == before
        assert await db.fetchval(count) == before + 1


async def test_one_query_needs_no_transaction(sqlite_url: str) -> None:
    """It reads one snapshot by itself; only a block of several begins a transaction."""
    sent: list[str] = []
    async with await Database.open(sqlite_url) as db:
        async with db.read() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.set_trace_callback(sent.append)
        assert await db.fetchval(text("SELECT 1")) == 1
        assert sent == ["SELECT 1"]
        sent.clear()
        async with db.read() as connection:
            for number in (1, 2):
                await connection.execute(text(f"SELECT {number}"))
        assert sent == ["BEGIN", "SELECT 1", "SELECT 2", "ROLLBACK"]
