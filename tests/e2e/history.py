"""A first sweep of a long history by real processes that are killed, and what it costs."""

import asyncio
import signal
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from tests.e2e.processes import Process
from tracker.simulator import Options, Simulator, running
from tracker.store.engine import Database
from tracker.store.schema import leases, runs

SPAN = 6 * 86_400
"""Seconds; a first sweep goes back for a week."""


@dataclass(frozen=True, slots=True)
class Swept:
    """How many processes were killed, pages FLORA answered, and runs that are here."""

    killed: int
    pages: int
    rows: int


def pages_of(flora: Simulator) -> int:
    """Pages of technique runs that FLORA has answered, probes of one item included."""
    return flora.world.counts["runs.list", 200]


async def sweep(database_url: str, *, history: int, kills: int, log: Path) -> Swept:
    """Sweep a history of so many runs to its end, with `tracker reconcile`.

    A process is killed with SIGKILL whenever another share of the pages has been read, and followed
    by a new one. Nobody waits for the minute after which a dead process's lease is free.
    """
    async with (
        running(Options(history=history, history_seconds=SPAN, failures=0.0)) as flora,
        await Database.open(database_url) as database,
    ):
        options = flora.world.options
        env = {
            "TRACKER_DATABASE_URL": database_url,
            "FLORA_BASE_URL": flora.base_url,
            "FLORA_API_KEY": options.api_key,
            "TRACKER_LOG_LEVEL": "error",
        }
        killed = 0
        while True:
            process = Process.fork("reconcile", env=env, log=log)
            ends = asyncio.create_task(process.wait())
            goal = (killed + 1) * history / 100 / (kills + 1)
            while not ends.done() and (killed == kills or pages_of(flora) < goal):
                await asyncio.wait([ends], timeout=0.02)
            if ends.done() or await process.kill() != -signal.SIGKILL:
                assert await ends == 0, log.read_text()
                break
            killed += 1
            await database.write(lambda connection: connection.execute(sa.delete(leases)).rowcount)
        async with database.read() as connection:
            count = sa.select(sa.func.count()).select_from(runs)
            rows = (await connection.execute(count)).scalar_one()
        return Swept(killed=killed, pages=pages_of(flora), rows=rows)
