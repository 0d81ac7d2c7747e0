"""SIGTERM, as a deploy sends it: what is in flight is answered, what is held is given back, and it
ends with 0 in the time that the documentation names, well before a container's 30 s are over."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from tests.e2e.lives import Life
from tests.e2e.outages import Outage, frozen, locked_file, stopped
from tests.e2e.short_waits import shorten_all_waits
from tests.support.postgres import PostgresServer
from tests.support.waiting import NO_SWEEPS, eventually, free_port
from tests.web.callbacks import PATH, event, signed
from tracker.store.engine import Database
from tracker.store.schema import deliveries, leases, runs, starts, sweeps

pytestmark = pytest.mark.timeout(120)

STOPPED_WITHIN = 20.0
"""Seconds within which docs/production.md promises that a process has ended."""
START = {
    "technique": "icon-pack",
    "inputs": [{"id": "prompt", "type": "text", "value": "garden tools"}],
}


class Deployment:
    """A FLORA that can fall silent, and trackers beside it, one after the other, with short waits
    where they are `hasty`."""

    def __init__(self, directory: Path, database_url: str, *, hasty: bool = True) -> None:
        self._directory = directory
        self._hasty = hasty
        self._flora_port, self._port = free_port(), free_port()
        self._root = f"http://127.0.0.1:{self._port}"
        self._environment = {
            "FLORA_API_KEY": "sk_test_simulator",
            "FLORA_BASE_URL": f"http://127.0.0.1:{self._flora_port}/api/v1",
            "FLORA_WEBHOOK_SECRET": "whsec_simulator",
            "TRACKER_DATABASE_URL": database_url,
            "TRACKER_POLL_INTERVAL": "0.1",
            "TRACKER_POLL_INTERVAL_MAX": "0.1",
            "TRACKER_LOG_FORMAT": "json",
            "TRACKER_RECONCILE_CRON": NO_SWEEPS,
        }
        self._lives: list[Life] = []

    async def flora_falls_silent(self) -> None:
        """After a run that lasts a minute was started, FLORA answers nothing any more."""
        port = str(self._flora_port)
        flora = self._begin("simulate", "--port", port, "--run-seconds", "60")
        assert await flora.ready(f"http://127.0.0.1:{port}/simulator/runs"), flora.log
        tracker = await self.tracker("serve", hasty=False)
        assert (await self.start()).is_success, tracker.log
        await stop(tracker)
        flora.freeze()

    async def tracker(self, role: str, *, hasty: bool | None = None) -> Life:
        """`tracker serve` or `tracker worker`; with short waits as all others, unless told."""
        life = self._begin(role, "--port", str(self._port), hasty=hasty)
        assert await life.ready(f"{self._root}/healthz"), life.log
        return life

    async def start(self, sent: asyncio.Event | None = None, **more: str) -> httpx.Response:
        """Start a run through the tracker's API; `sent` is set when that was asked."""

        async def trace(event: str, _: Any) -> None:
            if event == "http11.send_request_body.complete" and sent is not None:
                sent.set()

        async with httpx.AsyncClient(timeout=40, trust_env=False) as client:
            return await client.post(
                f"{self._root}/api/runs", json=START | more, extensions={"trace": trace}
            )

    async def call_back(self, number: int) -> tuple[str, int]:
        """Send a callback; its id and how it was answered."""
        body = event(f"run_{number}", id=f"evt_{number}")
        async with httpx.AsyncClient(timeout=40, trust_env=False) as client:
            headers = signed(body, "whsec_simulator")
            answer = await client.post(f"{self._root}{PATH}", content=body, headers=headers)
        return f"evt_{number}", answer.status_code

    async def start_under_way(self) -> asyncio.Task[httpx.Response]:
        """A start that the tracker is at."""
        sent = asyncio.Event()
        starting = asyncio.create_task(self.start(sent))
        await sent.wait()
        async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
            await client.get(f"{self._root}/healthz")  # it has read what came before
        return starting

    def _begin(self, *arguments: str, hasty: bool | None = None) -> Life:
        hasty = self._hasty if hasty is None else hasty
        log = self._directory / f"{len(self._lives)}-{arguments[0]}.log"
        prepare = partial(shorten_all_waits, patient=False)  # it is about a database that is gone
        life = Life.begin(
            *arguments, env=self._environment, log=log, prepare=prepare if hasty else None
        )
        self._lives.append(life)
        return life

    async def close(self) -> None:
        """End whatever lives."""
        for life in self._lives:
            life.kill()
            await life.end()


@asynccontextmanager
async def deployed(
    directory: Path, database_url: str, *, hasty: bool = True
) -> AsyncIterator[Deployment]:
    """A deployment whose processes are gone afterwards."""
    one = Deployment(directory, database_url, hasty=hasty)
    try:
        yield one
    finally:
        await one.close()


