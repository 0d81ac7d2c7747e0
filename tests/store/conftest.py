"""A database and a writer for each test, on both engines."""

import functools
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest
from alembic.script import base as scripts

from tests.store.making import TestWriter, open_writer
from tests.support.databases import Background, PostgresDatabases, migrate, sqlite_url_of
from tests.support.faulty import FaultyDatabase
from tracker.store.engine import Database

# Each upgrade would read all migrations anew: here there are hundreds, of a revision each.
_load = scripts.util.load_python_file
_load_once = functools.cache(_load)
scripts.util.load_python_file = lambda folder, file: (  # type: ignore[assignment]
    _load(folder, file) if file == "env.py" else _load_once(folder, file)
)


@pytest.fixture
async def db(database_url: str, patient: None) -> AsyncIterator[Database]:
    """A database with the tracker's schema, open."""
    async with await Database.open(database_url) as db:
        yield db


@pytest.fixture
async def other_db(database_url: str, patient: None) -> AsyncIterator[Database]:
    """The same database once more, as another process would have it open."""
    async with await Database.open(database_url) as db:
        yield db


@pytest.fixture
async def faulty_db(database_url: str, patient: None) -> AsyncIterator[FaultyDatabase]:
    """The same database once more, and the test says which writes to it fail."""
    async with await FaultyDatabase.open(database_url) as db:
        yield db


@pytest.fixture
async def writer(db: Database) -> AsyncIterator[TestWriter]:
    """A writer to the database."""
    async with open_writer(db) as writer:
        yield writer


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def full_url(
    request: pytest.FixtureRequest, background: Background, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database with so many rows that reading them all would be wrong: filled once, for tests
    that look at plans."""
    from tests.store.test_plans import fill_tables

    with ExitStack() as stack:
        if request.param == "sqlite":
            url = sqlite_url_of(tmp_path_factory.mktemp("full") / "tracker.db")
            background.run(migrate(url))
        else:
            databases: PostgresDatabases = request.getfixturevalue("postgres_databases")
            url = stack.enter_context(databases.migrated())
        background.run(fill_tables(url))
        yield url


@pytest.fixture
async def full(full_url: str, patient: None) -> AsyncIterator[Database]:
    """That database, open."""
    async with await Database.open(full_url) as db:
        yield db
