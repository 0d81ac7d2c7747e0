"""The database, in every state that a deployment may find it in."""

import asyncio
import re
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from sqlalchemy import text

from tests.doctor.conftest import Report, look
from tests.doctor.pooler import losing_notices, taking_no_settings
from tests.support.disk import CannotMount, SmallDisk
from tests.support.postgres import PostgresServer
from tests.support.waiting import free_port
from tracker.core.clock import utc_now
from tracker.core.errors import StoreError
from tracker.operations.doctor import Level, database
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.inspection import inspect_postgres
from tracker.store.url import DatabaseUrl


async def _look(url: str) -> Report:
    return await look(TRACKER_DATABASE_URL=url, FLORA_BASE_URL="http://127.0.0.1:9/api/v1")


async def _check(url: str, *, patience: float) -> Report:
    """What the check of the database alone finds."""
    found = await database.check(DatabaseUrl.parse(url), clock=utc_now, patience=patience)
    return Report({one.name: one for one in found.findings})


async def _at(url: str, revision: str) -> None:
    """Let the database say that it is at that revision."""
    statement = f"UPDATE alembic_version SET version_num = '{revision}'"
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            connection.execute(statement)
            connection.commit()
        return
    await _execute(url, statement)


async def _execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def test_a_sound_database_accepts_a_row_and_none_is_left(database_url: str) -> None:
    """The check writes a row and leaves none."""
    report = await _look(database_url)
    assert report.level("database") is Level.OK
    assert "accepts writes" in report["database"].seen
    assert report.level("migrations") is Level.OK
    assert report.level("disk") is Level.OK


async def test_a_database_of_a_later_version_is_checked_too(database_url: str) -> None:
    """A schema that this version does not know is a warning, and the rest is checked too."""
    await _at(database_url, "9999")
    report = await _look(database_url)
    assert report.level("migrations") is Level.WARNING
    assert "later than this version" in report["migrations"].seen
    assert "Install the new version" in report["migrations"].advice
    assert report.level("conflicts") is Level.OK


async def test_a_database_that_lacks_migrations_fails_and_nothing_is_migrated(
    database_url: str,
) -> None:
    """An older schema, and one without tables, are told apart by what they say; they stay."""
    await _at(database_url, "0002")
    for _ in range(2):
        report = await _look(database_url)
        assert report.level("migrations") is Level.FAILED
        assert "is at 0002" in report["migrations"].seen
        assert "`tracker db upgrade`" in report["migrations"].advice
        assert report.level("worker") is Level.WARNING


async def test_an_empty_database_names_the_command_for_its_tables(empty_postgres_url: str) -> None:
    """No tables at all: the command that makes them is named."""
    report = await _look(empty_postgres_url)
    assert report.level("database") is Level.OK
    assert report.level("migrations") is Level.FAILED
    assert report["migrations"].advice == "Run `tracker db upgrade`."


def _missing(path: Path) -> None:
    path.unlink()


def _no_folder(path: Path) -> None:
    path.unlink()
    path.parent.rename(path.parent.with_name("elsewhere"))


def _other_file(path: Path) -> None:
    path.write_text("a file of another kind, long enough to be read as a header of one\n" * 20)


@pytest.mark.parametrize(
    ("spoil", "seen", "advice"),
    [
        (_missing, "There is no ", "run the doctor in the same folder"),
        (_no_folder, "its folder is missing", "Create the folder"),
        (_other_file, "not a database", "PRAGMA quick_check"),
    ],
)
async def test_a_file_that_is_no_database_is_not_made_one(
    sqlite_url: str, spoil: Callable[[Path], None], seen: str, advice: str
) -> None:
    """The fault of the file is reported, and the check creates nothing."""
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    spoil(path)
    before = path.exists() and path.read_bytes()
    report = await _look(sqlite_url)
    assert report.level("database") is Level.FAILED
    assert seen in report["database"].seen
    assert advice in report["database"].advice
    assert (path.exists() and path.read_bytes()) == before


async def test_a_locked_file_is_reported(sqlite_url: str) -> None:
    """The advice names the command that shows which process holds the file."""
    path = sqlite_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("BEGIN IMMEDIATE")
        report = await _check(sqlite_url, patience=0.1)
    assert report.level("database") is Level.FAILED
    assert "does not accept writes: database is locked" in report["database"].seen
    assert f"fuser {path}" in report["database"].advice


async def test_a_file_that_lost_its_write_ahead_log_is_warned_of(sqlite_url: str) -> None:
    """Another journal mode than ours works worse, which is a warning."""
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    report = await _look(sqlite_url)
    assert report.level("database") is Level.WARNING
    assert "journal mode delete" in report["database"].seen


