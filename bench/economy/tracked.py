"""A trial with the tracker: its runs are started, and all have to end up as FLORA has them."""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
from sqlalchemy import func, select

from bench.economy.flora import EARLIER_RUNS, flora_of, reads
from bench.economy.trial import Found, Trial
from bench.throw_away import throw_away
from tests.e2e.truth import settled_runs
from tests.support.waiting import eventually, free_port
from tracker.core.clock import utc_now
from tracker.core.observation import Source
from tracker.core.record import Observed
from tracker.core.schedule import Policy
from tracker.flora import parse
from tracker.polling.poll import FEW_KEPT_FOR
from tracker.simulator import Simulator
from tracker.simulator.runs import SimulatedRun
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.schema import runs
from tracker.store.writing.writer import MergeRules, Writer

START_SECONDS: Final = 60.0
LATEST: Final = 400.0
"""Seconds after its last end within which everything has to be settled."""
TECHNIQUE: Final = "icon-pack"

Start = Callable[[int], Awaitable[SimulatedRun]]


def run_tracked(trial: Trial, kind: str) -> Found:
    """The whole trial, on a database of that kind."""
    with throw_away(kind) as url:
        asyncio.run(migrate.upgrade(url))
        return asyncio.run(_run(trial, url))


async def _run(trial: Trial, url: str) -> Found:
    async with flora_of(trial) as flora, await Database.open(url) as database:
        port = free_port()
        async with serving(flora, url, port, trial):
            if trial.known:
                await _all_settled(database, EARLIER_RUNS)
                await asyncio.sleep(FEW_KEPT_FOR.total_seconds())
            earlier, asked_before = set(flora.world.runs), reads(flora) if trial.known else {}
            await _start_all(trial, flora, database, port)
            wanted = len(flora.world.runs)
            await _all_settled(database, wanted)
            asked_until_settled = reads(flora)
            await _all_final(database, wanted)
            for_bills = sum(reads(flora).values()) - sum(asked_until_settled.values())
        ours = [run for name, run in flora.world.runs.items() if name not in earlier]
        rows = await _rows(database)
        asked = {
            route: count - asked_before.get(route, 0)
            for route, count in sorted(asked_until_settled.items())
            if count > asked_before.get(route, 0)
        }
    ends = [run.completed_ms / 1000 for run in ours]
    return Found(
        name=trial.name,
        ended=len(ours),
        settled=sum(rows[run.run_id].status == run.end for run in ours),
        reads=asked,
        window=max(ends) - min(ends),
        fresh=sorted(
            rows[run.run_id].settled_at.timestamp() - run.completed_ms / 1000 for run in ours
        ),
        reads_for_bills=for_bills,
    )


async def _start_all(trial: Trial, flora: Simulator, database: Database, port: int) -> None:
    callback_url = f"http://127.0.0.1:{port}/callbacks/flora" if trial.callbacks else None
    if trial.every == 0:
        await _start_at_once(trial, flora, database, callback_url)
        return
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False
    ) as client:

        async def start(number: int) -> SimulatedRun:
            answer = await client.post(
                "/api/runs", json={"technique": TECHNIQUE, "inputs": inputs(number)}
            )
            answer.raise_for_status()
            return flora.world.runs[answer.json()["run_id"]]

        await begin(trial, start)


async def _start_at_once(
    trial: Trial, flora: Simulator, database: Database, callback_url: str | None
) -> None:
    """All runs within a second, which no machine starts through the API: FLORA begins them, and
    its answers go through a writer, as those to a start do."""
    started = [
        Observed(
            observation=parse.run(
                run.answer_to_start(),
                source=Source.START,
                at=utc_now(),
                run_type="technique",
                technique_id=run.technique.technique_id if run.technique else None,
            ),
            inputs=inputs(number),
            callback_expected=callback_url is not None,
        )
        for number in range(trial.runs)
        for run in [flora.start(TECHNIQUE, inputs(number), callback_url=callback_url)]
    ]
    async with Writer(database, rules=MergeRules(Policy(), lambda _: None)) as writer:
        await writer.submit_all(started)


def inputs(number: int) -> list[dict[str, str]]:
    """What the run of that number is started with."""
    return [{"id": "prompt", "type": "text", "value": f"icon {number}"}]


async def begin(trial: Trial, start: Start) -> None:
    """Start the trial's runs at their times: at once, one each so many seconds, or one by one."""
    began = asyncio.get_running_loop().time()
    for number in range(trial.runs):
        if trial.every is not None:
            due = began + number * trial.every
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        run = await start(number)
        if trial.every is None:
            await asyncio.sleep(max(0.0, run.completed_ms / 1000 - time.time()))


@asynccontextmanager
async def serving(flora: Simulator, url: str, port: int, trial: Trial) -> AsyncIterator[None]:
    """`tracker serve` for that FLORA, ready; with nothing set that has a default."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.economy.serve", "serve", "--port", str(port)),
            env=environment(flora, url, port, trial),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            await _ready(process, port)
            yield
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            await _end(process)


def environment(
    flora: Simulator, url: str, port: int, trial: Trial | None = None
) -> dict[str, str]:
    """What a tracker needs to be told of that FLORA."""
    told = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        **flora.environment,
        "TRACKER_DATABASE_URL": url,
        "TRACKER_LOG_FORMAT": "json",
    }
    if trial is None:
        return told
    if trial.callbacks:
        told["TRACKER_PUBLIC_URL"] = f"http://127.0.0.1:{port}"
    if trial.longest_gather is not None:
        told["BENCH_LONGEST_GATHER"] = str(trial.longest_gather)
    return told | dict(trial.settings)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(30):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _ready(process: asyncio.subprocess.Process, port: int) -> None:
    async def answers() -> bool:
        if process.returncode is not None:
            raise RuntimeError(f"the tracker ended with status {process.returncode}")
        try:
            return (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        await eventually(answers, timeout=START_SECONDS, interval=0.1)


async def _all_settled(database: Database, count: int) -> None:
    async def settled() -> bool:
        return await settled_runs(database) >= count

    await eventually(settled, timeout=LATEST, interval=0.5)


async def _all_final(database: Database, count: int) -> None:
    statement = select(func.count()).select_from(runs).where(runs.c.cost_final)

    async def final() -> bool:
        async with database.read() as connection:
            return (await connection.execute(statement)).scalar_one() >= count

    await eventually(final, timeout=LATEST, interval=0.5)


async def _rows(database: Database) -> dict[str, Any]:
    statement = select(runs.c.run_id, runs.c.status, runs.c.settled_at)
    async with database.read() as connection:
        return {row.run_id: row for row in (await connection.execute(statement)).all()}
