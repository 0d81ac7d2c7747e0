"""What compose.yaml declares works together: a dry run of it, with real processes."""

import asyncio
import re
import shutil
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.deploy.stack import LEFT_OUT, SERVICES, Stack
from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.flora.callback import sign
from tracker.simulator import Options, running

RUNS = 4
START = {"technique": "icon-pack", "inputs": [{"id": "prompt", "type": "text", "value": "a cat"}]}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_the_stack_of_compose_yaml_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Migrated by its job, reached through TLS for callbacks and on this machine for the rest,
    started with the made secrets: runs that are started at one receiver are shown by both, settled
    by the workers, seen by Prometheus and by the role for dashboards; and everything ends in the
    time that it is given."""
    services = set(SERVICES) - LEFT_OUT - (set() if shutil.which("prometheus") else {"prometheus"})
    options = Options(failures=0, run_seconds=0.2)
    async with running(options) as flora, AsyncExitStack() as stack:
        deployed = Stack(tmp_path, flora.environment, stack)
        monkeypatch.setenv("SSL_CERT_FILE", str(deployed.certificate))  # FLORA trusts it
        await asyncio.gather(*(deployed.up(name) for name in services))
        await deployed.healthy("worker")

        token = deployed.secret("tracker_api_token")
        trusting = ssl.create_default_context(cafile=deployed.certificate)
        headers = {"Authorization": f"Bearer {token}", "Connection": "close"}
        client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{deployed.private_port}",
            headers=headers,
            trust_env=False,
            timeout=20,
        )
        public = httpx.AsyncClient(
            base_url=f"https://{deployed.host}",
            headers=headers,
            verify=trusting,
            trust_env=False,
            timeout=20,
        )
        async with client, public:
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/", headers={"Authorization": ""})).status_code in (303, 307)
            for path in ("/", "/login", "/api/runs", "/metrics", "/openapi.json"):
                assert (await public.get(path)).status_code == 404, path
            answers = await asyncio.gather(
                *(client.post("/api/runs", json=START) for _ in range(RUNS))
            )
            assert [answer.status_code for answer in answers] == [201] * RUNS

            async def settled() -> list[dict[str, Any]] | None:
                runs = (await client.get("/api/runs")).json()["runs"]
                is_settled = {run["tracking"] for run in runs} == {"settled"}
                return runs if is_settled and all(run["callback_at"] for run in runs) else None

            # The page with which a worker settles one run may tell of another's end first.
            runs = await eventually(settled)
            assert len(runs) == RUNS
            assert {run["ended_via"] for run in runs} <= {"callback", "history"}
            assert all(run["outputs"] for run in runs)

            # What FLORA sent comes again, over connections of its own: each receiver takes it.
            del deployed.connections[:]
            for body in await bodies(deployed):
                signature = sign(body, deployed.secret("flora_webhook_secret"), at=utc_now())
                headers = {"Flora-Signature": signature}
                answer = await public.post("/callbacks/flora", content=body, headers=headers)
                assert answer.is_success
            assert set(deployed.connections) == set(deployed.callback_ports)
            await metrics_token_reads_metrics_alone(deployed, client)

            if "prometheus" in services:
                await prometheus_sees(deployed)
            await token_is_rotated(deployed, client)
        await dashboards_read(deployed)
        await ends_in_time(deployed)


async def bodies(deployed: Stack) -> list[bytes]:
    """The callbacks as they came."""
    connection = await asyncpg.connect(deployed.secret("database_url"))
    rows = await connection.fetch("SELECT body FROM deliveries")
    await connection.close()
    assert len(rows) == RUNS
    return [row["body"] for row in rows]


async def metrics_token_reads_metrics_alone(deployed: Stack, client: httpx.AsyncClient) -> None:
    """What Prometheus is given is neither for the API nor for pages."""
    headers = {"Authorization": f"Bearer {deployed.secret('metrics_token')}"}
    assert (await client.get("/metrics", headers=headers)).status_code == 200
    assert (await client.get("/api/runs", headers=headers)).status_code == 403
    assert (await client.post("/api/runs", headers=headers, json=START)).status_code == 403


async def token_is_rotated(deployed: Stack, client: httpx.AsyncClient) -> None:
    """A token that is written over another counts at once, without a restart; the old one soon
    does not."""
    old, new = deployed.secret("tracker_api_token"), "another-token-that-is-long-enough"
    deployed.rotate("tracker_api_token", new)
    for port in deployed.ports["receiver"]:
        url = f"http://127.0.0.1:{port}/api/runs"
        answer = await client.get(url, headers={"Authorization": f"Bearer {new}"})
        assert answer.status_code == 200
        answer = await client.get(url, headers={"Authorization": f"Bearer {old}"})
        assert answer.status_code == 401


async def prometheus_sees(deployed: Stack) -> None:
    """Every process of ours is scraped, with its token, and the alerts are loaded."""
    expected = {
        f"127.0.0.1:{port}" for name in ("receiver", "worker") for port in deployed.ports[name]
    }
    root = f"http://127.0.0.1:{deployed.prometheus_port}/api/v1"

    async def up() -> bool:
        try:
            answer = await client.get(f"{root}/query", params={"query": "tracker_build_info"})
        except httpx.TransportError:
            return False
        if not answer.is_success:  # it listens before it is ready
            return False
        result = answer.json().get("data", {}).get("result", [])
        return {one["metric"]["instance"] for one in result} == expected

    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        await eventually(up)
        groups = (await client.get(f"{root}/rules")).json()["data"]["groups"]
    assert sum(len(group["rules"]) for group in groups) > 0


async def dashboards_read(deployed: Stack) -> None:
    """The role that Grafana's data source names reads every view, and no more than reads."""
    url = deployed.secret("database_url")
    url = re.sub("//.*@", f"//dashboards:{deployed.secret('dashboards_password')}@", url)
    connection = await asyncpg.connect(url)
    views = await connection.fetch(
        "SELECT table_name FROM information_schema.views WHERE table_schema = 'public'"
    )
    assert views
    for (name,) in views:
        await connection.fetch(f"SELECT * FROM {name} LIMIT 1")
    with pytest.raises(asyncpg.PostgresError):
        await connection.execute("SET default_transaction_read_only = off; DELETE FROM runs")
    await connection.close()


async def ends_in_time(deployed: Stack) -> None:
    """SIGTERM, as `docker compose down` sends it: each ends with 0 within its grace period."""
    for name in ("receiver", "worker"):
        seconds = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        async with asyncio.timeout(seconds):
            stopped = [process.stop() for process in deployed.processes[name]]
            assert await asyncio.gather(*stopped) == [0] * len(stopped)