async def test_a_disk_that_is_nearly_full_or_read_only_fails(
    sqlite_url: str,
) -> None:
    """A disk fails before it is full; a read-only file system is named."""
    try:
        with SmallDisk(8) as disk:
            path = disk.path / "tracker.db"
            path.write_bytes(Path(sqlite_url.removeprefix("sqlite:///")).read_bytes())
            report = await _look(f"sqlite:///{path}")
            assert report.level("database") is Level.OK
            assert report.level("disk") is Level.FAILED
            assert re.search(r"\d MiB are free", report["disk"].seen)
            assert "tracker db prune" in report["disk"].advice
            with closing(sqlite3.connect(path)) as tracker:  # it has SQLite's log open
                tracker.execute("UPDATE alembic_version SET version_num = version_num")
                tracker.commit()
                disk.fill()
                report = await _look(f"sqlite:///{path}")
            assert "does not accept writes: database or disk is full" in report["database"].seen
            assert "first free 64 MiB there by other files" in report["database"].advice
            disk.clear()
            disk.read_only(True)
            report = await _look(f"sqlite:///{path}")
            assert report.level("database") is Level.FAILED
            assert "mounted read-only" in report["database"].advice
    except CannotMount as error:
        pytest.skip(str(error))


async def test_a_server_that_cannot_be_used_has_its_own_advice(postgres_url: str) -> None:
    """Not there, no such database, no such user, a pooler that takes no settings: each has its own
    advice, and everything else is checked too."""
    name = postgres_url.rpartition("/")[2]
    cases = [
        (
            f"postgresql://u:hidden@127.0.0.1:{free_port()}/x",
            "cannot be reached",
            "the server is up",
        ),
        (postgres_url.replace(name, "nowhere"), "does not exist", "the database's name"),
        (postgres_url.replace("postgres@", "nobody:hidden@"), "nobody", "user or the password"),
    ]
    async with taking_no_settings(postgres_url) as pooler:
        cases.append((pooler, "unsupported startup", "ignore_startup_parameters"))
        for url, seen, advice in cases:
            report = await _look(url)
            assert report.level("database") is Level.FAILED
            assert seen in report["database"].seen
            assert advice in report["database"].advice
            assert "hidden" not in str(report)
            assert report.level("worker") is Level.WARNING
            assert "migrations" not in report


async def test_a_pooler_that_loses_notifications_is_detected(postgres_url: str) -> None:
    """Where what is notified is not heard, it is a warning that says how late work is noticed."""
    async with losing_notices(postgres_url) as url:
        report = await _check(url, patience=0.3)
    assert report.level("database") is Level.OK
    assert report.level("notifications") is Level.WARNING
    assert "pool_mode = session" in report["notifications"].advice


