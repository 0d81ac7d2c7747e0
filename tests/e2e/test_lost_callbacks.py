"""The main job: runs whose callbacks are lost, doubled or early all end up true."""

import asyncio

import httpx
import pytest

from tests.e2e.processes import Sandbox
from tests.e2e.truth import assert_all_true, settled_runs
from tests.support.waiting import eventually
from tracker.store.engine import Database


async def start_runs(sandbox: Sandbox, count: int) -> None:
    """Start runs through the tracker's own API, of techniques that need nothing but a text."""
    async with httpx.AsyncClient(base_url=sandbox.tracker, timeout=60, trust_env=False) as client:
        turns = asyncio.Semaphore(16)

        async def start(number: int) -> None:
            body = {
                "technique": "icon-pack",
                "inputs": [{"id": "prompt", "type": "text", "value": f"icon {number}"}],
            }
            async with turns:
                answer = await client.post("/api/runs", json=body)
            assert answer.status_code == 201, answer.text

        await asyncio.gather(*(start(number) for number in range(count)))


@pytest.mark.timeout(120)
async def test_lost_doubled_and_early_callbacks_change_nothing(
    sandbox: Sandbox, database: Database, thorough: bool
) -> None:
    """With 40 % of callbacks dropped, 10 % doubled and 10 % early, every run ends up true."""
    runs = 100 if thorough else 30
    await sandbox.simulate(
        *("--seed", "11", "--run-seconds", "3"),
        *("--drop", "40%", "--duplicate", "10%", "--early", "10%"),
    )
    server = await sandbox.serve()
    await start_runs(sandbox, runs)

    async def all_settled() -> bool:
        return await settled_runs(database) == runs

    await eventually(all_settled, timeout=90, interval=0.25)
    await assert_all_true(database, sandbox.simulator)
    assert await server.stop() == 0, server.log
