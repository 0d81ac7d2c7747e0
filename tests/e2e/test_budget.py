"""A budget holds over processes that are killed while they start runs."""

import asyncio
import random
from pathlib import Path

import httpx
import pytest

from tests.e2e.lives import Life
from tests.e2e.short_waits import shorten_searches, shorten_waits
from tests.support.waiting import NO_SWEEPS, eventually, free_port
from tracker.core.clock import utc_now
from tracker.core.starts import Budget, Period
from tracker.simulator import Simulator, running
from tracker.simulator.options import Options
from tracker.store.engine import Database
from tracker.store.queries import spending

FITS = 20
SLOW: dict[str, object] = {"slow_starts": 1.0, "slow_seconds": 0.2}
CONFIG = """
[[budgets]]
usd = 5.00  # an icon pack costs 0.25
period = "total"
tag = "team=red"
"""


def prepare() -> None:
    """Doubts are resolved soon."""
    shorten_waits()
    shorten_searches()


@pytest.mark.timeout(120)
async def test_of_many_starts_exactly_20_are_sent_though_processes_are_killed(
    database_url: str, tmp_path: Path, thorough: bool
) -> None:
    """40 starts at once (where it is thorough 100) over two processes, which are killed between
    the reservation and FLORA's answer: when every caller has been told, FLORA has 20 runs, no key
    is paid twice, nothing is left reserved, and what is charged is what FLORA bills."""
    count = 100 if thorough else 40
    (tmp_path / "tracker.toml").write_text(CONFIG)
    options = Options(seed=3, run_seconds=0.5, failures=0, **SLOW)  # type: ignore[arg-type]
    async with running(options) as flora, await Database.open(database_url) as database:
        pair = _Pair(flora, database_url, tmp_path)
        try:
            await asyncio.gather(pair.begin(0), pair.begin(1))
            calling = asyncio.gather(*(pair.call(f"key-{n}") for n in range(count)))
            for number, after in ((0, 4), (1, 9)):
                await eventually(
                    lambda after=after: len(flora.world.started_with) >= after, timeout=30
                )
                pair.lives[number].kill()
                await pair.lives[number].end()
                if number == 0:
                    await pair.begin(number)  # the other one stays dead
            answers = await calling
            assert sorted(answers) == [201] * FITS + [402] * (count - FITS)
            started = list(flora.world.started_with.values())
            assert len(started) == len(set(started)) == FITS

            budget = Budget(usd=5, period=Period.TOTAL, tag=("team", "red"))  # type: ignore[arg-type]

            async def billed() -> bool:
                (used,) = await spending.usages(database, [budget], now=utc_now())
                return (used.reserved, used.quoted, used.charged, used.left) == (0, 0, 5, 0)

            await eventually(billed, timeout=40, interval=0.3)
        finally:
            for life in pair.lives.values():
                life.kill()
                await life.end()


class _Pair:
    """Two processes, and callers who ask whichever is there until they are told."""

    def __init__(self, flora: Simulator, database_url: str, folder: Path) -> None:
        self.lives: dict[int, Life] = {}
        self._ports = [free_port(), free_port()]
        self._chance = random.Random(3)
        self._folder = folder
        self._env = {
            **flora.environment,
            "TRACKER_CONFIG": str(folder / "tracker.toml"),
            "TRACKER_DATABASE_URL": database_url,
            "TRACKER_PUBLIC_URL": f"http://127.0.0.1:{self._ports[0]}",
            "TRACKER_START_DOUBT": "2",
            "TRACKER_CALLBACK_GRACE": "1",
            "TRACKER_POLL_INTERVAL": "1",
            "TRACKER_POLL_INTERVAL_MAX": "2",
            "TRACKER_COST_RECHECK": "1",
            "TRACKER_API_CONCURRENCY": "8",
            "TRACKER_RECONCILE_CRON": NO_SWEEPS,
        }

    async def begin(self, number: int) -> None:
        """Start a process."""
        port = self._ports[number]
        life = Life.begin(
            *("serve", "--port", str(port)),
            env=self._env,
            log=self._folder / f"life-{number}.log",
            prepare=prepare,
        )
        self.lives[number] = life
        assert await life.ready(f"http://127.0.0.1:{port}/healthz"), life.log

    async def call(self, key: str) -> int:
        """Start a run under a key, until it is known what came of it: 201 or 402."""
        inputs = [{"id": "prompt", "type": "text", "value": key}]
        body = {"technique": "icon-pack", "inputs": inputs, "tags": {"team": "red"}}
        async with httpx.AsyncClient(timeout=40, trust_env=False) as client:
            while True:
                port = self._chance.choice(self._ports)
                url = f"http://127.0.0.1:{port}/api/runs"
                try:
                    answer = await client.post(url, json=body | {"idempotency_key": key})
                except httpx.TransportError:
                    await asyncio.sleep(0.2)
                    continue
                if answer.status_code in (200, 201):
                    return 201
                if answer.status_code == 402:
                    assert answer.json()["error"]["code"] == "budget_exceeded"
                    return 402
                assert answer.status_code in (503, 504), answer.text
                await asyncio.sleep(0.2)
