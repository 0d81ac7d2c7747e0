"""What many processes on one PostgreSQL go through, long or short, and what is left of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import sqlalchemy as sa

from tests.e2e.claimed import Found, found, watch
from tests.e2e.fleet import Fleet, fleet
from tests.e2e.judgement import undecided_starts
from tests.e2e.starting import DEPLOYED
from tests.e2e.truth import Keys, assert_all_true, keys_of, settled_runs
from tests.support.waiting import eventually
from tracker.simulator import Options, Simulator, running
from tracker.store import schema as tables
from tracker.store.engine import Database

FAULTS: dict[str, Any] = {
    **DEPLOYED,
    "slow_seconds": 0.5,
    "gateway_reads": 0.02,
    "gateway_pages": 0.02,
    # One who reads twice after a 200 has no cause for it: see the witness.
    "gateway_answers": ("502", "503", "504", "404"),
    "seed": 5,
    "run_seconds": 1.5,
    "history_outputs": False,
    "drop": 0.4,
    "duplicate": 0.2,
    "early": 0.1,
    "bad_signature": 0.05,
}
MINUTES = 120.0
"""How far off a wrong clock is, in seconds: each second process's, ahead or behind in turn."""
CUT = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name = 'tracker-signals' AND datname = current_database()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """`asked` runs were asked for, `begun` is how many FLORA has, colleagues' too, `settled` how
    many we know all of; `killed` is how many processes were, `undecided` the keys of which their
    callers were told that their outcome is not known."""

    asked: int
    begun: int
    settled: int
    killed: int
    undecided: frozenset[str]
    keys: Keys
    slowest_start: float
    seconds: float
    listeners_cut: int
    seen: Found

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept."""
        seen, keys = self.seen, self.keys
        kept = {
            f"{len(keys.started)} keys of {self.asked} at FLORA": (
                len(keys.started | self.undecided) == self.asked
            ),
            f"paid twice: {keys.paid_twice[:3]}": not keys.paid_twice,
            f"another key's run: {(keys.wrong + keys.told_wrong)[:3]}": (
                not keys.wrong and not keys.told_wrong
            ),
            f"taken from who had it: {seen.stolen[:3]}": not seen.stolen,
            f"read twice without a cause: {seen.read_twice[:3]}": not seen.read_twice,
            f"{seen.sweeps_at_once} sweeps at once": not seen.sweeps_at_once,
            f"{seen.deadlocks} deadlocks": not seen.deadlocks,
        }
        return [promise for promise, held in kept.items() if not held]


async def endure(
    database_url: str,
    directory: Path,
    *,
    receivers: int,
    workers: int,
    runs: int,
    cut_every: float | None = None,
    within: float = 60.0,
    exchange_every: float | None = None,
    **faults: Any,
) -> Figures:
    """So many processes bring so many runs to their end, and one receiver and one worker are killed
    on the way; `cut_every` is after how many seconds all listening connections are cut,
    `exchange_every` after how many the prices change and FLORA exchanges the API key. `faults` are
    more than `FAULTS`.

    Raises `AssertionError` where a run is not settled `within` so many seconds after its start, or
    not true, or where a process ends otherwise than well or logs a fault.
    """
    await watch(database_url)
    loop = asyncio.get_running_loop()
    async with (
        running(Options(**FAULTS | faults)) as flora,
        fleet(flora, database_url, directory) as many,
        await Database.open(database_url) as database,
        _cutting(database_url, cut_every) as cuts,
    ):
        # Those that are killed are the first; of the others, some have a wrong clock.
        await asyncio.gather(
            *(many.join("receiver", off=(0, -MINUTES)[each % 2]) for each in range(receivers)),
            *(many.join("worker", off=(-MINUTES, MINUTES, 0)[each % 3]) for each in range(workers)),
        )
        began = loop.time()
        starting = asyncio.create_task(many.start_runs(runs))
        exchanging = asyncio.create_task(_exchange(flora, many, exchange_every))
        await eventually(lambda: len(many.started) > runs / 4, timeout=within)
        await many.kill_receiver()

        async def settled_at_least(share: float) -> bool:
            return await settled_runs(database) >= runs * share

        await eventually(lambda: settled_at_least(0.2), timeout=within, interval=0.1)
        await many.kill_worker(partial(holds_claims, database))
        await starting
        exchanging.cancel()

        async def all_is_known() -> bool:
            everything = len(flora.world.runs) / runs
            return await settled_at_least(everything) and not await undecided_starts(
                database, flora
            )

        await eventually(all_is_known, timeout=within, interval=0.1)
        seconds = loop.time() - began
        await assert_all_true(database, flora.root)
        await many.stop()
        return Figures(
            asked=runs,
            begun=len(flora.world.runs),
            settled=await settled_runs(database),
            killed=many.killed,
            undecided=frozenset(many.undecided),
            keys=await keys_of(database, flora, many.started),
            slowest_start=many.slowest_start,
            seconds=seconds,
            listeners_cut=len(cuts),
            seen=await found(database_url, flora),
        )


async def _exchange(flora: Simulator, many: Fleet, every: float | None) -> None:
    """New prices and a new key at FLORA, again and again."""
    while every is not None:
        for factor in (20, 1):
            await asyncio.sleep(every)
            flora.world.change({"price_factor": factor})
            await many.key.exchange()


async def holds_claims(database: Database, pid: int) -> bool:
    """Whether the process of that number has claimed runs."""
    claimed = sa.select(sa.func.count()).where(tables.runs.c.lease_holder.like(f"%:{pid}:%"))
    async with database.read() as connection:
        return (await connection.execute(claimed)).scalar_one() > 0


@asynccontextmanager
async def _cutting(database_url: str, every: float | None) -> AsyncIterator[list[int]]:
    """Cut all listening connections again and again; one entry for each that was cut."""
    cuts: list[int] = []

    async def cut(seconds: float) -> None:
        connection = await asyncpg.connect(database_url)
        with suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(seconds)
                cuts.extend(await connection.fetch(CUT))
        await connection.close()

    if every is None:
        yield cuts
        return
    cutting = asyncio.create_task(cut(every))
    try:
        yield cuts
    finally:
        cutting.cancel()
        await cutting
