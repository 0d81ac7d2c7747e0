"""The loop of FLORA's own recipe: each run is read every two seconds until it has ended.

It follows the very runs of a trial, begun at the same times, and is counted in the same way.
"""

import asyncio
import time
from typing import Final

import httpx

from bench.economy.flora import flora_of, reads
from bench.economy.tracked import TECHNIQUE, begin, inputs
from bench.economy.trial import Found, Trial
from tracker.simulator.runs import SimulatedRun

EVERY: Final = 2.0


def run_recipe(trial: Trial) -> Found:
    """The whole trial, without a tracker."""
    return asyncio.run(_run(trial))


async def _run(trial: Trial) -> Found:
    loop = asyncio.get_running_loop()
    fresh: list[float] = []
    async with (
        flora_of(trial) as flora,
        httpx.AsyncClient(
            base_url=f"{flora.base_url}/",
            headers={"authorization": f"Bearer {flora.world.options.api_key}"},
            timeout=60,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=64),
            trust_env=False,
        ) as client,
        asyncio.TaskGroup() as loops,
    ):

        async def follow(run: SimulatedRun, began: float) -> None:
            looks = 0
            while True:
                looks += 1
                await asyncio.sleep(began + looks * EVERY - loop.time())
                answer = await client.get(run.poll_url)
                if answer.json()["status"] in ("completed", "failed"):
                    fresh.append(time.time() - run.completed_ms / 1000)
                    return

        async def start(number: int) -> SimulatedRun:
            run = flora.start(TECHNIQUE, inputs(number))
            loops.create_task(follow(run, loop.time()))
            return run

        await begin(trial, start)
    ends = [run.completed_ms / 1000 for run in flora.world.runs.values()]
    return Found(
        name=trial.name,
        ended=len(ends),
        settled=len(fresh),
        reads=reads(flora),
        window=max(ends) - min(ends),
        fresh=sorted(fresh),
    )
