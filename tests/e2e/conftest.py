"""Fixtures: a sandbox for processes, and what they left in the database."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.processes import Sandbox, open_sandbox
from tracker.store.engine import Database

pytest.register_assert_rewrite("tests.e2e.truth")


@pytest.fixture
async def sandbox(tmp_path: Path, database_url: str) -> AsyncIterator[Sandbox]:
    """A sandbox on the test's own database, once on each engine."""
    async with open_sandbox(tmp_path, database_url) as one:
        yield one


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The test's own look into the database that the processes use."""
    async with await Database.open(database_url) as opened:
        yield opened
