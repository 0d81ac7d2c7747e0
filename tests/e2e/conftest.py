"""Fixtures: a sandbox for processes, and what they left in the database."""

import gc
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Sandbox, open_sandbox
from tracker.store.engine import Database

pytest.register_assert_rewrite("tests.e2e.truth")


@pytest.fixture(autouse=True)
def _forget_cut_connections() -> Iterator[None]:
    """A process that is killed cuts connections of this one while they are being made, and httpx
    leaves their sockets to the garbage collector: its warnings would fail some later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # a coroutine that was never awaited
        gc.collect()


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
