"""Fixtures: a sandbox for processes, and what they left in the database."""

import gc
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Sandbox, open_sandbox
from tests.support.patience import always_wait_longer_for_the_database
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


@pytest.fixture(autouse=True)
def _patient(patient: None) -> None:
    """A test's own access to the database is not given up while another process pauses."""


@pytest.fixture
async def sandbox(tmp_path: Path, database_url: str) -> AsyncIterator[Sandbox]:
    """A sandbox on the test's own database, once on each engine; its processes have patience."""
    patient = always_wait_longer_for_the_database
    async with open_sandbox(tmp_path, database_url, prepare=patient) as one:
        yield one


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The test's own look into the database that the processes use."""
    async with await Database.open(database_url) as opened:
        yield opened
