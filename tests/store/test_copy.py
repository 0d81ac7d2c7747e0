"""A copy to another database holds everything that the first one does, or nothing."""

import asyncio
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, inspect, text

from tests.store.every_value import Rows, every_value, everything, fill, in_order
from tests.store.making import callback, open_writer
from tests.support.databases import Background, copy_sqlite, sqlite_url_of
from tests.support.forked import run_python
from tests.support.waiting import eventually
from tracker.core.errors import SchemaOutdated, SettingsError, StoreError, StoreUnavailable
from tracker.store import migrate
from tracker.store.copy import TABLES, Step, copy
from tracker.store.engine import Database, migration_engine
from tracker.store.errors import StoreBusy
from tracker.store.schema import sessions
from tracker.store.url import DatabaseTimes, DatabaseUrl

pytestmark = pytest.mark.usefixtures("patient")

ROOT = Path(__file__).parents[2]
EMPTY: Rows = {table.name: [] for table in TABLES}


async def on(url: str, work: Callable[[Connection], Any]) -> Any:
    """Run `work` over a connection that may do anything, and commit."""
    engine = migration_engine(DatabaseUrl.parse(url))
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


@pytest.fixture
def sqlite_target_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """Another SQLite file, migrated and empty."""
    copy_sqlite(_sqlite_template, tmp_path / "target.db")
    return sqlite_url_of(tmp_path / "target.db")


