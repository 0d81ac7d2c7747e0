"""Several processes on one PostgreSQL: a receiver, two workers, and one of them dies."""

from collections.abc import AsyncIterator

import pytest

from tests.e2e.processes import Stage
from tests.e2e.test_lost_callbacks import start_runs
from tests.e2e.truth import assert_all_true, settled_runs
from tests.support.waiting import eventually
from tracker.store.engine import Database

RUNS = 120


@pytest.fixture
async def shared(postgres_url: str) -> AsyncIterator[Database]:
    """The test's own look into the database that all of them use."""
    async with await Database.open(postgres_url) as opened:
        yield opened


@pytest.mark.timeout(120)
async def test_two_workers_finish_what_one_leaves(postgres_stage: Stage, shared: Database) -> None:
    """With every callback lost and a worker killed on the way, the other settles all runs."""
    stage = postgres_stage
    await stage.simulate("--seed", "5", "--run-seconds", "5", "--drop", "100%")
    receiver = await stage.serve("--no-worker")
    first, second = await stage.work(), await stage.work()
    await start_runs(stage, RUNS)

    async def some_settled() -> bool:
        return await settled_runs(shared) > 0

    async def all_settled() -> bool:
        return await settled_runs(shared) == RUNS

    await eventually(some_settled, timeout=60, interval=0.05)
    await first.kill()
    await eventually(all_settled, timeout=90, interval=0.25)
    await assert_all_true(shared, stage.simulator)
    assert await second.stop() == 0, second.log
    assert await receiver.stop() == 0, receiver.log