async def held(database: Database) -> set[str]:
    """What someone holds: a run that is polled, a start that is sent, a sweep."""
    queries = {
        "run": sa.select(runs.c.run_id).where(runs.c.lease_holder.is_not(None)),
        "start": sa.select(starts.c.idempotency_key).where(starts.c.lease_holder.is_not(None)),
        "sweep": sa.select(leases.c.name).where(leases.c.name.like("sweep:%")),
    }
    async with database.read() as connection:
        return {what for what, query in queries.items() if (await connection.execute(query)).all()}


async def stop(life: Life) -> None:
    """Tell it to stop: it ends well, and in time."""
    life.tell()
    assert await life.end(timeout=30) == 0, life.log
    assert "Traceback" not in life.log, life.log


@pytest.mark.parametrize("role", ["serve", "worker"])
async def test_what_flora_does_not_answer_is_given_back(
    tmp_path: Path, database_url: str, database: Database, role: str
) -> None:
    """Where FLORA says nothing any more, a start in flight is still answered, and the start, the
    claimed run and the sweep are nobody's afterwards."""
    async with deployed(tmp_path, database_url) as one:
        await one.flora_falls_silent()
        life = await one.tracker(role)
        everything = {"run", "sweep"} | ({"start"} if role == "serve" else set())
        starting = asyncio.create_task(one.start()) if role == "serve" else None

        async def all_held() -> bool:
            return await held(database) == everything

        await eventually(all_held)
        await stop(life)
        assert await held(database) == set(), life.log
        if starting is not None:
            assert (await starting).status_code in (503, 504), life.log
    async with database.read() as connection:
        errors = (await connection.execute(sa.select(sweeps.c.error).order_by(sweeps.c.id))).all()
    assert errors[-1].error == "it was interrupted"


async def test_it_ends_well_where_the_database_is_gone(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    """Where the database has stopped, or says nothing any more, a start in flight is answered 503,
    and the process ends well all the same, although it can give nothing back."""
    url = own_postgres.url("tracker")
    outages = (frozen(own_postgres), stopped(own_postgres, own_postgres.stop))
    async with deployed(tmp_path, url) as one, await Database.open(url) as database:
        await one.flora_falls_silent()
        for outage in outages:
            life = await one.tracker("serve")

            async def claimed() -> bool:
                return await held(database) == {"run", "sweep"}

            await eventually(claimed)
            async with outage:
                starting = await one.start_under_way()
                await stop(life)
                assert (await starting).status_code == 503, life.log


@pytest.mark.thorough
async def test_frozen_postgres_holds_up_no_stop(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    """Neither PostgreSQL nor FLORA answers any more, with the waits of operation. (With short ones:
    `test_it_ends_well_where_the_database_is_gone`.)"""
    await ends_in_time(tmp_path, own_postgres.url("tracker"), partial(frozen, own_postgres))


async def test_a_locked_file_holds_up_no_stop(sqlite_url: str, tmp_path: Path) -> None:
    """The same where another process does not unlock the file."""
    lock = partial(locked_file, tmp_path / "tracker.db", "BEGIN EXCLUSIVE")
    await ends_in_time(tmp_path, sqlite_url, lock)


async def ends_in_time(directory: Path, url: str, outage: Outage) -> None:
    """A process with jobs, starts and callbacks in progress ends within the documented time, and
    what was answered 2xx is stored."""
    async with deployed(directory, url, hasty=False) as one, await Database.open(url) as database:
        await one.flora_falls_silent()
        life = await one.tracker("serve")

        async def claimed() -> bool:
            return {"run", "sweep"} <= await held(database)

        await eventually(claimed)
        starting = await one.start_under_way()  # which waits for FLORA
        calls = [asyncio.create_task(one.call_back(number)) for number in range(20)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        async with outage():
            began = time.monotonic()
            calls += [asyncio.create_task(one.call_back(number)) for number in range(20, 40)]
            await stop(life)
            assert time.monotonic() - began < STOPPED_WITHIN, life.log
        answers = await asyncio.gather(*calls, return_exceptions=True)
        taken = {one[0] for one in answers if isinstance(one, tuple) and one[1] == 200}
        async with database.read() as connection:
            rows = await connection.execute(sa.select(deliveries.c.delivery_id))
            assert taken
            assert taken <= set(rows.scalars())
        # Pending where the database may have stored that it is sent.
        answer = await starting
        told = answer.status_code, answer.json()["error"]["code"]
        assert told in ((503, "service_unavailable"), (504, "start_pending")), life.log
