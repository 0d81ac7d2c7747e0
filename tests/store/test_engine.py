"""The database object: addresses, transactions, errors in the tracker's own words."""

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util.concurrency import await_

from tests.store.making import NOW
from tracker.core.errors import SettingsError, StoreError, StoreUnavailable
from tracker.store import engine
from tracker.store.engine import Database
from tracker.store.errors import StoreBusy, WriteConflict, translate
from tracker.store.schema import leases
from tracker.store.url import DatabaseTimes, DatabaseUrl


def keep(connection: Connection, name: str) -> None:
    """Write something."""
    connection.execute(insert(leases).values(name=name, holder="h", until=NOW))


async def names(db: Database) -> list[str]:
    """What has been written."""
    async with db.read() as connection:
        return sorted((await connection.execute(select(leases.c.name))).scalars())


def test_what_the_driver_alone_reports_is_a_lost_connection() -> None:
    """asyncpg has no code for a connection that is ended in the middle of its set-up, and
    SQLAlchemy no class of its own."""
    message = "cannot switch to state 15; another operation (2) is in progress"
    driver = asyncpg.InternalClientError(message)
    wrapped = AsyncAdapt_asyncpg_dbapi.InternalClientError(message, driver)
    for error in (driver, wrapped, DBAPIError("connect", None, wrapped)):
        assert isinstance(translate(error), StoreUnavailable)
        assert str(translate(error)) == "the connection to the database is lost"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///tracker.db", "sqlite:///tracker.db"),
        ("sqlite:////var/lib/tracker.db", "sqlite:////var/lib/tracker.db"),
        ("sqlite+aiosqlite:///tracker.db", "sqlite:///tracker.db"),
        ("postgres://db.example/tracker", "postgresql://db.example/tracker"),
        ("postgresql://u:pa%2Fss@db:5433/t", "postgresql://u:***@db:5433/t"),
        ("postgresql+asyncpg://u:pass@db/t?sslmode=require", "postgresql://u:***@db/t"),
        (" postgresql+psycopg2://u@db/t?password=pass ", "postgresql://u@db/t"),
        ("postgresql://u:pass@one:5432,two:5433/t", "postgresql://u:***@one:5432,two:5433/t"),
        ("postgresql://u:pass@[::1]:5432/t", "postgresql://u:***@[::1]:5432/t"),
        ("postgresql:///t?host=/run/postgresql", "postgresql:///t"),
    ],
)
def test_addresses_are_read_and_shown_without_secrets(url: str, shown: str) -> None:
    """The usual spellings are understood; what is shown of them holds no password."""
    parsed = DatabaseUrl.parse(url)
    assert str(parsed) == shown
    assert "pass" not in repr(parsed)
    assert "pa%2Fss" not in f"{parsed!r} {parsed}"


