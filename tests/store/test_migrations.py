"""Migrations give exactly the schema that the code describes, from nothing and only once."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from tests.support.forked import Forked
from tracker.core.errors import SchemaOutdated, StoreUnavailable
from tracker.store import migrate
from tracker.store.engine import Database, migration_engine
from tracker.store.schema import metadata
from tracker.store.url import DatabaseUrl

ROOT = Path(__file__).parents[2]


async def on(url: str, work: Any) -> Any:
    """Run `work` over a connection that may do anything, and commit."""
    engine = migration_engine(DatabaseUrl.parse(url))
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


def schema(connection: Connection) -> dict[str, list[str]]:
    """All that the database itself says about the tables: columns, checks, keys, indexes."""
    queries = _SQLITE if connection.dialect.name == "sqlite" else _POSTGRES
    return {
        name: sorted(" | ".join(map(str, row)) for row in connection.execute(text(query)))
        for name, query in queries.items()
    }


_SQLITE = {
    "columns": "SELECT m.name, p.name, p.type, p.'notnull', p.dflt_value, p.pk "
    "FROM sqlite_master m, pragma_table_info(m.name) p "
    "WHERE m.type = 'table' AND m.name <> 'alembic_version'",
    "indexes": "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL",
    "keys": "SELECT m.name, f.'table', f.'from', f.'to', f.on_delete FROM sqlite_master m, "
    "pragma_foreign_key_list(m.name) f WHERE m.type = 'table'",
}
_POSTGRES = {
    "columns": "SELECT table_name, column_name, data_type, is_nullable, column_default, "
    "is_identity, identity_generation FROM information_schema.columns JOIN "
    "information_schema.tables USING (table_schema, table_name) WHERE table_type = 'BASE TABLE' "
    "AND table_schema = 'public' AND table_name <> 'alembic_version'",
    "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' "
    "AND tablename <> 'alembic_version'",
    "constraints": "SELECT conrelid::regclass, conname, pg_get_constraintdef(oid) "
    "FROM pg_constraint WHERE connamespace = 'public'::regnamespace "
    "AND conrelid IS DISTINCT FROM to_regclass('public.alembic_version')",
    "options": "SELECT relname, array_to_string(reloptions, ',') FROM pg_class "
    "WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' "
    "AND relname <> 'alembic_version'",
}


def checks(connection: Connection) -> list[str]:
    """SQLite keeps CHECKs in the text of the table alone: their lines, by table."""
    rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
    return sorted(
        f"{name} {line.strip().rstrip(',')}"
        for name, sql in rows
        for line in sql.splitlines()
        if "CONSTRAINT" in line and name != "alembic_version"
    )


# Expressions in SQLite's indexes are not reflected; the next test compares their text.
@pytest.mark.filterwarnings("ignore:.*expression-based index")
async def test_migrations_give_what_the_models_say(database_url: str) -> None:
    """Alembic finds no difference between a migrated database and the models."""

    def differences(connection: Connection) -> Any:
        def is_here(one: Any, *_: Any) -> bool:  # what only one of the databases has
            dialect: str = connection.dialect.name
            return bool(one.info.get("dialect", dialect) == dialect)

        # SQLite has no identity columns, which Alembic would take for a difference.
        options = {"compare_server_default": connection.dialect.name == "postgresql"}
        options |= {"include_object": is_here}
        context = MigrationContext.configure(connection, opts=options)
        return compare_metadata(context, metadata)

    assert await on(database_url, differences) == []


async def test_migrations_give_what_create_all_gives(
    database_url: str, empty_postgres_url: str, empty_sqlite_url: str
) -> None:
    """What Alembic does not compare is the same too: CHECKs, partial indexes, storage options."""
    empty = empty_sqlite_url if database_url.startswith("sqlite") else empty_postgres_url
    await on(empty, metadata.create_all)
    assert await on(database_url, schema) == await on(empty, schema)
    if database_url.startswith("sqlite"):
        assert await on(database_url, checks) == await on(empty, checks)


async def test_an_upgrade_from_nothing_and_once_more(empty_database_url: str) -> None:
    """From an empty database to the newest revision; a second time nothing happens."""
    assert await migrate.current(empty_database_url) is None
    await migrate.upgrade(empty_database_url)
    assert await migrate.current(empty_database_url) == migrate.head()
    before = await on(empty_database_url, schema)
    await migrate.upgrade(empty_database_url)
    assert await on(empty_database_url, schema) == before
    async with await Database.open(empty_database_url) as db:
        await migrate.check(db)


async def test_processes_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    """All but one wait while the file is changed to write-ahead logging, which SQLite does not."""
    for number in range(10):
        url = f"sqlite:///{tmp_path}/{number}.db"
        modes = await asyncio.gather(*(on(url, journal_mode) for _ in range(4)))
        assert modes == ["wal"] * 4


def journal_mode(connection: Connection) -> str:
    """How the file is written."""
    return str(connection.scalar(text("PRAGMA journal_mode")))


async def test_checking_creates_nothing(empty_sqlite_url: str, tmp_path: Path) -> None:
    """Asking for the revision of a file that is not there does not make it."""
    assert await migrate.current(empty_sqlite_url) is None
    assert list(tmp_path.iterdir()) == []


async def test_processes_that_upgrade_at_once_agree(
    empty_database_url: str, tmp_path: Path
) -> None:
    """Several processes may find an empty database together: one migrates, the others wait."""
    output = tmp_path / "upgrades.log"
    environment = {"TRACKER_DATABASE_URL": empty_database_url}
    processes = [Forked.begin("db", "upgrade", env=environment, output=output) for _ in range(3)]
    assert [await process.wait() for process in processes] == [0, 0, 0], output.read_text()
    assert await migrate.current(empty_database_url) == migrate.head()


@pytest.mark.parametrize(
    "empty_database_url",
    ["sqlite", pytest.param("postgres", marks=pytest.mark.thorough)],
    indirect=True,
)
async def test_upgrades_within_one_process_agree(empty_database_url: str) -> None:
    """So may several tasks of one process."""
    await asyncio.gather(*(migrate.upgrade(empty_database_url) for _ in range(3)))
    assert await migrate.current(empty_database_url) == migrate.head()


@pytest.fixture
def bare_database_url(empty_database_url: str) -> str:
    """A database that is there, and has nothing in it."""
    if (url := DatabaseUrl.parse(empty_database_url)).path:
        Path(url.path).touch()
    return empty_database_url


async def test_an_old_schema_is_refused_with_advice(bare_database_url: str) -> None:
    """A database without tables is said to be so, and what to do about it."""
    async with await Database.open(bare_database_url) as db:
        with pytest.raises(SchemaOutdated, match="tracker db upgrade"):
            await migrate.check(db)


async def test_an_older_file_is_migrated_when_it_is_opened(empty_database_url: str) -> None:
    """A database on a server is not: other processes may use it."""
    await migrate.upgrade(empty_database_url, migrate.known()[-2])
    opening = migrate.open_database(empty_database_url, history_since=timedelta(days=7))
    if "sqlite" in empty_database_url:
        async with opening as db:
            assert await migrate.revision(db) == migrate.head()
    else:
        with pytest.raises(SchemaOutdated, match=f"needs {migrate.head()}: run `tracker db up"):
            async with opening:
                pass


async def test_a_later_schema_is_fine(database_url: str) -> None:
    """While a newer version is being rolled out, the older one goes on: it checks, and upgrades
    nothing."""
    later = text("UPDATE alembic_version SET version_num = '9999'")
    await on(database_url, lambda connection: connection.execute(later))
    async with await Database.open(database_url) as db:
        await migrate.check(db)
    await migrate.upgrade(database_url)
    assert await migrate.current(database_url) == "9999"


async def test_a_writer_on_an_old_schema_says_so(bare_database_url: str) -> None:
    """A missing table is told apart from other faults."""
    async with await Database.open(bare_database_url) as db:
        with pytest.raises(SchemaOutdated):
            await db.write(lambda connection: connection.execute(metadata.tables["runs"].select()))


async def test_a_migration_does_not_wait_long_for_a_lock(empty_postgres_url: str) -> None:
    """A migration that would queue behind someone's lock gives up, and can be tried again."""
    owner = await asyncpg.connect(empty_postgres_url)
    async with owner.transaction():
        await owner.execute("CREATE TABLE runs ()")
        with pytest.raises(StoreUnavailable):
            await migrate.upgrade(empty_postgres_url, patience=0)
        await owner.execute("DROP TABLE runs")
    await owner.close()
    await migrate.upgrade(empty_postgres_url)
    assert await migrate.current(empty_postgres_url) == migrate.head()


