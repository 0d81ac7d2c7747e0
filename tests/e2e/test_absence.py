"""FLORA is away for a while: every place says so and since when, and that it is back."""

import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import Process, Sandbox, open_sandbox
from tests.e2e.short_waits import shorten
from tests.support.patience import always_wait_longer_for_the_database
from tests.support.scraping import scrape
from tests.support.waiting import eventually, free_port
from tracker import worker
from tracker.core import contact as core_contact
from tracker.core.clock import utc_now
from tracker.flora import resilience
from tracker.polling import poll
from tracker.store.queries import overview

WITHIN = 40.0
TOKEN = "a-token-of-the-absence"


def hasty() -> None:
    """Make this process notice within seconds what it otherwise notices within a minute."""
    always_wait_longer_for_the_database()
    for module in (core_contact, resilience):
        shorten(module, PATIENCE=timedelta(seconds=2))
    shorten(resilience, CONFIRMED=0.5)
    shorten(poll, PROBE_IDLE_AFTER=1.0, PROBE_FAILING_AFTER=0.5, KEEP_TICK=0.2)
    shorten(poll, KEEP_EVERY=timedelta(seconds=0.5), PROBE_SECONDS=2.0)
    shorten(worker, PROBE_EVERY=timedelta(seconds=0.3))
    shorten(overview, LATE_AFTER=timedelta(seconds=1))


@asynccontextmanager
async def two_processes(directory: Path, url: str) -> AsyncIterator[tuple[Sandbox, Process, str]]:
    """A sandbox, its FLORA, and the root of a process that only serves, beside one that works."""
    async with open_sandbox(directory, url) as sandbox:
        flora = await sandbox.simulate("--seed", "1", "--run-seconds", "600", "--drop", "100%")
        processes = []
        env = sandbox.environment | {"TRACKER_API_TOKEN": TOKEN, "TRACKER_CALLBACK_GRACE": "1"}
        for options in (("worker", "--port"), ("serve", "--no-worker", "--port")):
            port = free_port()
            log = directory / f"{options[0]}.log"
            one = Process.fork(*options, str(port), env=env, log=log, prepare=hasty)
            processes.append(one)
            await one.answers(f"http://127.0.0.1:{port}/healthz")
        try:
            yield sandbox, flora, f"http://127.0.0.1:{port}"
        finally:
            for one in processes:
                await one.end()


async def _doctor(sandbox: Sandbox) -> str:
    log = sandbox.directory / "doctor.log"
    log.write_text("")
    env = sandbox.environment | {"TRACKER_API_TOKEN": TOKEN, "TRACKER_PUBLIC_URL": ""}
    process = Process.fork("doctor", env=env, log=log, prepare=hasty)
    await process.wait()
    return re.sub(r"\s+", " ", process.log)


@pytest.mark.timeout(200)
async def test_floras_absence_is_reported_by_every_process(
    postgres_url: str, tmp_path: Path
) -> None:
    """While nothing but an open run is due, the process that asks FLORA nothing itself says on the
    overview, in `/readyz`, by its metrics and by the doctor since when FLORA has not answered; the
    run that waits for its retry is overdue; and all of that ends when FLORA is back."""
    async with two_processes(tmp_path, postgres_url) as (sandbox, flora, root):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(
            base_url=root, headers=headers, trust_env=False, timeout=20
        ) as client:

            async def ready() -> str:
                return str((await client.get("/readyz")).json()["flora"])

            async def overview() -> str:
                answer = await client.get("/", headers={"Accept": "text/html"})
                return answer.text

            async def is_up() -> bool:
                return (
                    await ready() == "ok"
                    and (await scrape(client)).value("tracker_flora_up") == 1
                    and "FLORA answers" in await overview()
                )

            await eventually(is_up, timeout=WITHIN)
            start = {
                "technique": "icon-pack",
                "inputs": [{"id": "prompt", "type": "text", "value": "tools"}],
            }
            run_id = (await client.post("/api/runs", json=start)).json()["run_id"]
            await eventually(is_up, timeout=WITHIN)

            went = utc_now()
            assert await flora.kill() == -signal.SIGKILL

            async def is_away() -> bool:
                return (await ready()).startswith("unreachable since ")

            await eventually(is_away, timeout=WITHIN)
            since = datetime.fromisoformat((await ready()).split()[2].rstrip(":"))
            assert went - timedelta(seconds=3) <= since <= went + timedelta(seconds=5)
            assert (await scrape(client)).value("tracker_flora_up") == 0

            async def waits_for_a_retry() -> bool:
                return run_id in (await overview()).partition("Overdue runs")[2]

            await eventually(waits_for_a_retry, timeout=WITHIN)
            page = await overview()
            assert re.search(r"FLORA has not answered since <time datetime=\"20", page)
            assert 'href="/runbook.html#trackerfloraunreachable"' in page
            assert "Runs are overdue" in page
            health = (await client.get("/health", headers={"Accept": "text/html"})).text
            assert "FLORA has not answered since" in health
            assert "FLORA answers" not in page + health
            report = await _doctor(sandbox)
            assert "FLORA has not answered the tracker since 20" in report
            assert "overdue" in report

            await sandbox.simulate("--seed", "1")
            await eventually(is_up, timeout=WITHIN)
