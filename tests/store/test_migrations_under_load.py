"""Migrations while the version before is at work: it notices nothing, and none is ever half."""

import asyncio
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import asyncpg
import pytest
import sqlalchemy as sa

from tests.store.test_migrations import ROOT, on, schema
from tests.store.upgrading import OldWriters, revisions
from tests.support.databases import PostgresDatabases, sqlite_url_of
from tests.support.forked import run_python
from tests.support.logs import capture_logs
from tests.support.waiting import START_SECONDS, eventually
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.schema import runs
from tracker.store.url import DatabaseTimes

DEATHS = 3
NEWEST = 3
"""So many revisions are tested where it is not thorough: those before do not change any more."""
# These do some of it beside the work, which no transaction can hold together.
STEP_BY_STEP = {
    path.name[:4]
    for path in (ROOT / "migrations" / "versions").glob("*.py")
    if "autocommit_block" in path.read_text()
}
INVALID = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"


async def completed(db: Database) -> set[str]:
    """The runs that have ended."""
    async with db.read() as connection:
        query = sa.select(runs.c.run_id).where(runs.c.status == "completed")
        return set((await connection.execute(query)).scalars())


@pytest.mark.usefixtures("patient")
@pytest.mark.timeout(180)  # writers at work at each of many steps
@pytest.mark.parametrize(
    "empty_database_url",
    ["postgres", pytest.param("sqlite", marks=pytest.mark.thorough)],
    indirect=True,
)
async def test_the_version_before_notices_no_migration(
    empty_database_url: str, thorough: bool
) -> None:
    """At each step from the first revision to the newest, writers that know only the schema before
    it get no error, wait less than for a lock, and have what they wrote."""
    first, *later = revisions() if thorough else revisions()[-NEWEST - 1 :]
    written: set[str] = set()
    await migrate.upgrade(empty_database_url, first)
    async with await Database.open(empty_database_url) as db:
        for revision in later:
            writers = await OldWriters.knowing(db)
            async with writers.at_work(f"before_{revision}"):
                await migrate.upgrade(empty_database_url, revision)
            assert writers.errors == []
            assert max(writers.waits) < DatabaseTimes().lock
            written.update(writers.written)
        assert await migrate.current(empty_database_url) == migrate.head()
        assert await completed(db) == written


@pytest.mark.usefixtures("patient")
async def test_a_migration_that_waits_lets_others_through(empty_postgres_url: str) -> None:
    """While someone reads a table for long, a migration of it stands aside again and again: those
    who write are kept for less than they wait for a lock, and it is done once the reader has."""
    before, changes_runs = "0002", "0003"
    await migrate.upgrade(empty_postgres_url, before)
    reader = await asyncpg.connect(empty_postgres_url)
    with capture_logs() as logged:
        async with await Database.open(empty_postgres_url) as db, reader.transaction():
            await reader.execute("SELECT FROM runs LIMIT 1")
            writers = await OldWriters.knowing(db)
            async with writers.at_work("during"):
                upgrading = asyncio.create_task(migrate.upgrade(empty_postgres_url, changes_runs))
                await eventually(lambda: logged)
            assert not upgrading.done()
    await reader.close()
    await upgrading
    assert {line["event"] for line in logged} == {"migration.waits"}
    assert writers.errors == []
    assert max(writers.waits) < DatabaseTimes().lock


@pytest.fixture
def empty_databases(
    request: pytest.FixtureRequest, empty_database_url: str, tmp_path: Path, thorough: bool
) -> Iterator[list[str]]:
    """Several databases with nothing in them, on the engine of `empty_database_url`."""
    count = DEATHS + 1 if thorough else 2
    if empty_database_url.startswith("sqlite"):
        yield [sqlite_url_of(tmp_path / f"{number}.db") for number in range(count)]
        return
    made: PostgresDatabases = request.getfixturevalue("postgres_databases")
    with ExitStack() as stack:
        yield [stack.enter_context(made.empty()) for _ in range(count)]


