"""Who knows the secret of one workspace has no say over the runs of another."""

import json
from typing import Any

import pytest

from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML
from tracker.core.entry import Seen
from tracker.core.observation import Observation, Source
from tracker.core.run import RunStatus
from tracker.store import read
from tracker.wiring import Services

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
    row = await read.get_delivery(site.services.database, json.loads(body)["id"])
    assert row is not None
    return row.outcome.value


async def _stands(services: Services, run_id: str) -> tuple[str, str | None]:
    record = await read.get_run(services.database, run_id)
    assert record is not None
    return record.run.status.value, record.run.workspace_id


@pytest.mark.parametrize("named", [None, "ws_a", "ws_b"])
async def test_another_workspaces_run_is_neither_ended_nor_taken_over(
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
        await site.services.door.put(Seen(observation=of_b))
        body = _of("run_1", named)
        assert await _post(site, body, "whsec_of_a") == "quarantined"
        row = await read.get_delivery(site.services.database, json.loads(body)["id"])
        assert row is not None
        page = await site.client.post(f"/deliveries/{row.delivery_id}/replay", headers=HTML)
        assert "stays in quarantine" in page.text
        assert await _stands(site.services, "run_1") == ("running", "ws_b")
        own = json.loads(_of("run_1", "ws_b")) | {"id": "whd_own"}
        assert await _post(site, json.dumps(own).encode(), "whsec_of_b") == "applied"
        assert await _stands(site.services, "run_1") == ("completed", "ws_b")


async def test_a_run_that_nobody_has_heard_of_is_whose_secret_tells_of_it(
    serve: Serve, sqlite_url: str
) -> None:
    """A callback may come before anything else is known."""
    more = {"flora_webhook_secret": (), "workspaces": WORKSPACES}
    async with serve(sqlite_url, **more) as site:
        assert await _post(site, _of("run_2", None), "whsec_of_a") == "applied"
        assert await _stands(site.services, "run_2") == ("completed", "ws_a")