@pytest.fixture(params=["sqlite_target", "postgres"])
def target_url(request: pytest.FixtureRequest) -> str:
    """Another database, migrated and empty, on each engine."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
async def full_url(database_url: str) -> str:
    """A database with rows in every table, on each engine."""
    await fill(database_url, every_value())
    return database_url


@pytest.fixture
async def full_sqlite_url(sqlite_url: str) -> str:
    """A SQLite file with rows in every table."""
    await fill(sqlite_url, every_value())
    return sqlite_url


def test_every_column_has_a_value_and_is_null() -> None:
    """The rows of these tests leave no column out, and no NULL that may be."""
    rows = every_value()
    for table in TABLES:
        for column in table.c:
            values = [row[column.key] for row in rows[table.name]]
            where = f"{table.name}.{column.name}"
            assert any(value is not None for value in values), where
            assert column.nullable == (None in values), where


@pytest.mark.parametrize(
    ("database_url", "empty_database_url"),
    [
        pytest.param("sqlite", "sqlite", marks=pytest.mark.thorough),
        ("sqlite", "postgres"),
        # In `make test` by `test_there_and_back_changes_nothing`.
        pytest.param("postgres", "sqlite", marks=pytest.mark.thorough),
        pytest.param("postgres", "postgres", marks=pytest.mark.thorough),
    ],
    indirect=True,
)
async def test_everything_is_carried_over(full_url: str, empty_database_url: str) -> None:
    """From each engine to each, every table, row and column is there, whatever is in it; a target
    without tables gets them. Rows go a few at a time."""
    steps: list[Step] = []
    copied = await copy(full_url, empty_database_url, progress=steps.append, at_a_time=2)
    expected = {table.name: in_order(table, every_value()[table.name]) for table in TABLES}
    assert await everything(empty_database_url) == expected
    assert copied.tables == {table.name: 3 for table in TABLES}
    assert copied.compared == 3 * len(TABLES)
    assert (copied.migrated, copied.revision) == (True, migrate.head())
    assert [(step.rows, step.total) for step in steps] == [(2, 3), (3, 3)] * len(TABLES)


async def test_every_table_of_the_database_is_copied(database_url: str) -> None:
    """Migrations make no table that a copy leaves out, and no column; but for sign-ins, which a
    backup would bring back after they ended."""

    def found(connection: Connection) -> dict[str, set[str]]:
        inspector = inspect(connection)
        names = set(inspector.get_table_names()) - {"alembic_version", sessions.name}
        return {name: {one["name"] for one in inspector.get_columns(name)} for name in names}

    assert await on(database_url, found) == {
        table.name: {one.name for one in table.c} for table in TABLES
    }


async def test_there_and_back_changes_nothing(
    full_sqlite_url: str, postgres_url: str, tmp_path: Path
) -> None:
    """Over PostgreSQL and back, a SQLite file holds the very values that the tracker had written,
    of the same storage classes, and is in the mode that the tracker uses."""
    back = tmp_path / "back.db"
    await copy(full_sqlite_url, postgres_url)
    await copy(postgres_url, f"sqlite:///{back}")

    def raw(path: str | Path) -> dict[str, list[Any]]:
        with closing(sqlite3.connect(path)) as file:
            return {
                table.name: sorted(
                    (
                        tuple((type(value).__name__, value) for value in row)
                        for row in file.execute(f"SELECT * FROM {table.name}")
                    ),
                    key=repr,
                )
                for table in TABLES
            }

    assert raw(back) == raw(DatabaseUrl.parse(full_sqlite_url).path)
    with closing(sqlite3.connect(back)) as file:
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_numbers_go_on_after_the_highest(full_sqlite_url: str, target_url: str) -> None:
    """What is written to the copy gets numbers that no row has yet, and a tracker can go on."""
    assert not (await copy(full_sqlite_url, target_url)).migrated
    async with await Database.open(target_url) as db:
        await migrate.check(db)
        async with open_writer(db) as writer:
            await writer.submit(callback("run_new"))
    events = (await everything(target_url))["run_events"]
    assert [event["id"] > 2**40 for event in events if event["run_id"] == "run_new"] == [True]


async def test_a_target_with_rows_is_refused(full_sqlite_url: str, target_url: str) -> None:
    """What is there is neither mixed nor overwritten."""
    async with await Database.open(target_url) as db, open_writer(db) as writer:
        await writer.submit(callback("run_theirs"))
    before = await everything(target_url)
    with pytest.raises(StoreError, match=r"is not empty \(deliveries has rows\)"):
        await copy(full_sqlite_url, target_url)
    assert await everything(target_url) == before


@pytest.mark.parametrize(
    ("revision", "error", "said"),
    [
        ("0001", SchemaOutdated, "run `tracker db upgrade` with it as TRACKER_DATABASE_URL"),
        ("9999", StoreError, "copy with the version that made it"),
    ],
)
@pytest.mark.parametrize("which", ["source", "target"])
async def test_another_revision_is_refused(
    revision: str,
    error: type[StoreError],
    said: str,
    which: str,
    sqlite_url: str,
    sqlite_target_url: str,
) -> None:
    """Rows of an older or a later schema are not guessed at, on either side; which one is said."""
    urls = {"source": sqlite_url, "target": sqlite_target_url}
    await fill(sqlite_target_url, every_value())
    set_to = text(f"UPDATE alembic_version SET version_num = '{revision}'")
    await on(urls[which], lambda connection: connection.execute(set_to))
    with pytest.raises(error) as caught:
        await copy(*urls.values())
    assert str(caught.value).startswith(
        f"the {which} {DatabaseUrl.parse(urls[which])}: it is at revision {revision}"
    )
    assert str(caught.value).endswith(said)


async def test_a_target_that_was_migrated_in_part_is_migrated_further(
    sqlite_url: str, empty_database_url: str
) -> None:
    """A copy that was killed while it made the tables is simply repeated."""
    await migrate.upgrade(empty_database_url, migrate.known()[-3])
    copied = await copy(sqlite_url, empty_database_url)
    assert (copied.migrated, copied.revision) == (True, migrate.head())
    assert await migrate.current(empty_database_url) == migrate.head()


async def test_what_cannot_be_a_source_is_said(sqlite_url: str, tmp_path: Path) -> None:
    """A file that is missing or has no tables, or twice the same database; nothing is made."""
    target = f"sqlite:///{tmp_path / 'target.db'}"
    with pytest.raises(StoreError, match="there is no such file"):
        await copy(f"sqlite:///{tmp_path / 'missing.db'}", target)
    (tmp_path / "bare.db").touch()
    with pytest.raises(StoreError, match="there are no tables of the tracker"):
        await copy(f"sqlite:///{tmp_path / 'bare.db'}", target)
    with pytest.raises(SettingsError, match="cannot be copied to itself"):
        await copy(sqlite_url, sqlite_url.replace("tracker.db", "./tracker.db"))
    assert not (tmp_path / "target.db").exists()
    assert not (tmp_path / "missing.db").exists()


async def test_a_copy_that_is_cancelled_leaves_nothing(
    full_sqlite_url: str, target_url: str
) -> None:
    """After Ctrl-C the target is empty, and the same command does it."""
    task = asyncio.current_task()
    assert task is not None

    def interrupt(step: Step) -> None:
        if step.table == "runs":
            task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await copy(full_sqlite_url, target_url, progress=interrupt)
    task.uncancel()
    assert await everything(target_url) == EMPTY
    await copy(full_sqlite_url, target_url)
    assert len((await everything(target_url))["run_events"]) == 3


DYING = """
import asyncio, os, sys
from tracker.store import copy as copy_module
from tracker.store.copy import copy
copy_module.CACHE_KB = 20
asyncio.run(copy(*sys.argv[1:], progress=lambda step: step.table == "run_events" and os._exit(9)))
"""


async def test_a_copy_that_is_killed_leaves_nothing(full_sqlite_url: str, target_url: str) -> None:
    """Nor does one whose process dies with nearly all rows written, to the disk too."""
    command = ("-c", DYING, full_sqlite_url, target_url)
    done = await asyncio.to_thread(run_python, *command, env=os.environ, cwd=ROOT)
    assert done.returncode == 9
    if target_url.startswith("sqlite"):
        journal = Path(f"{DatabaseUrl.parse(target_url).path}-journal")
        assert journal.stat().st_size > 0
    assert await everything(target_url) == EMPTY

    async def again() -> bool:
        try:
            await copy(full_sqlite_url, target_url)
        except StoreBusy:  # the server has not noticed yet that the other one is gone
            return False
        return True

    assert await eventually(again)


async def test_a_copy_is_of_one_moment(
    full_url: str, sqlite_target_url: str, background: Background
) -> None:
    """What is written to the source while it is read is not in the copy, not even a part of it."""

    async def write() -> None:
        async with await Database.open(full_url) as db, open_writer(db) as writer:
            await writer.submit(callback("run_late"))

    def meanwhile(step: Step) -> None:
        if step.table == "deliveries":
            background.run(write())

    await copy(full_url, sqlite_target_url, progress=meanwhile)
    copied, source = await everything(sqlite_target_url), await everything(full_url)
    assert {name: len(rows) for name, rows in copied.items()} == {t.name: 3 for t in TABLES}
    assert len(source["runs"]) == len(source["run_events"]) == len(source["deliveries"]) == 4


async def test_a_file_that_someone_has_open_is_no_target(
    full_sqlite_url: str, sqlite_target_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker that was started on it too early is noticed before anything is written."""
    async with await Database.open(sqlite_target_url) as db:
        await migrate.check(db)
        with monkeypatch.context() as impatient:
            impatient.setattr("tracker.store.url.TIMES", DatabaseTimes(long_busy=0.1))
            with pytest.raises(StoreUnavailable, match=r"target\.db: .*locked"):
                await copy(full_sqlite_url, sqlite_target_url)
    await copy(full_sqlite_url, sqlite_target_url)


