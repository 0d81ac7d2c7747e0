"""Starts against what real deployments meet, with processes that are killed and frozen.

A gateway answers in FLORA's place while the work goes on behind it, starts are slow, answered 500
although they run, cut or limited, FLORA knows a key only when its request is done and forgets it
soon, statuses are new, colleagues start runs too, the API key is exchanged. Receivers are killed,
and frozen for longer than their leases last. FLORA's own record shows whether anything was paid
twice, or a run was given to a key that did not start it.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import sqlalchemy as sa

from tests.e2e.lives import FloraKey, Life
from tests.e2e.short_waits import (
    KEYS_KEPT,
    shorten_doubt,
    shorten_key_memory,
    shorten_searches,
    shorten_waits,
)
from tests.e2e.truth import keys_of
from tests.support.waiting import eventually, free_port
from tracker.simulator import Options, Simulator, running
from tracker.store.engine import Database
from tracker.store.schema import starts

DEPLOYED: Final[dict[str, Any]] = {
    "keys_known": "at_end",
    "keys_released": True,
    "slow_starts": 0.08,
    "slow_run": "last",
    "gateway_starts": 0.1,
    "gateway_works": 0.5,
    "gateway_answers": ("502", "503", "504", "404", "empty", "page"),
    "lost_starts": 0.04,
    "failed_starts": 0.03,
    "queued": 0.1,
}
"""What starts meet where FLORA and a gateway in front of it are those of real deployments."""
FORGOTTEN: Final[dict[str, Any]] = {
    "key_hours": KEYS_KEPT / 3600,
    "colleague": 0.05,
    "colleague_seconds": 0.5,
}
"""FLORA forgets keys soon, and a colleague starts the same technique: what is in doubt then may
have to wait until its key is forgotten, and be left to a person."""
FAULTS: Final[dict[str, Any]] = {
    **DEPLOYED,
    **FORGOTTEN,
    "run_seconds": 1.0,
    "failures": 0.1,
    "slow_seconds": 2.5,
    "gateway_seconds": 0.2,
    "cut": 0.03,
    "rate_limit": 0.03,
    "retry_after": 0,
    "second_answer": "402",
}
DOUBT: Final = 5
"""Seconds: longer than FLORA works on any start, although the machine may stand still for two."""
FASTER: Final = 180 / DOUBT
"""How much shorter that is than the default."""
IN_PROPORTION: Final[dict[str, Any]] = {
    "speed": FASTER,
    "key_hours": None,
    "colleague": 0.01,
    **{
        name: FAULTS[name] * FASTER
        for name in ("run_seconds", "slow_seconds", "gateway_seconds", "colleague_seconds")
    },
}
"""FLORA tries to call back, and knows keys, for as long in proportion to `DOUBT` as it does; with
`prepare_in_proportion` of the processes."""
AT_A_TIME: Final = 12
"""So many callers wait for an answer."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """What came of it; `states` and what follows are as in `Keys`, and `unresolved_without_run` is
    how many keys are left to a person for which FLORA made nothing."""

    keys: int = 0
    runs: int = 0
    killed: int = 0
    frozen: int = 0
    states: Counter[str] = field(default_factory=Counter)
    paid_twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    told_wrong: list[str] = field(default_factory=list)
    unresolved_without_run: int = 0
    slowest_answer: float = 0.0


async def endure(
    database_url: str,
    folder: Path,
    *,
    seconds: float,
    receivers: int,
    seed: int,
    calm: float = 60.0,
    in_proportion: bool = False,
    **options: Any,
) -> Figures:
    """Start runs for so long, on a migrated database; then let what is in doubt be resolved for
    `calm` seconds at most. Keys are forgotten soon, or `in_proportion`."""
    if in_proportion:
        options = IN_PROPORTION | options
    async with (
        running(Options(**FAULTS | {"seed": seed} | options)) as flora,
        await Database.open(database_url) as database,
    ):
        one = _Endurance(flora, database, database_url, folder, random.Random(seed))
        one.prepare = prepare_in_proportion if in_proportion else prepare
        for number in range(receivers):
            await one.begin(number)
        try:
            await one.work(seconds)
            await one.settle(calm)
            return await one.judge()
        finally:
            for life in one.lives.values():
                life.kill()
                await life.end()


class _Endurance:
    def __init__(
        self,
        flora: Simulator,
        database: Database,
        database_url: str,
        folder: Path,
        chance: random.Random,
    ) -> None:
        self.figures = Figures()
        self.prepare: Callable[[], None] = prepare
        self.lives: dict[int, Life] = {}
        self._flora = flora
        self._key = FloraKey(flora, folder)
        self._database = database
        self._database_url = database_url
        self._folder = folder
        self._chance = chance
        self._ports: dict[int, int] = {}
        self._count = 0
        self._keys = 0
        self._told: dict[str, str] = {}
        self._working = True

    async def begin(self, number: int) -> None:
        port = self._ports.setdefault(number, free_port())
        root = f"http://127.0.0.1:{port}"
        self._count += 1
        environment = {
            **self._key.environment,
            "TRACKER_DATABASE_URL": self._database_url,
            # Where FLORA calls back has to be there, whoever is killed: the first one's address.
            "TRACKER_PUBLIC_URL": f"http://127.0.0.1:{self._ports[0]}",
            "TRACKER_START_DOUBT": str(DOUBT),
            "TRACKER_CALLBACK_GRACE": "2",
            "TRACKER_POLL_INTERVAL": "1",
            "TRACKER_POLL_INTERVAL_MAX": "2",
            "TRACKER_API_CONCURRENCY": "8",
            "TRACKER_LOG_FORMAT": "json",
        }
        life = Life.begin(
            *("serve", "--port", str(port)),
            env=environment,
            log=self._folder / f"life-{self._count}.log",
            prepare=self.prepare,
        )
        self.lives[number] = life
        assert await life.ready(f"{root}/healthz"), life.log

    async def work(self, seconds: float) -> None:
        """Callers start runs; a process is killed or frozen every second or so."""
        end = time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=40, trust_env=False) as client:
            calling = [asyncio.create_task(self._call(client)) for _ in range(AT_A_TIME)]
            while time.monotonic() < end:
                await asyncio.sleep(self._chance.uniform(0.5, 2.0))
                if self._chance.random() < 0.1:
                    await self._key.exchange()
                number = self._chance.choice(list(self.lives))
                if self._chance.random() < 0.5:
                    self.lives[number].kill()
                    await self.lives[number].end()
                    self.figures.killed += 1
                    await self.begin(number)
                else:
                    self.lives[number].freeze()
                    await asyncio.sleep(self._chance.uniform(0.5, 3.0))  # leases last for two
                    self.lives[number]._process.send_signal(signal.SIGCONT)
                    self.figures.frozen += 1
            self._working = False
            await asyncio.wait(calling, timeout=40)
            for call in calling:
                call.cancel()
            for ended in await asyncio.gather(*calling, return_exceptions=True):
                assert not isinstance(ended, Exception), ended

    async def _call(self, client: httpx.AsyncClient) -> None:
        while self._working:
            self._keys += 1
            key = f"key-{self._keys}"
            while True:
                answer = await self._ask(client, key)
                if answer is not None and answer.is_success:
                    run_id = answer.json()["run_id"]
                    assert self._told.setdefault(key, run_id) == run_id
                    if self._chance.random() < 0.9:
                        break
                elif answer is not None and answer.status_code not in (502, 503, 504):
                    assert answer.status_code in (402, 409), answer.text
                    break
                if not self._working or self._chance.random() < 0.1:
                    break  # this caller gives up
                await asyncio.sleep(0.2)

    async def _ask(self, client: httpx.AsyncClient, key: str) -> httpx.Response | None:
        port = self._ports[self._chance.choice(list(self._ports))]
        body = {
            "technique": "icon-pack",
            "inputs": [{"id": "prompt", "type": "text", "value": key}],
            "idempotency_key": key,
        }
        began = time.monotonic()
        try:
            answer = await client.post(f"http://127.0.0.1:{port}/api/runs", json=body)
        except httpx.TransportError:
            return None
        self.figures.slowest_answer = max(self.figures.slowest_answer, time.monotonic() - began)
        return answer

    async def settle(self, seconds: float) -> None:
        """Let callbacks come and doubts be resolved, until nothing is open or the time is up."""
        faults = ("gateway_starts", "slow_starts", "cut", "lost_starts", "failed_starts")
        self._flora.world.change(dict.fromkeys((*faults, "rate_limit", "colleague"), 0))
        try:
            await eventually(self._nothing_is_open, timeout=seconds, interval=0.5)
        except AssertionError:
            return  # what is left is counted

    async def _nothing_is_open(self) -> bool:
        query = (
            sa.select(sa.func.count())
            .select_from(starts)
            .where(starts.c.state.in_(("sent", "in_doubt")))
        )
        async with self._database.read() as connection:
            return await connection.scalar(query) == 0

    async def judge(self) -> Figures:
        """Compare with FLORA's own record of which key started which run."""
        figures, keys = self.figures, await keys_of(self._database, self._flora, self._told)
        figures.keys, figures.runs = keys.states.total(), len(self._flora.world.started_with)
        figures.states = keys.states
        figures.paid_twice, figures.wrong = keys.paid_twice, keys.wrong
        figures.told_wrong = keys.told_wrong
        figures.unresolved_without_run = len({*keys.unresolved} - keys.started)
        return figures


def prepare() -> None:
    """Leases last two seconds, so that a frozen process loses them, and doubt ends as soon."""
    shorten_waits(patient=False)  # callers ask again, and each answer has to come in time
    shorten_key_memory()
    shorten_searches()


def prepare_in_proportion() -> None:
    """The same, but keys are known for as long as doubt lasts in proportion."""
    shorten_waits(patient=False)
    shorten_doubt(FASTER)
