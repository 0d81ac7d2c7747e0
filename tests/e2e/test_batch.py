"""A batch against everything that may go wrong: it is repeated until done, and pays once."""

import csv
import io
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.lives import Life
from tests.e2e.short_waits import shorten_waits
from tests.e2e.truth import assert_all_true
from tests.support.forked import Forked
from tests.support.waiting import NO_SWEEPS, eventually, free_port
from tracker.simulator import Options, Simulator, running
from tracker.store.engine import Database

ROWS = 50
KILLED_AFTER = 18
"""So many runs have begun at FLORA when the first command is killed."""
FAULTS: dict[str, Any] = {
    "seed": 7,
    "run_seconds": 0.5,
    "failures": 0.0,
    "rate_limit": 0.1,
    "errors": 0.02,
    "cut": 0.05,
    "gateway_starts": 0.1,
    "gateway_works": 0.5,
    "lost_starts": 0.03,
    "retry_after": 0,
}


def sheet(path: Path) -> list[str]:
    """Writes a sheet in which some rows are equal; returns the prompts, row by row."""
    prompts = [f"icon {number % (ROWS - 10)}" for number in range(ROWS)]
    text = io.StringIO()
    csv.writer(text).writerows([["prompt", "note"], *([prompt, "x"] for prompt in prompts)])
    path.write_text(text.getvalue())
    return prompts


class Command:
    """`tracker batch icon-pack SHEET` as a process of its own, in haste, beside a `tracker serve`
    that FLORA calls back."""

    def __init__(self, folder: Path, flora: Simulator, database_url: str) -> None:
        self._folder = folder
        self._port = free_port()
        self._commands = 0
        self._environ = {
            "TRACKER_PUBLIC_URL": f"http://127.0.0.1:{self._port}",
            "TRACKER_START_DOUBT": "2",
            **flora.environment,
            "TRACKER_DATABASE_URL": database_url,
            "TRACKER_API_CONCURRENCY": "8",
            "TRACKER_POLL_INTERVAL": "0.3",
            "TRACKER_POLL_INTERVAL_MAX": "1",
            "TRACKER_LOG_LEVEL": "error",
            "TRACKER_RECONCILE_CRON": NO_SWEEPS,
        }

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Serve while the block lasts."""
        serving = Life.begin(
            *("serve", "--port", str(self._port)),
            env=self._environ,
            log=self._folder / "serve.log",
            prepare=shorten_waits,
        )
        try:
            assert await serving.ready(f"http://127.0.0.1:{self._port}/healthz"), serving.log
            yield
        finally:
            serving.tell()
            await serving.end()
            assert "Traceback" not in serving.log, serving.log

    def begin(self) -> Forked:
        """Start it; what it prints and says is in the files `N.out` and `N.err`."""
        self._commands += 1
        return Forked.begin(
            *("batch", "icon-pack", "icons.csv", "--json"),
            env=self._environ,
            output=self._folder / f"{self._commands}.out",
            errors=self._folder / f"{self._commands}.err",
            folder=self._folder,
            prepare=shorten_waits,
        )

    async def run(self) -> tuple[int, dict[str, Any], str]:
        """Run it to its end: exit status, what it prints, what it says. One that FLORA did not
        answer in time is run again: in its haste it waits for half a second where it else waits for
        25, and has printed nothing."""
        output = ""
        while not output:
            status = await self.begin().wait(timeout=100)
            output, errors = (
                (self._folder / f"{self._commands}.{name}").read_text() for name in ("out", "err")
            )
            assert "Traceback" not in errors, errors
            assert output or (status == 1 and "FLORA" in errors), errors
        return status, json.loads(output), errors


async def killed_and_repeated(
    command: Command, flora: Simulator
) -> tuple[int, dict[str, Any], str]:
    """Kill the command in the middle, then repeat it until nothing changes any more. One that ends
    before, because FLORA did not answer it in time, is run again."""
    while len(flora.world.runs) < KILLED_AFTER:
        first = command.begin()

        async def killed_or_over(life: Forked = first) -> bool:
            return life.returncode is not None or len(flora.world.runs) >= KILLED_AFTER

        await eventually(killed_or_over, timeout=100)
        first.send_signal(signal.SIGKILL)
        await first.wait()
    assert len(flora.world.runs) < ROWS
    before = None
    while True:
        status, told, said = await command.run()
        if status == 0 or told["rows"] == before:
            return status, told, said
        before = told["rows"]


def assert_paid_once(flora: Simulator, prompts: list[str]) -> None:
    """No more runs were started of any inputs than the sheet has rows of them."""
    begun = Counter(run.inputs[0]["value"] for run in flora.world.runs.values())
    asked = Counter(prompts)
    assert {prompt: count for prompt, count in begun.items() if count > asked[prompt]} == {}


def assert_rows_are_their_runs(
    flora: Simulator, prompts: list[str], rows: list[dict[str, Any]]
) -> None:
    """Every run that a row names was started with that row's inputs, and no two rows share one."""
    named = [row["run_id"] for row in rows if row["run_id"] is not None]
    assert len(set(named)) == len(named)
    for row, prompt in zip(rows, prompts, strict=True):
        if row["run_id"] is not None:
            assert flora.world.runs[row["run_id"]].inputs[0]["value"] == prompt


@pytest.mark.timeout(120)
async def test_a_batch_is_paid_once_whatever_breaks(tmp_path: Path, database_url: str) -> None:
    """With 429s, 500s, cuts, a gateway's errors and a kill -9, repeating it ends with every
    row settled by a run of its own, without a person."""
    prompts = sheet(tmp_path / "icons.csv")
    async with running(Options(**FAULTS)) as flora:
        command = Command(tmp_path, flora, database_url)
        async with command.served():
            status, told, said = await killed_and_repeated(command, flora)
        assert status == 0, said
        assert len(flora.world.runs) == ROWS
        assert [row["status"] for row in told["rows"]] == ["completed"] * ROWS
        assert told["batch"]["completed"] == ROWS
        assert_paid_once(flora, prompts)
        assert_rows_are_their_runs(flora, prompts, told["rows"])
        async with await Database.open(database_url) as database:
            await assert_all_true(database, flora.root)


@pytest.mark.thorough
@pytest.mark.timeout(120)
async def test_a_batch_is_paid_once_where_keys_are_refused(tmp_path: Path, sqlite_url: str) -> None:
    """Where FLORA answers a used key with 409 alone, nothing is paid twice, and every row is
    settled or visibly unresolved. (Without processes: tests/worker/test_batch.py and test_start.py,
    the cases `conflict`.)"""
    prompts = sheet(tmp_path / "icons.csv")
    async with running(Options(**FAULTS, idempotency="conflict")) as flora:
        command = Command(tmp_path, flora, sqlite_url)
        async with command.served():
            status, told, said = await killed_and_repeated(command, flora)
        unresolved = [row for row in told["rows"] if row["status"] == "unresolved"]
        done = [row for row in told["rows"] if row["status"] == "completed"]
        assert len(done) + len(unresolved) == ROWS, said
        assert status == (1 if unresolved else 0)
        assert len(flora.world.runs) <= ROWS
        assert len(unresolved) <= ROWS / 10, said
        assert_paid_once(flora, prompts)
        assert_rows_are_their_runs(flora, prompts, told["rows"])