async def test_nobody_writes_to_the_target_meanwhile(
    full_sqlite_url: str, postgres_url: str, background: Background
) -> None:
    """A tracker that was started on the target too early has to wait, in every table."""

    async def write(table: str) -> None:
        connection = await asyncpg.connect(postgres_url)
        try:
            await connection.execute("SET lock_timeout = '20ms'")
            await connection.execute(f"DELETE FROM {table}")
        finally:
            await connection.close()

    def meanwhile(step: Step) -> None:
        with pytest.raises(asyncpg.LockNotAvailableError):
            background.run(write(step.table))

    await copy(full_sqlite_url, postgres_url, progress=meanwhile)


LOSSES = {
    "a row": (
        "BEFORE INSERT ON batches WHEN NOT EXISTS (SELECT 1 FROM batches)",
        "SELECT RAISE(IGNORE)",
        "the copy has",
    ),
    "a value": (
        "AFTER INSERT ON batches",
        "UPDATE batches SET columns = NULL WHERE rowid = NEW.rowid",
        "the copy has",
    ),
    "a letter": (
        "AFTER INSERT ON batches WHEN NEW.workspace_slot = 'plain'",
        "UPDATE batches SET workspace_slot = 'plai' WHERE rowid = NEW.rowid",
        "workspace_slot of a row is not what the source has",
    ),
}
"""When a target loses it, how, and what the error says."""


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_copy_that_is_not_the_same_is_not_kept(
    loss: str, full_sqlite_url: str, sqlite_target_url: str
) -> None:
    """Should a row, a value or a letter go missing on the way, nothing is committed."""
    when, how, said = LOSSES[loss]
    with closing(sqlite3.connect(DatabaseUrl.parse(sqlite_target_url).path)) as file:
        file.execute(f"CREATE TRIGGER loses {when} BEGIN {how}; END")
    with pytest.raises(StoreError, match=said):
        await copy(full_sqlite_url, sqlite_target_url)
    assert await everything(sqlite_target_url) == EMPTY


async def test_rows_without_their_run_are_not_copied(full_sqlite_url: str, target_url: str) -> None:
    """A source that someone has deleted from by hand is refused, with the table's name."""
    with closing(sqlite3.connect(DatabaseUrl.parse(full_sqlite_url).path)) as file:
        file.execute("DELETE FROM batches")  # sqlite3 checks no foreign keys by itself
        file.commit()
    with pytest.raises(StoreError, match=r"batch_rows: .*(?i:foreign key constraint)"):
        await copy(full_sqlite_url, target_url)
    assert await everything(target_url) == EMPTY
