"""What runs cost in reads of FLORA. The real prices are measured by `python -m bench.economy`."""

import httpx
import pytest

from tests.e2e.processes import Sandbox
from tests.e2e.test_lost_callbacks import start_runs
from tests.e2e.truth import assert_all_true, settled_runs
from tests.support.waiting import eventually
from tracker.store.engine import Database

RUNS = 100
NO_READS = ("runs.start", "techniques.list", "techniques.get")


async def reads_of_runs(simulator: str) -> int:
    """How often FLORA was read; starts and the catalogue do not count."""
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        told = (await client.get(f"{simulator}/simulator/requests")).json()["requests"]
    return sum(one["count"] for one in told if one["route"] not in NO_READS)


@pytest.mark.thorough
@pytest.mark.timeout(120)
async def test_a_hundred_callbacks_cost_a_few_pages(sandbox: Sandbox, database: Database) -> None:
    """A hundred runs that end within seconds and call back are read in pages, not one by one. (By
    the hand of a clock: tests/worker/test_poll.py.)"""
    await sandbox.simulate("--seed", "7", "--run-seconds", "2")
    # No poll before every callback has come, so that only what follows callbacks is counted.
    await sandbox.serve(TRACKER_CALLBACK_GRACE="30")
    await start_runs(sandbox, RUNS)

    async def all_settled() -> bool:
        return await settled_runs(database) == RUNS

    await eventually(all_settled, timeout=90, interval=0.25)
    await assert_all_true(database, sandbox.simulator)
    assert await reads_of_runs(sandbox.simulator) <= RUNS / 4
