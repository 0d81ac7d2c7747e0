"""Who knows the secret of one workspace has no say over the runs of another."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.support.waiting import eventually
from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import RunStatus
from tracker.services import Services
from tracker.simulator import Options, SimulatedWorkspace, Simulator, running
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import get_delivery

WORKSPACES = [
    {"id": "ws_a", "webhook_secrets": "whsec_of_a"},
    {"id": "ws_b", "webhook_secrets": "whsec_of_b"},
]


def _of(run_id: str, workspace_id: str | None) -> bytes:
    body: dict[str, Any] = json.loads(event(run_id))
    if workspace_id is not None:
        body["data"]["workspace_id"] = workspace_id
    return json.dumps(body).encode()


async def _post(site: Site, body: bytes, secret: str) -> str:
    answer = await site.client.post(PATH, content=body, headers=signed(body, secret))
    assert answer.status_code == 200
    await site.services.applier.drain()
    row = await get_delivery(site.services.database, json.loads(body)["id"])
    assert row is not None
    return row.outcome.value


async def _stands(services: Services, run_id: str) -> tuple[str, str | None]:
    record = await read.get_run(services.database, run_id)
    assert record is not None
    return str(record.run.status), record.run.workspace_id


@pytest.mark.parametrize("named", [None, "ws_a", "ws_b"])
async def test_a_run_of_another_workspace_is_neither_ended_nor_claimed(
    serve: Serve, database_url: str, named: str | None
) -> None:
    """Whatever workspace the body names, it is quarantined, and a replay does not apply it; what
    the run's own workspace signs is applied."""
    more = {"flora_webhook_secret": (), "workspaces": WORKSPACES}
    async with serve(database_url, **more) as site:
        of_b = Observation(
            run_id="run_1",
            source=Source.POLL,
            at=site.services.clock(),
            status=RunStatus.RUNNING,
            workspace_id="ws_b",
        )
        await site.services.writer.submit(Observed(observation=of_b))
        body = _of("run_1", named)
        assert await _post(site, body, "whsec_of_a") == "quarantined"
        row = await get_delivery(site.services.database, json.loads(body)["id"])
        assert row is not None
        page = await site.client.post(f"/deliveries/{row.delivery_id}/replay", headers=HTML)
        assert "Still quarantined" in page.text
        assert await _stands(site.services, "run_1") == ("running", "ws_b")
        own = json.loads(_of("run_1", "ws_b")) | {"id": "whd_own"}
        assert await _post(site, json.dumps(own).encode(), "whsec_of_b") == "applied"
        assert await _stands(site.services, "run_1") == ("completed", "ws_b")


async def test_an_unknown_run_belongs_to_the_workspace_of_the_secret(
    serve: Serve, sqlite_url: str
) -> None:
    """A callback may come before anything else is known."""
    more = {"flora_webhook_secret": (), "workspaces": WORKSPACES}
    async with serve(sqlite_url, **more) as site:
        assert await _post(site, _of("run_2", None), "whsec_of_a") == "applied"
        assert await _stands(site.services, "run_2") == ("completed", "ws_a")


OF_B = SimulatedWorkspace(workspace_id="ws_b", api_key="sk_of_b", webhook_secret="whsec_of_b")
FLORA = Options(
    workspace_id="ws_a",
    api_key="sk_of_a",
    webhook_secret="whsec_of_a",
    more_workspaces=(OF_B,),
    failures=0.0,
)


@asynccontextmanager
async def _both(serve: Serve, database_url: str, *, run_seconds: float) -> AsyncIterator[Any]:
    """A tracker of both workspaces, FLORA, and the id of a run of the second one."""
    async with running(replace(FLORA, run_seconds=run_seconds)) as flora:
        keys = [one | {"api_key": f"sk_of_{one['id'][-1]}"} for one in WORKSPACES]
        more = {"flora_webhook_secret": (), "flora_base_url": flora.base_url, "workspaces": keys}
        async with serve(database_url, **more) as site:
            yield site, flora, flora.start(workspace=OF_B).run_id


async def _claim_for_a(site: Site, run_id: str) -> None:
    """Whoever knows the secret of A says first that the run has ended; then its owner does."""
    assert await _post(site, _of(run_id, "ws_a"), "whsec_of_a") == "applied"
    own = json.dumps(json.loads(_of(run_id, "ws_b")) | {"id": "whd_own"}).encode()
    assert await _post(site, own, "whsec_of_b") == "quarantined"


async def _is_with_its_owner(site: Site, run_id: str, status: str) -> None:
    await site.services.applier.drain()
    row = await get_delivery(site.services.database, "whd_own")
    assert row is not None
    assert (row.outcome.value, row.reason) == ("applied", None)
    assert await _stands(site.services, run_id) == (status, "ws_b")


async def test_a_false_claim_ends_with_the_next_poll(serve: Serve, database_url: str) -> None:
    """FLORA denies the run to the key of the workspace that claimed it, and shows it to the owner's
    key: the owner's quarantined callback is applied, and the run is settled."""
    async with _both(serve, database_url, run_seconds=0.01) as (site, flora, run_id):
        await eventually(lambda: _has_ended(flora, run_id))
        await _claim_for_a(site, run_id)
        await site.services.poller.poll_due()
        await _is_with_its_owner(site, run_id, "completed")
        record = await read.get_run(site.services.database, run_id)
        assert record is not None
        assert record.run.settled


async def test_a_false_claim_ends_with_the_next_sweep(serve: Serve, database_url: str) -> None:
    """The owner's history shows it as still running, and nothing that a callback says is above."""
    async with _both(serve, database_url, run_seconds=3600) as (site, _, run_id):
        await _claim_for_a(site, run_id)
        owner = site.services.workspaces.of("ws_b")
        assert owner is not None
        assert (await site.services.sweeper.sweep(owner)).error is None
        await _is_with_its_owner(site, run_id, "completed")


def _has_ended(flora: Simulator, run_id: str) -> bool:
    return flora.world.runs[run_id].status(flora.world.now_ms()) == "completed"
