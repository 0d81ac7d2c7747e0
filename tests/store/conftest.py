"""A database and a door for each test, on both engines."""

from collections.abc import AsyncIterator

import pytest

from tests.store.making import TestDoor, open_door
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
async def door(db: Database) -> AsyncIterator[TestDoor]:
    """A door to the database."""
    async with open_door(db) as door:
        yield door
