"""Many receivers and workers on one PostgreSQL: some have wrong clocks, some are killed.

Each process is forked from one that has imported everything. What a killed one held is free after
`LEASE`, and sweeps come every other second. Who starts runs turns to another receiver where one is
gone, with the same idempotency key.
"""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path
from typing import Literal

import apscheduler.executors.base
import apscheduler.schedulers.base
import apscheduler.triggers.interval
import httpx
from apscheduler.triggers.interval import IntervalTrigger

from tests.e2e import short_waits
from tests.e2e.lives import FloraKey, Life
from tests.support.waiting import free_port
from tracker import worker
from tracker.core.clock import utc_now
from tracker.simulator import Simulator
from tracker.starting import recover, sending
from tracker.worker import WorkerTimes

LEASE = timedelta(seconds=3)
RENEW_AFTER = 0.5
POLL_INTERVAL = 0.5
SWEEP_EVERY = 2
"""Seconds, as everything here."""
AT_A_TIME = 16
"""So many runs are being started at a time."""
FAULT = re.compile(r'Traceback|deadlock|"level": ?"error"')
"""What must not stand in a log."""
FORESEEN = re.compile(
    r'"event": "(?:start\.unresolved|sweep\.(?:failed|item_unreadable)|catalogue\.failed'
    r'|flora\.(?:key_refused|trouble)|callbacks\.own_addresses_missing)"'
)
"""Errors for a person that are no faults of ours: FLORA or its gateway says so."""

Role = Literal["receiver", "worker"]


def prepare(off: float) -> None:
    """Make this process hasty, on a machine whose clock is `off` so many seconds."""
    shorten_waits()
    set_machine_clock(off)


def shorten_waits() -> None:
    """Short leases, frequent sweeps, and a client that does not wait long."""
    short_waits.shorten_waits()
    short_waits.shorten_key_memory()
    sending.HELD_FOR = recover.HELD_FOR = LEASE  # type: ignore[misc]
    short_waits.shorten(sending, RENEW_AFTER=RENEW_AFTER)
    short_waits.shorten_leases(LEASE, renew_after=RENEW_AFTER)
    times = WorkerTimes(recover_every=LEASE)
    worker.Worker = partial(worker.Worker, times=times)  # type: ignore
    worker.CronTrigger = lambda _: IntervalTrigger(seconds=SWEEP_EVERY)  # type: ignore