async def test_a_server_that_accepts_no_writes_fails(postgres_url: str) -> None:
    """A database that is read-only for new sessions fails although it answers."""
    name = postgres_url.rpartition("/")[2]
    await _execute(postgres_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    report = await _look(postgres_url)
    assert report.level("database") is Level.FAILED
    assert "does not accept writes: cannot execute INSERT in a read-only" in report["database"].seen
    assert "default_transaction_read_only" in report["database"].advice


@asynccontextmanager
async def _role(url: str, *grants: str) -> AsyncIterator[str]:
    """A role of its own with these rights alone; the URL with which it connects."""
    role = f"doctor_{secrets.token_hex(4)}"
    await _execute(url, f"CREATE ROLE {role} LOGIN", *(f"{grant} TO {role}" for grant in grants))
    try:
        yield url.replace("postgres@", f"{role}@")
    finally:
        await _execute(url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_a_role_without_rights_learns_which_tables_and_what_to_grant(
    postgres_url: str,
) -> None:
    """A role that may read alone, and one that may not even read, fail with what to grant."""
    async with _role(postgres_url, "GRANT SELECT ON ALL TABLES IN SCHEMA public") as url:
        report = await _look(url)
    assert report.level("database") is Level.FAILED
    assert "batch_rows, batches, deliveries" in report["database"].seen
    assert "GRANT SELECT, INSERT" in report["database"].advice
    async with _role(postgres_url) as url:
        report = await _look(url)
    assert report.level("database") is Level.FAILED
    assert "permission denied" in report["database"].seen
    assert "GRANT" in report["database"].advice


async def test_the_limit_of_a_role_or_database_counts_where_it_is_closer(postgres_url: str) -> None:
    """Managed servers set these: the server's own limit is never reached."""
    grants = ["GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public"]
    async with _role(postgres_url, *grants) as url:
        role, name = urlsplit(url).username, postgres_url.rpartition("/")[2]
        await _execute(postgres_url, f"ALTER ROLE {role} CONNECTION LIMIT 6")
        async with await Database.open(url) as opened:
            await asyncio.gather(*(opened.fetch(text("SELECT pg_sleep(0.2)")) for _ in range(4)))
            report = await _check(url, patience=2)
        assert report.level("database") is Level.WARNING
        assert "of 6 connections are in use" in report["database"].seen
        assert "CONNECTION LIMIT" in report["database"].advice
        await _execute(postgres_url, f"ALTER ROLE {role} CONNECTION LIMIT -1")
        await _execute(postgres_url, f'ALTER DATABASE "{name}" CONNECTION LIMIT 50')
        assert "of 50 connections are in use" in (await _check(url, patience=2))["database"].seen


async def test_the_limit_with_the_greatest_share_in_use_counts(postgres_url: str) -> None:
    """A limit that is nearly used up is reported, also where another has fewer connections left."""
    grants = ["GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public"]
    async with _role(postgres_url, *grants) as url, AsyncExitStack() as stack:
        role, name = urlsplit(url).username, postgres_url.rpartition("/")[2]
        await _execute(postgres_url, f"ALTER ROLE {role} CONNECTION LIMIT 4")
        await _execute(postgres_url, f'ALTER DATABASE "{name}" CONNECTION LIMIT 20')
        for _ in range(15):
            connection = await asyncpg.connect(postgres_url)
            stack.push_async_callback(connection.close)
        report = await _check(url, patience=2)
    assert report.level("database") is Level.WARNING
    assert "of 20 connections are in use" in report["database"].seen


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_that_cannot_hold_every_text_is_refused(
    own_postgres: PostgresServer, encoding: str
) -> None:
    """An empty one gets no tables; one that has them from an earlier version works on, and the
    advice says how to leave it."""
    create = f"CREATE DATABASE other ENCODING '{encoding}' TEMPLATE template0"
    await _execute(own_postgres.url(), create)
    url = own_postgres.url("other")
    with pytest.raises(StoreError, match=f"the encoding {encoding}: .* ENCODING 'UTF8'"):
        await migrate.upgrade(url)
    assert await migrate.current(url) is None
    report = await _check(url, patience=2)
    assert report.level("database") is Level.FAILED
    assert f"has the encoding {encoding}" in report["database"].seen
    assert "tracker db copy" in report["database"].advice
    place = DatabaseUrl.parse(url)
    found = await inspect_postgres(place, clock=utc_now, patience=2)
    found = replace(found, refuses_writes="No space left on device")
    acute = database.judge_postgres(place, found).findings[0]
    assert "does not accept writes" in acute.seen, "what is urgent comes first"


async def test_a_standby_is_told_from_its_primary(own_postgres: PostgresServer) -> None:
    """A replica accepts no writes; the advice says how to name both servers."""
    own_postgres.stop()
    (own_postgres.data / "standby.signal").touch()
    own_postgres.hand_over(own_postgres.data)
    own_postgres.start()
    report = await _look(own_postgres.url("tracker"))
    assert report.level("database") is Level.FAILED
    assert "is a standby" in report["database"].seen
    assert "target_session_attrs=read-write" in report["database"].advice
    assert "notifications" not in report
    assert report.level("conflicts") is Level.OK, "what can be read is checked"


@pytest.mark.parametrize(
    ("mode", "level"),
    [
        ("", Level.FAILED),
        ("?sslmode=require", Level.FAILED),
        ("?sslmode=disable", Level.WARNING),
        ("?sslmode=verify-full", Level.OK),
    ],
)
async def test_a_server_that_is_not_verified_fails(
    postgres_url: str, mode: str, level: Level
) -> None:
    """On another machine; where TLS is switched off on purpose it is a warning."""
    seen = await inspect_postgres(DatabaseUrl.parse(postgres_url), clock=utc_now)
    url = DatabaseUrl.parse(f"postgresql://tracker:secret@db.example.com/tracker{mode}")
    findings = {one.name: one for one in database.judge_postgres(url, seen).findings}
    assert findings["database TLS"].level is level
    local = database.judge_postgres(DatabaseUrl.parse(postgres_url), seen)
    assert "database TLS" not in {one.name for one in local.findings}


async def test_a_crowded_server_and_an_old_one_are_reported(postgres_url: str) -> None:
    """A server with few connections left is a warning, one that is too old fails."""
    url = DatabaseUrl.parse(postgres_url)
    seen = await inspect_postgres(url, clock=utc_now)
    crowded = database.judge_postgres(url, replace(seen, connections=seen.most_connections - 1))
    assert crowded.findings[0].level is Level.WARNING
    assert "Raise max_connections" in crowded.findings[0].advice
    old = database.judge_postgres(url, replace(seen, major=12, version="12.3"))
    assert old.findings[0].level is Level.FAILED
    assert "PostgreSQL 13 or newer" in old.findings[0].advice
