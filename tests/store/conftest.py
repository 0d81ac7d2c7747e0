"""A database and a writer for each test, on both engines."""

from collections.abc import AsyncIterator

import pytest

from tests.store.making import TestWriter, open_writer
from tracker.store.engine import Database


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """A database with the tracker's schema, open."""
    async with await Database.open(database_url) as db:
        yield db


@pytest.fixture
async def other_db(database_url: str) -> AsyncIterator[Database]:
    """The same database once more, as another process would have it open."""
    async with await Database.open(database_url) as db:
        yield db


@pytest.fixture
async def writer(db: Database) -> AsyncIterator[TestWriter]:
    """A writer to the database."""
    async with open_writer(db) as writer:
        yield writer
