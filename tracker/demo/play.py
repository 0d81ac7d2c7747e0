"""The play: runs are started, some callbacks get lost, everything settles, and it is checked."""

import asyncio
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from tracker.core.errors import TrackerError
from tracker.demo.screen import Screen
from tracker.demo.stage import Stage, open_stage
from tracker.demo.verdict import Verdict, judge
from tracker.operations.logs import configure_logs
from tracker.simulator.catalogue import find_technique

TECHNIQUES: Final = (
    "cctv-cam",
    "icon-pack",
    "palette-pull",
    "earth-zoom-out",
    "tarot-pull",
    "character-lock",
)
ROUNDS: Final = 2
ELSEWHERE: Final = "studio-shot"
"""The technique of the run that somebody else starts, of which the tracker is never told."""

BETWEEN_STARTS: Final = 0.3
LOOK_EVERY: Final = 0.25
LIMIT: Final = 55.0
"""Seconds after which the demo is given up."""


def run(*, as_json: bool = False) -> int:
    """Play it; 0 where all agree, 1 where they do not. Raises `TrackerError` at the limit."""
    configure_logs(level="error")  # forged callbacks are warned of, and they are part of the play
    screen = Screen(sys.stderr if as_json else sys.stdout)
    verdicts = asyncio.run(_play(screen))
    if as_json:
        screen.show_json(verdicts)
    else:
        screen.show_verdicts(verdicts)
    return 1 if any(verdict.differences for verdict in verdicts) else 0


async def _play(screen: Screen) -> list[Verdict]:
    try:
        async with asyncio.timeout(LIMIT), open_stage() as stage:
            with screen.live():
                starting = asyncio.create_task(_start_all(stage))
                try:
                    runs = await _watch(stage, screen, starting)
                finally:
                    starting.cancel()
            answer = await stage.flora.get("/simulator/runs")
            return judge(runs, answer.raise_for_status().json()["runs"])
    except TimeoutError as error:
        raise TrackerError(f"the demo did not come to its end within {LIMIT:g} s") from error


async def _start_all(stage: Stage) -> None:
    """A dozen runs through the tracker's API, and one behind its back."""
    stage.simulator.start(ELSEWHERE)
    for slug in TECHNIQUES * ROUNDS:
        technique = find_technique(slug)
        if technique is None:
            raise TrackerError(f"the simulator has no technique {slug}")
        body = {"technique": slug, "inputs": technique.sample_inputs()}
        answer = await stage.api.post("/api/runs", json=body)
        if answer.status_code != 201:
            raise TrackerError(f"a start was answered {answer.status_code}: {answer.text}")
        await asyncio.sleep(BETWEEN_STARTS)


async def _watch(
    stage: Stage, screen: Screen, starting: "asyncio.Task[None]"
) -> list[Mapping[str, Any]]:
    """Look at the tracker's list until all runs are there and settled; return the last one."""
    swept = False
    while True:
        answer = await stage.api.get("/api/runs", params={"limit": 100})
        runs: list[Mapping[str, Any]] = answer.raise_for_status().json()["runs"][::-1]
        screen.update(runs)
        if starting.done():
            starting.result()
            open_ = Counter(one["tracking"] for one in runs if one["tracking"] != "settled")
            if not open_ and len(runs) > len(TECHNIQUES) * ROUNDS:
                return runs
            if not open_ and not swept:
                # What `tracker reconcile` does: the run that was started elsewhere is found.
                (workspace,) = stage.services.workspaces
                await stage.services.sweeper.sweep(workspace)
                swept = True
        await asyncio.sleep(LOOK_EVERY)
