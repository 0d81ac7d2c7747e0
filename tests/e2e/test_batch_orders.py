"""Batches that the server launches, against everything that may go wrong: paid once, to the end."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from tests.e2e.lives import Life
from tests.e2e.short_waits import shorten_waits
from tests.e2e.test_batch import FAULTS, assert_paid_once, assert_rows_are_their_runs
from tests.e2e.truth import assert_all_true
from tests.support.waiting import NO_SWEEPS, eventually, free_port
from tracker.simulator import Options, Simulator, running
from tracker.store.engine import Database
from tracker.store.schema import batches

ROWS = 36
ENDED_AFTER = {10: signal.SIGKILL, 20: signal.SIGTERM}
"""How the process is ended that starts the rows, by how many runs have begun at FLORA."""
PROMPTS = [f"icon {number % (ROWS - 10)}" for number in range(ROWS)]
ORDER = {"technique": "icon-pack", "rows": [{"prompt": prompt, "note": "x"} for prompt in PROMPTS]}


class Deployment:
    """Trackers on one database, in haste."""

    def __init__(self, folder: Path, flora: Simulator, database_url: str) -> None:
        self._folder = folder
        self.port = free_port()
        self.root = f"http://127.0.0.1:{self.port}"
        self._environ = {
            "TRACKER_PUBLIC_URL": self.root,
            "TRACKER_START_DOUBT": "2",
            **flora.environment,
            "TRACKER_DATABASE_URL": database_url,
            "TRACKER_API_CONCURRENCY": "8",
            "TRACKER_POLL_INTERVAL": "0.3",
            "TRACKER_POLL_INTERVAL_MAX": "1",
            "TRACKER_LOG_LEVEL": "warning",
            "TRACKER_RECONCILE_CRON": NO_SWEEPS,
        }
        self._lives = 0

    async def life(self, *command: str, port: int | None = None) -> Life:
        """A process that serves at the port."""
        self._lives += 1
        port = self.port if port is None else port
        life = Life.begin(
            *command,
            *("--port", str(port)),
            env=self._environ,
            log=self._folder / f"{self._lives}.log",
            prepare=shorten_waits,
        )
        assert await life.ready(f"http://127.0.0.1:{port}/healthz"), life.log
        return life


@asynccontextmanager
async def deployed(
    folder: Path, database_url: str
) -> AsyncIterator[tuple[Deployment, Simulator, httpx.AsyncClient]]:
    async with AsyncExitStack() as stack:
        flora = await stack.enter_async_context(running(Options(**FAULTS)))
        deployment = Deployment(folder, flora, database_url)
        client = httpx.AsyncClient(base_url=deployment.root, timeout=30, trust_env=False)
        yield deployment, flora, await stack.enter_async_context(client)


async def rows_of(client: httpx.AsyncClient, batch_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        query = {"limit": "100", "cursor": cursor}
        page = (await client.get(f"/api/batches/{batch_id}/rows", params=query)).json()
        found += page["rows"]
        cursor = page["meta"]["next_cursor"]
    return found


async def stopped(life: Life) -> int:
    """The exit status after SIGTERM."""
    life.tell()
    status = await life.end()
    assert "Traceback" not in life.log, life.log
    return status


async def leases(database_url: str) -> list[Any]:
    """Who holds the leases of the batches."""
    async with await Database.open(database_url) as database, database.read() as connection:
        return list(await connection.scalars(sa.select(batches.c.lease_holder)))


@pytest.mark.thorough
@pytest.mark.timeout(150)
async def test_an_ordered_batch_is_paid_once_whatever_is_killed(
    tmp_path: Path, database_url: str
) -> None:
    """What was answered 201 is launched to its end by the next process, or by another one beside
    it, though processes are killed or stopped while they start rows; each row is one run. (A
    command that is killed: test_batch.py; a launch: crash points, tests/web/test_batches.py.)"""
    async with deployed(tmp_path, database_url) as (deployment, flora, client):
        beside = database_url.startswith("postgres")
        serving = await deployment.life("serve", *(["--no-worker"] if beside else []))
        worker = await deployment.life("worker", port=free_port()) if beside else serving
        answer = await client.post("/api/batches", content=json.dumps(ORDER))
        assert answer.status_code == 201, answer.text
        batch_id = answer.json()["batch_id"]
        for count, how in ENDED_AFTER.items():
            await eventually(lambda count=count: len(flora.world.runs) >= count, timeout=60)
            if how is signal.SIGKILL:
                worker.kill()
                await worker.end()
            else:
                assert await stopped(worker) == 0
                assert await leases(database_url) == [None]
            assert len(flora.world.runs) < ROWS
            if beside:
                worker = await deployment.life("worker", port=free_port())
            else:
                worker = serving = await deployment.life("serve")
            again = await client.post("/api/batches", content=json.dumps(ORDER))
            assert (again.status_code, again.json()["batch_id"]) == (200, batch_id)

        async def finished() -> bool:
            return (await client.get(f"/api/batches/{batch_id}")).json()["finished_at"] is not None

        await eventually(finished, timeout=90)
        rows = await rows_of(client, batch_id)
        assert [row["status"] for row in rows] == ["completed"] * ROWS
        assert len(flora.world.runs) == ROWS
        assert_paid_once(flora, PROMPTS)
        assert_rows_are_their_runs(flora, PROMPTS, rows)
        for life in {serving, worker}:
            assert await stopped(life) == 0
        async with await Database.open(database_url) as database:
            await assert_all_true(database, flora.root)
