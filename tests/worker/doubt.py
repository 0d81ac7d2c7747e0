"""Starts that tests bring in doubt, and what becomes of them."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from tests.worker.conftest import reads_of
from tracker.core.errors import FloraError, FloraRefusal, StartError
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.simulator.options import SimulatedWorkspace
from tracker.starting.start import StartRequest
from tracker.store.engine import Database
from tracker.store.schema import starts

PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]
HOUR = 3600.0


def request(key: str = "key-1", **changes: Any) -> StartRequest:
    given: dict[str, Any] = {"technique": "icon-pack", "inputs": PROMPT, "idempotency_key": key}
    return StartRequest(**(given | changes))


async def attempt(services: Services, key: str = "key-1", **changes: Any) -> str | None:
    """Start it; the run's id, or `None` where it was not started or is seen to be in doubt."""
    starting = asyncio.create_task(services.starter.start(request(key, **changes)))
    for _ in range(1000):
        await asyncio.wait([starting], timeout=0.02)
        if starting.done() or await state_of(services.database, key) == "in_doubt":
            break
    await asyncio.wait([starting], timeout=0.05)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        return None
    try:
        return starting.result().record.run.run_id
    except (FloraError, StartError):
        return None


async def state_of(database: Database, key: str = "key-1") -> str:
    async with database.read() as connection:
        query = select(starts.c.state).where(starts.c.idempotency_key == key)
        return str(await connection.scalar(query))


def posts(flora: Simulator) -> int:
    return reads_of(flora).get("runs.start", 0)


def change(flora: Simulator, **options: Any) -> None:
    flora.world.options = replace(flora.world.options, **options)


GATEWAY = {"gateway_starts": 1.0, "gateway_works": 0.0}


async def sweep(services: Services) -> None:
    [workspace] = services.workspaces
    assert (await services.sweeper.sweep(workspace)).error is None


LOST = {"lost_starts": 1.0, "keys_released": True}
"""A start is answered 500 although it made a run, and its key would start another."""


async def send_again(services: Services) -> None:
    """Let FLORA say that it knows the key."""
    [workspace] = services.workspaces
    async with services.database.read() as connection:
        query = select(starts.c.request_body).where(starts.c.idempotency_key == "key-1")
        body = await connection.scalar(query)
    with pytest.raises(FloraRefusal) as refused:
        await workspace.require_client().start_run(
            "tech_icon-pack", body=str(body), idempotency_key="key-1"
        )
    assert refused.value.status == 409
    error = {"status": 409, "message": "known", "conflict": True}
    known = starts.update().where(starts.c.idempotency_key == "key-1").values(error=error)
    await services.database.write(lambda connection: connection.execute(known).rowcount)


OTHER = SimulatedWorkspace(
    workspace_id="ws_other", api_key="sk_test_other", webhook_secret="whsec_other"
)