async def test_sqlite_writes_ahead_and_to_the_disk(sqlite_url: str, tmp_path: Path) -> None:
    """The file is in WAL mode, and a commit is on the disk before it is answered."""
    async with await Database.open(sqlite_url) as db:
        pragmas = await db.write(
            lambda connection: [
                connection.execute(text(f"PRAGMA {name}")).scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            ]
        )
    assert pragmas == ["wal", 2, 1, 2000]
    with closing(sqlite3.connect(tmp_path / "tracker.db")) as file:
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.fixture
def alembic(empty_sqlite_url: str) -> Any:
    """Runs Alembic's own command line as a developer does."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=ROOT,
            env={**os.environ, "TRACKER_DATABASE_URL": empty_sqlite_url},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.thorough
def test_developers_use_alembic_itself(alembic: Any) -> None:
    """`alembic upgrade head` and `alembic check` work with the file at the top."""
    assert "0001" in alembic("upgrade", "head")
    assert "No new upgrade operations detected" in alembic("check")


async def test_a_file_in_no_directory_is_reported_so(tmp_path: Path) -> None:
    """The error names the directory that is missing; none is made for a mistyped name."""
    with pytest.raises(StoreUnavailable, match=f"there is no directory {tmp_path}/nowhere"):
        await migrate.upgrade(f"sqlite:///{tmp_path}/nowhere/tracker.db")
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    """Its thread calls back into the event loop: one that outlived a command's printed a traceback
    after the error."""
    before = set(threading.enumerate())  # threads of the test before may be about to end
    for _ in range(50):
        with pytest.raises(StoreUnavailable, match="unable to open"):
            await migrate.current(f"sqlite:///{tmp_path}")
        started = set(threading.enumerate()) - before
        assert [one.name for one in started if "worker_thread" in one.name] == []
