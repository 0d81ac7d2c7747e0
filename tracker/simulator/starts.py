"""How a start is answered: keys, slow answers, lost answers, and what colleagues do meanwhile."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from random import Random
from typing import Final

from starlette.responses import Response

from tracker.simulator.callbacks import Courier
from tracker.simulator.idempotency import Answer, UsedKey
from tracker.simulator.options import Workspace
from tracker.simulator.problems import Problem
from tracker.simulator.runs import SimulatedRun
from tracker.simulator.world import World

_SECOND_ANSWERS: Final = {
    "400": ("input_validation_error", "The input is not valid."),
    "402": ("insufficient_credits", "The workspace has no credits left."),
    "404": ("not_found", "There is no such technique."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """A start that has been checked.

    `begin` starts its runs, at least one, and gives the answer. `fingerprint` tells its body from
    others with the same key.
    """

    workspace: Workspace
    technique_id: str | None
    key: UsedKey | None
    fingerprint: str
    begin: Callable[[], tuple[list[SimulatedRun], Answer]]


class Starts:
    """Answers the starts of one world."""

    def __init__(self, world: World, courier: Courier) -> None:
        self._world = world
        self._courier = courier
        self._failed: set[UsedKey] = set()
        """The keys whose last start was answered 500."""

    async def answer(self, start: StartRequest, number: int) -> Response:
        """The answer to request `number`. Raises `Problem` where it is an error."""
        world, options = self._world, self._world.options
        random = Random(f"{options.seed}/start/{number}")
        slow, fails, lost, colleague = (
            random.random() < rate
            for rate in (
                options.slow_starts,
                options.failed_starts,
                options.lost_starts,
                options.colleague,
            )
        )
        if start.key is not None:
            self._check_second(start.key)
            known = world.keys.recall(start.key, start.fingerprint, options, world.now_ms())
            if known is not None:
                return respond(known, {"idempotent-replayed": "true"})
        if fails:
            raise self._server_error(start)
        at_once = options.keys_known == "at_once"
        wait = options.slow_seconds / options.speed if slow else 0.0
        busy = nullcontext() if start.key is None else world.keys.in_progress(start.key)
        with busy if at_once else nullcontext():
            if wait and options.slow_run == "last":
                await asyncio.sleep(wait)
            runs, answer = start.begin()
        if start.key is not None:
            world.started_with |= {run.run_id: start.key[1] for run in runs}
        if at_once:
            self._keep(start, answer)
        attempted = [self._courier.schedule(run) for run in runs]
        if colleague and start.technique_id is not None:
            await self._start_colleague(start.technique_id, start.workspace)
        if wait and options.slow_run == "first":
            await asyncio.sleep(wait)
        if "early" in runs[0].faults:
            await attempted[0].wait()
        if lost:
            if start.key is not None and options.keys_released:
                world.keys.release(start.key)
            raise self._server_error(start)
        if not at_once:
            self._keep(start, answer)
        return respond(answer)

    def _check_second(self, key: UsedKey) -> None:
        """Refuses a start after one that was answered 500, once and where that is wanted."""
        wanted = self._world.options.second_answer
        if key in self._failed and wanted != "none":
            self._failed.discard(key)
            raise Problem(int(wanted), *_SECOND_ANSWERS[wanted])

    def _keep(self, start: StartRequest, answer: Answer) -> None:
        if start.key is not None:
            world = self._world
            world.keys.keep(start.key, start.fingerprint, answer, world.now_ms())

    def _server_error(self, start: StartRequest) -> Problem:
        if start.key is not None:
            self._failed.add(start.key)
        return Problem(500, "internal_error", "Something went wrong on our side.")

    async def _start_colleague(self, technique_id: str, workspace: Workspace) -> None:
        wait = self._world.options.colleague_seconds / self._world.options.speed

        async def begin() -> None:
            await asyncio.sleep(wait)
            with suppress(Problem):  # no caller to tell that the credits are used up
                self._world.start_colleague(technique_id, workspace)

        if wait:
            self._courier.background.run(begin())
        else:
            await begin()


def respond(answer: Answer, headers: Mapping[str, str] | None = None) -> Response:
    """The response that carries an answer."""
    return Response(answer.body, answer.status, headers, media_type="application/json")