def set_machine_clock(off: float) -> None:
    """Put this process on a machine whose clock is wrong: whoever reads it is told so."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=off)

    def wrong() -> datetime:
        return utc_now() + timedelta(seconds=off)

    for module in tuple(sys.modules.values()):
        if getattr(module, "utc_now", None) is utc_now and module.__name__ != __name__:
            module.utc_now = wrong  # type: ignore[attr-defined]
    for theirs in (
        apscheduler.schedulers.base,
        apscheduler.executors.base,
        apscheduler.triggers.interval,
    ):
        theirs.datetime = Wrong


class Fleet:
    """Made by `fleet`. `receivers` are the roots of those that are alive, with their lives."""

    def __init__(self, flora: Simulator, database_url: str, directory: Path) -> None:
        self.receivers: dict[str, Life] = {}
        self.workers: list[Life] = []
        self.lives: list[Life] = []
        self.killed = 0
        self.started: dict[str, str] = {}
        """The runs that were answered, by idempotency key."""
        self.undecided: set[str] = set()
        """Keys of which callers were told that their outcome is not known yet."""
        self.slowest_start = 0.0
        self.key = FloraKey(flora, directory)
        self._database_url = database_url
        self._directory = directory
        self._home = free_port()

    async def join(self, role: Role, *, off: float = 0.0) -> None:
        """One more process, on a machine whose clock is `off` by so many seconds; it is ready."""
        # FLORA calls back to the second receiver: the first one is killed.
        is_home = role == "receiver" and len(self.receivers) == 1
        root = f"http://127.0.0.1:{self._home if is_home else free_port()}"
        port = root.rpartition(":")[2]
        command = ("serve", "--no-worker") if role == "receiver" else ("worker",)
        env = {
            **self.key.environment,
            "TRACKER_DATABASE_URL": self._database_url,
            "TRACKER_PUBLIC_URL": f"http://127.0.0.1:{self._home}",
            "TRACKER_START_DOUBT": "3",  # longer than FLORA works on any start
            "TRACKER_CALLBACK_GRACE": "1",
            "TRACKER_POLL_INTERVAL": f"{POLL_INTERVAL}",
            "TRACKER_POLL_INTERVAL_MAX": "1",
            "TRACKER_API_CONCURRENCY": "8",
            "TRACKER_LOG_FORMAT": "json",
        }
        log = self._directory / f"{len(self.lives)}-{role}.log"
        arguments = (*command, "--port", port)
        life = Life.begin(*arguments, env=env, log=log, prepare=partial(prepare, off))
        self.lives.append(life)
        if role == "receiver":
            self.receivers[root] = life
        else:
            self.workers.append(life)
        ready = "/readyz" if role == "receiver" else "/healthz"
        assert await life.ready(f"{root}{ready}"), f"it ended early:\n{life.log}"

    async def kill_receiver(self) -> None:
        """SIGKILL for the one that came first."""
        root = next(iter(self.receivers))
        life = self.receivers.pop(root)
        life.kill()
        await life.end()
        self.killed += 1

    async def kill_worker(self, holds_claims: Callable[[int], Awaitable[bool]]) -> None:
        """SIGKILL for the one that came first, at a moment when that process holds claims."""
        life = self.workers.pop(0)
        pid = life.pid
        for _ in range(1000):
            os.kill(pid, signal.SIGSTOP)
            if await holds_claims(pid):
                break
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.01)
        life.kill()
        await life.end()
        self.killed += 1

    async def start_runs(self, count: int) -> None:
        """Start so many runs, each once, at whichever receivers there are."""
        turns = asyncio.Semaphore(AT_A_TIME)
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:

            async def start(number: int) -> None:
                async with turns:
                    await self._start(client, number)

            await asyncio.gather(*(start(number) for number in range(count)))

    async def _start(self, client: httpx.AsyncClient, number: int) -> None:
        key = f"fleet-{number}"
        prompt = {"id": "prompt", "type": "text", "value": key}
        body = {"technique": "icon-pack", "inputs": [prompt], "idempotency_key": key}
        began = time.monotonic()
        for attempt in range(200):
            roots = list(self.receivers)
            with suppress(httpx.TransportError):
                url = f"{roots[(number + attempt) % len(roots)]}/api/runs"
                answer = await client.post(url, json=body)
                if answer.is_success:
                    self.started[key] = answer.json()["run_id"]
                    self.slowest_start = max(self.slowest_start, time.monotonic() - began)
                    return
                # 404: a gateway's to the read of the technique, which is there.
                assert answer.status_code in (404, 409, 502, 503, 504), answer.text
                if answer.json()["error"]["code"] in ("start_pending", "start_unresolved"):
                    # Its answer is lost, and its run, if there is one, may call back to nobody.
                    self.undecided.add(key)
                    return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{key} was never started")

    async def stop(self) -> None:
        """Tell all who live to stop: they end well, and nobody has logged a fault."""
        alive = [*self.receivers.values(), *self.workers]
        for life in alive:
            life.tell()
        for life in alive:
            assert await life.end() == 0, life.log
        for life in self.lives:
            faults = [line for line in life.log.splitlines() if FAULT.search(line)]
            faults = [line for line in faults if not FORESEEN.search(line)]
            assert not faults, faults[:5]

    async def close(self) -> None:
        """Make sure that nobody is left."""
        for life in self.lives:
            if life.status is None:
                life.kill()
                await life.end()


@asynccontextmanager
async def fleet(flora: Simulator, database_url: str, directory: Path) -> AsyncIterator[Fleet]:
    """A fleet whose processes are gone afterwards."""
    one = Fleet(flora, database_url, directory)
    try:
        yield one
    finally:
        await one.close()
