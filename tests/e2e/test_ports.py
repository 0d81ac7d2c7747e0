"""Callbacks on a port of their own: what is for everybody, and what is not."""

from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import Sandbox, open_sandbox
from tests.support.waiting import free_port
from tests.web.callbacks import PATH, event, signed

TOKEN = "a-token-of-the-tests"
SHOWN = {"Authorization": f"Bearer {TOKEN}"}
PRIVATE = ("/", "/login", "/api/runs", "/metrics", "/openapi.json", "/static/style.css")


async def _callback(client: httpx.AsyncClient, root: str, run_id: str) -> int:
    body = event(run_id)
    answer = await client.post(root + PATH, content=body, headers=signed(body, "whsec_simulator"))
    return answer.status_code


async def _only_callbacks(client: httpx.AsyncClient, root: str) -> None:
    """Whatever is shown, there is nothing but callbacks and health."""
    for path in PRIVATE:
        for headers in ({}, SHOWN):
            assert (await client.get(root + path, headers=headers)).status_code == 404, path
    assert (await client.get(f"{root}/healthz")).status_code == 200
    for headers in ({}, SHOWN):  # nor does it tell whether a token is the right one
        assert (await client.get(f"{root}/readyz", headers=headers)).json() == {"status": "ready"}


async def test_one_process_serves_both_apart(sandbox: Sandbox) -> None:
    """Callbacks and health on one port, everything else on the other, and no callback there."""
    port = free_port()
    serving = await sandbox.serve("--callbacks-port", str(port), TRACKER_API_TOKEN=TOKEN)
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        callbacks = f"http://127.0.0.1:{port}"
        await _only_callbacks(client, callbacks)
        assert await _callback(client, callbacks, "run_1") == 200
        assert await _callback(client, sandbox.tracker, "run_2") == 404
        assert (await client.get(f"{sandbox.tracker}/api/runs")).status_code == 401
        for path in ("/", "/api/runs", "/metrics", "/openapi.json"):
            answer = await client.get(sandbox.tracker + path, headers=SHOWN)
            assert answer.status_code == 200, path
    assert await serving.stop() == 0
    assert "Traceback" not in serving.log


async def test_callbacks_alone_are_served_anywhere_without_a_token(tmp_path: Path) -> None:
    """There is nothing else behind that port, so that it may be reached from everywhere."""
    url = f"sqlite:///{tmp_path}/tracker.db"
    public = {"TRACKER_PUBLIC_URL": "https://tracker.example.com"}
    async with (
        open_sandbox(tmp_path, url) as sandbox,
        httpx.AsyncClient(trust_env=False, timeout=20) as client,
    ):
        serving = await sandbox.serve("--callbacks-only", "--host", "0.0.0.0", **public)
        await _only_callbacks(client, sandbox.tracker)
        assert await _callback(client, sandbox.tracker, "run_1") == 200
        assert "serving.without_token" not in serving.log


@pytest.mark.parametrize("public", ["https://tracker.example.com", "http://127.0.0.1:8080"])
async def test_serving_without_a_token_is_logged_at_the_start(tmp_path: Path, public: str) -> None:
    """One clear line: a warning where `TRACKER_PUBLIC_URL` is set, which closes everything."""
    async with open_sandbox(tmp_path, f"sqlite:///{tmp_path}/tracker.db") as sandbox:
        serving = await sandbox.serve(TRACKER_PUBLIC_URL=public)
        (said,) = [line for line in serving.log.splitlines() if "serving.without_token" in line]
        assert "set TRACKER_API_TOKEN" in said
        assert ('"warning"' in said) == public.startswith("https")
