"""Resident memory of `tracker serve` with its worker, while it does what it is there for.

First callbacks of unknown runs come, unique and signed, in equal parts; nobody reads these runs, as
there is no FLORA. Then, in another process, runs live whole lives: started through the API at a
local FLORA, called back, read, settled. What grows with either is a leak.
"""

import asyncio
import secrets
from dataclasses import dataclass
from functools import partial
from typing import Final

import httpx

from bench.footprint.process import Serving, serving
from bench.ingest.load import prepared, send_all
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tests.e2e.truth import settled_runs
from tests.support.waiting import eventually
from tracker.simulator import Options, running
from tracker.store import migrate
from tracker.store.engine import Database

CONNECTIONS: Final = 64
PARTS: Final = 5
LONGEST: Final = 600.0
"""Seconds in which a part has to be taken."""
RUN_SECONDS: Final = 2.0
AT_A_TIME: Final = 16
MOST_MB: Final = 150.0
GROWTH_MB: Final = 10.0
"""From the first part, which warms pools and caches, to the last."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Memory in MB: right after the start, and after so many of something."""

    start: float
    after: list[tuple[int, float]]

    @property
    def flat(self) -> bool:
        """Whether it keeps within what is promised."""
        sizes = [size for _, size in self.after]
        return max(sizes) <= MOST_MB and sizes[-1] - sizes[0] <= GROWTH_MB


def memory(report: Report, kind: str, *, callbacks: int, lives: int) -> bool:
    """Measure on one kind of database. Returns whether memory is flat."""
    found = {}
    if callbacks:
        with throw_away(kind) as url:
            asyncio.run(migrate.upgrade(url))
            with serving(url) as tracker:
                found["callbacks"] = _receive(kind, tracker, callbacks)
    if lives:
        with throw_away(kind) as url:
            asyncio.run(migrate.upgrade(url))
            found["whole lives of runs"] = asyncio.run(_live(kind, url, lives))
    rows = [
        row
        for what, growth in found.items()
        for row in (
            (what, "the start", f"{growth.start:.0f}"),
            *(("", f"{count:,}", f"{size:.0f}") for count, size in growth.after),
        )
    ]
    report.add(
        Table(
            f"Resident memory, {kind}",
            ("", "after", "MB"),
            rows,
            f"At most {MOST_MB:.0f} MB, and no more than {GROWTH_MB:.0f} from the first part on.",
        )
    )
    report.figures[f"memory-{kind}"] = {
        what: {"start": growth.start, "after": growth.after} for what, growth in found.items()
    }
    return all(growth.flat for growth in found.values())


def _receive(kind: str, tracker: Serving, callbacks: int) -> Growth:
    start, after = tracker.memory(), list[tuple[int, float]]()
    for part in range(1, PARTS + 1):
        with prepared(callbacks // PARTS, prefix=secrets.token_hex(4)) as requests:
            load = send_all(requests, tracker.port, connections=CONNECTIONS)
        if load.refused:
            raise RuntimeError(f"{load.refused} callbacks were not taken")
        after.append((part * load.acknowledged, tracker.memory()))
        say(f"{kind}: {after[-1][0]:,} callbacks, {after[-1][1]:.0f} MB, {load.rate:.0f} a second")
    return Growth(start, after)


async def _live(kind: str, url: str, lives: int) -> Growth:
    async with running(Options(run_seconds=RUN_SECONDS)) as flora, await Database.open(url) as db:
        with serving(url, environ=flora.environment, called_back=True) as tracker:
            start, after, begun = tracker.memory(), list[tuple[int, float]](), 0
            for part in range(1, PARTS + 1):
                wanted = lives * part // PARTS
                await _start(tracker, wanted - begun)
                begun = wanted
                await eventually(partial(_settled, db, wanted), timeout=LONGEST, interval=0.5)
                after.append((wanted, tracker.memory()))
                say(f"{kind}: {wanted:,} lives, {after[-1][1]:.0f} MB")
    return Growth(start, after)


async def _start(tracker: Serving, count: int) -> None:
    turns = asyncio.Semaphore(AT_A_TIME)
    base_url = f"http://127.0.0.1:{tracker.port}"
    async with httpx.AsyncClient(base_url=base_url, timeout=60, trust_env=False) as client:

        async def one(number: int) -> None:
            prompt = {"id": "prompt", "type": "text", "value": f"icon {number}"}
            asked = {"technique": "icon-pack", "inputs": [prompt]}
            async with turns:
                (await client.post("/api/runs", json=asked)).raise_for_status()

        await asyncio.gather(*map(one, range(count)))


async def _settled(db: Database, count: int) -> bool:
    return await settled_runs(db) >= count
