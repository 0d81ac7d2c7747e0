"""SIGKILL under load: whatever was answered 2xx is on disk. SIGTERM: nothing is cut off."""

import asyncio
import json
import signal

import httpx
import pytest
import sqlalchemy as sa

from tests.e2e.processes import Sandbox
from tests.support.deliveries import applied
from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.flora.callback import sign
from tracker.store.engine import Database
from tracker.store.schema import deliveries, runs

SENDERS = 16
ACKNOWLEDGED_BEFORE_A_KILL = 50


def callback(number: int) -> bytes:
    """The body of one unique callback."""
    data = {
        "run_id": f"run_{number}",
        "run_type": "technique",
        "workspace_id": "ws_simulator",
        "status": "completed",
    }
    event = {
        "id": f"whd_{number}",
        "type": "run.completed",
        "api_version": "2026-06-11",
        "created_at": 1750000000000 + number,
        "data": data,
    }
    return json.dumps(event).encode()


class Load:
    """Senders that post unique callbacks for as long as they are let, and note what was taken."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._next = 0
        self._going = True
        self.acknowledged: set[str] = set()

    async def run(self) -> None:
        """Send until `stop`; a connection that breaks is made anew."""
        await asyncio.gather(*(self._send() for _ in range(SENDERS)))

    def stop(self) -> None:
        """Let the senders finish."""
        self._going = False

    async def _send(self) -> None:
        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            while self._going:
                number = self._next
                self._next += 1
                body = callback(number)
                header = sign(body, "whsec_simulator", at=utc_now())
                try:
                    answer = await client.post(
                        self._url, content=body, headers={"flora-signature": header}
                    )
                except httpx.TransportError:
                    await asyncio.sleep(0.02)
                    continue
                if answer.is_success:
                    self.acknowledged.add(f"whd_{number}")


async def stored(database: Database) -> tuple[set[str], set[str]]:
    """The deliveries that are on disk, and the runs that they ended."""
    async with database.read() as connection:
        kept = set((await connection.execute(sa.select(deliveries.c.delivery_id))).scalars())
        ended = sa.select(runs.c.run_id).where(
            runs.c.status == "completed", runs.c.callback_at.is_not(None)
        )
        return kept, set((await connection.execute(ended)).scalars())


@pytest.mark.timeout(120)
async def test_nothing_acknowledged_is_lost_to_kill_9(
    sandbox: Sandbox, database: Database, thorough: bool
) -> None:
    """Every delivery that got a 2xx before or between SIGKILLs is stored, with its effect."""
    kills = 4 if thorough else 2
    server = await sandbox.serve("--no-worker")
    load = Load(f"{sandbox.tracker}/callbacks/flora")
    sending = asyncio.create_task(load.run())
    for _ in range(kills):
        before = len(load.acknowledged)
        await eventually(
            lambda before=before: len(load.acknowledged) >= before + ACKNOWLEDGED_BEFORE_A_KILL,
            timeout=30,
        )
        assert await server.kill() == -signal.SIGKILL
        server = await sandbox.serve("--no-worker")
    load.stop()
    await sending
    await applied(database)
    kept, ended = await stored(database)
    assert len(load.acknowledged) >= kills * ACKNOWLEDGED_BEFORE_A_KILL
    assert load.acknowledged <= kept
    assert {f"run_{delivery_id[4:]}" for delivery_id in load.acknowledged} <= ended


async def test_a_deploy_loses_nothing(sandbox: Sandbox, database: Database) -> None:
    """SIGTERM under load: what is in flight is answered, what was answered is stored, exit 0."""
    server = await sandbox.serve("--no-worker")
    load = Load(f"{sandbox.tracker}/callbacks/flora")
    sending = asyncio.create_task(load.run())
    await eventually(lambda: len(load.acknowledged) >= 200, timeout=30)
    assert await server.stop() == 0, server.log
    load.stop()
    await sending
    kept, _ = await stored(database)
    assert load.acknowledged <= kept
    assert "Traceback" not in server.log
