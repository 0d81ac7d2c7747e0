"""The web applications store what they should: killed and started again while every callback is
lost, and with callbacks that arrive at their own address."""

import signal
from typing import Any, Final

import httpx
import pytest

from tests.e2e.processes import Process, Sandbox
from tests.examples.conftest import EXAMPLES, SOON, paid, simulate
from tests.support.waiting import START_SECONDS, eventually

FASTAPI: Final = ("-m", "uvicorn", "fastapi_app:app", "--app-dir", str(EXAMPLES), "--port")
DJANGO: Final = (str(EXAMPLES / "django_app.py"), "runserver", "--noreload")
ORDER: Final = "/orders/17"
PROMPT: Final = {"prompt": "garden tools"}
LATE: Final = {"TRACKER_CALLBACK_GRACE": "600"}
"""No run is polled in time: callbacks have to arrive."""


async def serve(sandbox: Sandbox, *program: str, ready: str = "/", **env: str) -> Process:
    """Start an application, and wait until it answers."""

    async def answers() -> bool:
        try:
            return (await client.get(ready)).status_code < 500
        except httpx.TransportError:
            return False

    process = await sandbox.run(*program, str(sandbox.port), **env)
    async with httpx.AsyncClient(base_url=sandbox.tracker, trust_env=False, timeout=20) as client:
        await eventually(answers, timeout=START_SECONDS)
    return process


async def result_of(client: httpx.AsyncClient) -> dict[str, Any]:
    """The order's result, when the application shows it."""

    async def result() -> Any:
        shown = (await client.get(ORDER)).json()
        return shown if shown.get("urls") else None

    return await eventually(result, timeout=45)  # type: ignore[no-any-return]


async def assert_paid_once(sandbox: Sandbox, result: dict[str, Any]) -> None:
    """FLORA bills one run, at the cost that the application shows."""
    (bill,) = await paid(sandbox)
    assert float(result["cost_usd"]) == bill["bill"]


@pytest.mark.parametrize(
    ("database", "drop"),
    [("sqlite_url", "1"), pytest.param("postgres_url", "0", marks=pytest.mark.thorough)],
)
async def test_the_fastapi_application_stores_the_result(
    sandbox: Sandbox, database: str, drop: str
) -> None:
    """The handler stores the result of the order's only run in the application's table: after a
    kill and a new start without any callback, and with one that arrives under the prefix."""
    await simulate(sandbox, drop=drop)
    env = {"TRACKER_PUBLIC_URL": f"{sandbox.tracker}/flora", "ready": "/flora/readyz"}
    env |= SOON if drop == "1" else LATE
    process = await serve(sandbox, *FASTAPI, **env)
    async with httpx.AsyncClient(base_url=sandbox.tracker, trust_env=False, timeout=20) as client:
        run = (await client.post(ORDER, params=PROMPT)).raise_for_status().json()
        if drop == "1":
            assert await process.kill() == -signal.SIGKILL
            process = await serve(sandbox, *FASTAPI, **env)
            again = (await client.post(ORDER, params=PROMPT)).raise_for_status().json()
            assert again["run_id"] == run["run_id"]
        await assert_paid_once(sandbox, await result_of(client))
        shown = (await client.get(f"/flora/api/runs/{run['run_id']}")).json()
        assert (shown["callback_at"] is None) == (drop == "1")
    await process.stop()
    assert "Application shutdown complete" in process.log, process.log


@pytest.mark.parametrize(
    ("database", "drop"),
    [pytest.param("postgres_url", "1", marks=pytest.mark.thorough), ("postgres_url", "0")],
)
async def test_the_django_project_shows_the_result(
    sandbox: Sandbox, database: str, drop: str
) -> None:
    """The view shows the result of the order's only run: after a kill and a new start without any
    callback, and with one that the project's own view stores."""
    await simulate(sandbox, drop=drop)
    env = SOON if drop == "1" else LATE
    await sandbox.work(**env)
    process = await serve(sandbox, *DJANGO, **env)
    async with httpx.AsyncClient(base_url=sandbox.tracker, trust_env=False, timeout=20) as client:
        assert (await client.get(ORDER)).status_code == 404
        run = (await client.post(ORDER, data=PROMPT)).raise_for_status().json()
        if drop == "1":
            assert await process.kill() == -signal.SIGKILL
            process = await serve(sandbox, *DJANGO, **env)
            again = (await client.post(ORDER, data=PROMPT)).raise_for_status().json()
            assert again["run_id"] == run["run_id"]
        await assert_paid_once(sandbox, await result_of(client))
    assert ("POST /callbacks/flora/" in process.log) == (drop == "0")