def test_what_only_libpq_knows_is_left_out() -> None:
    """An address as hosters give it works; asyncpg takes what it does not know for settings."""
    parsed = DatabaseUrl.parse(
        "postgres://u:p@db/t?sslmode=require&channel_binding=require&connect_timeout=10"
        "&keepalives=1&keepalives_idle=30"
    )
    assert parsed.dsn == "postgresql://u:p@db/t?sslmode=require"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "tracker.db",
        "mysql://u:hunter2@db/t",
        "sqlite+pysqlcipher://:hunter2@/t.db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite://tracker.db",
        "postgresql://u:hunter2@[db/t",
        "postgresql://u:hunter2@db:port/t",
        "postgresql://u:hunter2@db:65536/t",
        *(f"postgresql://u:{part}@db/t" for part in ("hunter2#x", "1#hunter2", "hunter2/x")),
        *(
            f"postgresql://u:{part}@db/t"
            for part in ("1/hunter2", "1?hunter2", "hunter2?x", "p@hunter2")
        ),
    ],
)
def test_other_addresses_are_refused_unrepeated(url: str) -> None:
    """What is no address is a wrong setting; the message names the variable and hides the value."""
    with pytest.raises(SettingsError, match="TRACKER_DATABASE_URL") as caught:
        DatabaseUrl.parse(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_a_file_with_an_odd_name_is_opened(tmp_path: Path) -> None:
    """A path is a path: nothing in it is read as part of an address."""
    path = tmp_path / "100% odd name, #ü.db"
    path.touch()
    async with await Database.open(f"sqlite:///{path}") as db:
        await db.ping()
        await db.write(lambda connection: connection.execute(text("CREATE TABLE t (i int)")) and 1)
    assert path.stat().st_size


async def test_a_write_is_whole_or_not_at_all(db: Database) -> None:
    """What is written before an error is taken back, and the error comes through."""

    def fails(connection: Connection) -> None:
        keep(connection, "half")
        raise LookupError("no")

    with pytest.raises(LookupError):
        await db.write(fails)
    assert await db.write(lambda connection: keep(connection, "whole")) is None
    assert await names(db) == ["whole"]


async def test_a_lost_race_is_run_again(db: Database) -> None:
    """Work that found someone else quicker is rolled back and done again, and not for ever."""
    tries: list[int] = []

    def third_time(connection: Connection) -> int:
        tries.append(len(tries))
        keep(connection, f"try {len(tries)}")
        if len(tries) < 3:
            raise WriteConflict
        return len(tries)

    assert await db.write(third_time) == 3
    assert await names(db) == ["try 3"]

    def never(connection: Connection) -> None:
        raise WriteConflict

    with pytest.raises(StoreUnavailable):
        await db.write(never)


async def test_deadlocks_are_resolved(postgres_url: str) -> None:
    """Where two transactions do wait for each other, one is run again and both come through."""
    async with await Database.open(postgres_url) as db:
        for name in "ab":
            await db.write(lambda connection, name=name: keep(connection, name))
        both = asyncio.Barrier(2)
        began: set[str] = set()

        def touch(connection: Connection, first: str, second: str) -> None:
            # Longer than the server waits before it looks for a deadlock.
            connection.execute(text("SET LOCAL lock_timeout = '4s'"))
            update = text("UPDATE leases SET holder = holder || :who WHERE name = :name")
            connection.execute(update, {"who": first, "name": first})
            if first not in began:  # the second attempt finds nobody to meet
                began.add(first)
                await_(both.wait())
            connection.execute(update, {"who": first, "name": second})

        await asyncio.gather(
            db.write(lambda connection: touch(connection, "a", "b")),
            db.write(lambda connection: touch(connection, "b", "a")),
        )
        async with db.read() as connection:
            holders = (await connection.execute(select(leases.c.holder))).scalars().all()
    assert [sorted(holder) for holder in holders] == [["a", "b", "h"]] * 2


async def test_what_the_database_refuses_is_said_without_rows(db: Database) -> None:
    """An error names the fault; other people's text stays out of it."""
    await db.write(lambda connection: keep(connection, "private words"))
    with pytest.raises(StoreError) as caught:
        await db.write(lambda connection: keep(connection, "private words"))
    assert not isinstance(caught.value, StoreUnavailable)
    assert "private words" not in str(caught.value)
    cause = caught.value.__cause__
    assert cause is not None
    assert "private words" not in str(cause).splitlines()[0]


async def test_one_moment_is_read(db: Database) -> None:
    """All queries of one read see the same state, whatever is written meanwhile."""
    async with db.read() as connection:
        first = (await connection.execute(select(leases.c.name))).scalars().all()
        await db.write(lambda c: keep(c, "meanwhile"))
        second = (await connection.execute(select(leases.c.name))).scalars().all()
    assert first == second == []


async def test_a_closed_database_makes_no_connection(database_url: str) -> None:
    """Anyone who comes late is told, and nothing is left open behind."""
    async with await Database.open(database_url) as db:
        await db.ping()
    with pytest.raises(StoreUnavailable, match="closed"):
        await db.ping()
    with pytest.raises(StoreUnavailable, match="closed"):
        await db.write(lambda connection: connection.execute(text("SELECT 1")).scalar())


async def test_a_server_that_hangs_up_on_a_new_connection_is_unavailable(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the connection is lost between its handshake and its first use, as at a shutdown of the
    server, that is told in the tracker's own words."""
    connect = engine.connect_postgres

    async def connect_in_vain(*args: Any, **options: Any) -> Any:
        connection = await connect(*args, **options)
        connection.terminate()
        return connection

    monkeypatch.setattr(engine, "connect_postgres", connect_in_vain)
    async with await Database.open(postgres_url) as db:
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            await names(db)
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            await db.write(lambda connection: keep(connection, "one"))


async def test_a_statement_that_took_too_long_costs_no_connection(postgres_url: str) -> None:
    """The server has ended it alone: its connection is good for the next one. One that is ended
    itself is not used again."""
    who = "SELECT pg_backend_pid()"
    async with await Database.open(postgres_url, times=DatabaseTimes(statement=0.3)) as db:
        before = await db.send(who, ())
        with pytest.raises(StoreBusy):
            await db.send("SELECT pg_sleep(2)", ())
        assert await db.send(who, ()) == before
        assert not db.refuses_writes
        with pytest.raises(StoreUnavailable):
            await db.send("SELECT pg_terminate_backend(pg_backend_pid())", ())
        assert await db.send(who, ()) != before
