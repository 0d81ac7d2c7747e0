"""Python handlers, in real processes that are killed in and after a call."""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.lives import Life
from tests.e2e.processes import open_sandbox
from tests.e2e.short_waits import shorten, shorten_leases, shorten_webhooks
from tests.support.patience import always_wait_longer_for_the_database
from tests.support.waiting import START_SECONDS, eventually
from tracker import RunEvent, Tracker
from tracker.delivering import endpoints, webhooks
from tracker.simulator import Options, running
from tracker.starting import sending
from tracker.store.engine import Database
from tracker.store.queries.endpoints import list_messages

RUNS = 10


def handle(called: Path, die_in_call: int, die_after: int) -> None:
    """A program that starts runs and writes each call of its handler down. It kills itself in that
    call, or the first after it that is not timed out, or when it comes to the commit of outcomes so
    many times. It does not return."""
    always_wait_longer_for_the_database()
    shorten_webhooks()
    # A killed process may hold a run, or a start.
    shorten_leases(timedelta(seconds=2), renew_after=0.5)
    shorten(sending, HELD_FOR=timedelta(seconds=2), RENEW_AFTER=0.5)
    shorten(endpoints, COMMIT_SECONDS=0.5)
    record_and_claim: Callable[..., Any] = webhooks.record_and_claim
    calls = commits = 0

    def turn(connection: Any, *, outcomes: list[Any], **more: Any) -> Any:
        nonlocal commits
        commits += bool(outcomes)
        if outcomes and commits == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return record_and_claim(connection, outcomes=outcomes, **more)

    webhooks.record_and_claim = turn
    tracker = Tracker.from_env()

    @tracker.on("run.settled", name="store", timeout=1.5, concurrency=4)
    async def store(event: RunEvent) -> None:
        nonlocal calls
        calls += 1
        number = calls
        now = await event.run.refresh()
        done = event.run.settled and now.settled_at == event.run.settled_at and event.run.outputs
        if 0 < die_in_call <= number:
            os.kill(os.getpid(), signal.SIGKILL)
        with called.open("a") as file:
            file.write(f"{event.run.run_id} {event.message_id} {'settled' if done else 'early'}\n")

    async def work() -> None:
        async with tracker:
            for number in range(RUNS):
                inputs = {"prompt": f"tool {number}"}
                await tracker.start("icon-pack", inputs, idempotency_key=f"order-{number}")
            await asyncio.Event().wait()

    asyncio.run(work())


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "database_url",
    ["postgres", pytest.param("sqlite", marks=pytest.mark.thorough)],
    indirect=True,
)
async def test_every_run_is_handled_through_kills(
    tmp_path: Path, database_url: str, database: Database
) -> None:
    """Each run is started once, and its handler is called at least once, under one message and not
    before the run is settled, although its process is killed in a call, and after calls whose
    outcome is not stored. On PostgreSQL two processes share the work and some callbacks arrive; on
    SQLite none does."""
    called, shared = tmp_path / "called", "postgresql" in database_url
    options = Options(run_seconds=1.0, failures=0.0, drop=0.2 if shared else 1.0)
    async with AsyncExitStack() as stack:
        flora = await stack.enter_async_context(running(options))
        sandbox = await stack.enter_async_context(open_sandbox(tmp_path, database_url))
        env = sandbox.environment | flora.environment
        if shared:
            await sandbox.serve("--no-worker", **flora.environment)

        def begin(number: int, *, die_in_call: int = 0, die_after: int = 0) -> Life:
            log = tmp_path / f"handler-{number}.log"
            prepare = partial(handle, called, die_in_call, die_after)
            life = Life.begin(env=env, log=log, prepare=prepare)
            stack.push_async_callback(life.end)
            stack.callback(life.kill)
            return life

        life = begin(1, die_in_call=3)
        await eventually(lambda: life.status is not None, timeout=START_SECONDS)
        assert life.killed, life.log
        life = begin(2, die_after=2)
        await eventually(lambda: life.status is not None, timeout=START_SECONDS)
        assert life.killed, life.log
        last = [begin(3 + number) for number in range(1 + shared)]

        async def delivered() -> bool:
            rows, _ = await list_messages(database, state="delivered")
            return len(rows) == RUNS

        await eventually(delivered, timeout=60)
        for one in last:
            one.tell()
        lines = [line.split() for line in called.read_text().splitlines()]
        assert {run_id for run_id, _, _ in lines} == set(flora.world.runs)
        assert len(flora.world.runs) == RUNS
        assert len({message_id for _, message_id, _ in lines}) == RUNS
        assert {state for _, _, state in lines} == {"settled"}
        assert len(lines) > RUNS  # those of the second process were repeated