def assert_on_the_way(
    found: dict[str, list[str]], here: dict[str, list[str]], following: dict[str, list[str]]
) -> None:
    """Everything is there that both schemas have, and nothing that neither has."""
    for kind, rows in found.items():
        before, after = set(here[kind]), set(following[kind])
        valid = {row.removesuffix(" NOT VALID") for row in rows}  # it is validated afterwards
        assert before & after <= valid <= before | after


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "empty_database_url",
    ["postgres", pytest.param("sqlite", marks=pytest.mark.thorough)],
    indirect=True,
)
async def test_an_upgrade_that_is_killed_is_not_half(
    empty_databases: list[str], empty_database_url: str
) -> None:
    """Wherever SIGKILL strikes, the schema is a revision's own, whole (or on its way to one that
    does a part beside the work), and the next upgrade ends at the newest."""
    at_once = empty_database_url.startswith("sqlite")
    following = dict(itertools.pairwise([None, *revisions()]))
    command = ("-m", "tests.store.dying_upgrades", *empty_databases)
    done = await asyncio.to_thread(run_python, *command, env=os.environ, cwd=ROOT, timeout=150)
    assert done.returncode == 0, done.stderr
    died_at = [await migrate.current(url) for url in empty_databases[1:]]
    wanted = {*died_at, *map(following.get, died_at), migrate.head()}
    whole: dict[str | None, dict[str, list[str]]] = {None: await on(empty_database_url, schema)}
    for name in revisions():
        if name in wanted:
            await migrate.upgrade(empty_database_url, name)
            whole[name] = await on(empty_database_url, schema)
    for url, revision in zip(empty_databases[1:], died_at, strict=True):
        assert revision != migrate.head()
        found = await on(url, schema)
        if following[revision] in STEP_BY_STEP and not at_once:
            assert_on_the_way(found, whole[revision], whole[following[revision]])
        else:
            assert found == whole[revision]
        await migrate.upgrade(url)
        assert await on(url, schema) == whole[migrate.head()]
        assert at_once or not await on(url, invalid_indexes)


def invalid_indexes(connection: sa.Connection) -> list[str]:
    """What an interrupted CREATE INDEX CONCURRENTLY left."""
    return list(connection.execute(sa.text(INVALID)).scalars())


async def test_an_index_that_was_not_finished_is_made_anew(
    postgres_url: str, empty_postgres_url: str
) -> None:
    """An index is made beside the work, in no transaction: whatever an upgrade left when it was
    interrupted, the next one ends at the same schema."""
    before, makes_indexes = "0005", "0006"
    wanted = await on(postgres_url, schema)
    await migrate.upgrade(empty_postgres_url, before)
    owner = await asyncpg.connect(empty_postgres_url)
    await owner.execute("CREATE INDEX ix_runs_newest_not_completed ON runs (status)")
    await owner.execute("DROP INDEX ix_runs_newest_of_status")
    await owner.close()
    await migrate.upgrade(empty_postgres_url, makes_indexes)
    await migrate.upgrade(empty_postgres_url)
    assert await on(empty_postgres_url, schema) == wanted


@pytest.mark.usefixtures("patient")
async def test_an_index_waits_for_older_transactions_and_blocks_none(
    empty_postgres_url: str,
) -> None:
    """While a long transaction keeps an index from being finished, writers go on as always, another
    process waits for its turn without being in the way, and both are done once it has ended."""
    before = "0005"
    await migrate.upgrade(empty_postgres_url, before)
    reader = await asyncpg.connect(empty_postgres_url)
    async with await Database.open(empty_postgres_url) as db:
        async with reader.transaction(isolation="repeatable_read"):
            await reader.execute("SELECT FROM sweeps")
            writers = await OldWriters.knowing(db)
            async with writers.at_work("during"):
                upgrading = asyncio.create_task(migrate.upgrade(empty_postgres_url))
                await eventually(partial(_are_there, db, _WAITING_INDEX))
                other = asyncio.create_task(_other_upgrade(empty_postgres_url))
                await eventually(partial(_are_there, db, _WAITING_UPGRADE), START_SECONDS)
            assert not upgrading.done()
        await upgrading
        assert await other == 0
    await reader.close()
    assert writers.errors == []
    assert max(writers.waits) < DatabaseTimes().lock
    assert await migrate.current(empty_postgres_url) == migrate.head()


_WAITING_INDEX = "pg_stat_progress_create_index WHERE phase LIKE 'waiting%'"
_UPGRADE = "pg_stat_activity WHERE application_name = 'tracker-migrations'"
# It asks for its turn and pauses, in no transaction; the other one makes the index meanwhile.
_WAITING_UPGRADE = f"{_UPGRADE} AND state = 'idle' AND query LIKE 'COMMIT%'"


async def _are_there(db: Database, what: str) -> bool:
    async with db.read() as connection:
        return bool(await connection.scalar(sa.text(f"SELECT count(*) FROM {what}")))


async def _other_upgrade(url: str) -> int:
    """Upgrade in another process; its exit status."""
    program = "import asyncio, sys; from tracker.store.migrate import upgrade; "
    program += "asyncio.run(upgrade(sys.argv[1]))"
    done = await asyncio.to_thread(run_python, "-c", program, url, env=os.environ, cwd=ROOT)
    return done.returncode
