"""Fixtures: a stage for processes, and what they left in the database."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.processes import Stage, staged
from tracker.store.engine import Database

pytest.register_assert_rewrite("tests.e2e.truth")


@pytest.fixture
async def stage(tmp_path: Path, database_url: str) -> AsyncIterator[Stage]:
    """A stage on the test's own database, once on each engine."""
    async with staged(tmp_path, database_url) as one:
        yield one


@pytest.fixture
async def postgres_stage(tmp_path: Path, postgres_url: str) -> AsyncIterator[Stage]:
    """A stage on PostgreSQL, for what needs several processes."""
    async with staged(tmp_path, postgres_url) as one:
        yield one


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The test's own look into the database that the processes use."""
    async with await Database.open(database_url) as opened:
        yield opened
