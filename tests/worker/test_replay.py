"""Replaying stored callbacks: what is understood now is applied, what is not says why."""

import asyncio
import json
from typing import Any

import pytest

from tests.support import deliveries
from tests.support.deliveries import Delivered
from tracker.core.clock import utc_now
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.flora.callback import sign
from tracker.receiving.apply import UnknownDelivery
from tracker.services import Services, open_services
from tracker.settings import Settings, WorkspaceSettings
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import get_delivery, list_deliveries

SECRET = "whsec_replay"


def body(run_id: str = "run_1", **data: Any) -> bytes:
    """A callback that every version understands."""
    return json.dumps(
        {
            "id": "whd_1",
            "type": "run.completed",
            "data": {"run_id": run_id, "status": "completed"} | data,
        }
    ).encode()


def settings(database_url: str, *workspaces: str) -> Settings:
    """One workspace with that id, or several that share no secret."""
    if len(workspaces) > 1:
        several = [
            WorkspaceSettings(id=name, webhook_secrets=(f"{SECRET}_{name}",)) for name in workspaces
        ]
        return Settings(tracker_database_url=database_url, workspaces=several)
    return Settings(
        tracker_database_url=database_url,
        flora_webhook_secret=SECRET,
        flora_workspace_id=workspaces[0] if workspaces else None,
    )


async def keep(services: Services, content: bytes, *, signer: str | None = None) -> None:
    """As if an older version had not understood it."""
    await deliveries.keep(
        services.database,
        Delivered(
            delivery=Delivery(
                delivery_id="whd_1",
                received_at=services.clock(),
                body=content,
                workspace_id=signer,
            ),
            outcome=DeliveryOutcome.QUARANTINED,
            reason="an older version did not understand it",
        ),
    )


async def outcome(services: Services) -> DeliveryOutcome:
    row = await get_delivery(services.database, "whd_1")
    assert row is not None
    return row.outcome


async def test_what_is_understood_now_is_applied(database_url: str) -> None:
    """After an upgrade the kept bytes are enough; a second replay finds nothing to do."""
    async with open_services(settings(database_url)) as services:
        await keep(services, body())
        done = await services.replayer.replay("whd_1")
        assert (done.run_id, done.outcome, done.reason) == ("run_1", "applied", None)
        again = await services.replayer.replay("whd_1")
        assert (again.already, again.outcome) == (True, "applied")
        assert await read.get_run(services.database, "run_1") is not None


async def test_two_replays_at_once_apply_it_once(database_url: str) -> None:
    """Both report that it is applied."""
    async with open_services(settings(database_url)) as services:
        await keep(services, body())
        replay = services.replayer.replay
        both = await asyncio.gather(replay("whd_1"), replay("whd_1"))
        assert [one.outcome for one in both] == ["applied"] * 2
        run = await read.get_run(services.database, "run_1")
        assert run is not None
        assert len(await read.events(services.database, "run_1")) == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not json", "JSON"),
        (b'{"type": "run.paused"}', "type"),
        (b'{"type": "run.completed", "data": {"status": "completed"}}', "run_id"),
    ],
)
async def test_what_is_still_not_understood_stays_and_says_why(
    sqlite_url: str, content: bytes, why: str
) -> None:
    """It remains in quarantine, and no run comes of it."""
    async with open_services(settings(sqlite_url)) as services:
        await keep(services, content)
        done = await services.replayer.replay("whd_1")
        assert done.outcome is DeliveryOutcome.QUARANTINED
        assert why in (done.reason or "")
        row = await get_delivery(services.database, "whd_1")
        assert row is not None
        assert row.outcome is DeliveryOutcome.QUARANTINED


async def test_a_delivery_that_never_came_is_reported(sqlite_url: str) -> None:
    """Nothing is made up for it."""
    async with open_services(settings(sqlite_url)) as services:
        with pytest.raises(UnknownDelivery, match="whd_none"):
            await services.replayer.replay("whd_none")


async def test_a_replay_does_not_let_one_workspace_speak_for_another(sqlite_url: str) -> None:
    """Who can sign for one workspace cannot end another's runs, by way of quarantine either."""
    async with open_services(settings(sqlite_url, "ws_a", "ws_b")) as services:
        forged = body(workspace_id="ws_b")
        header = sign(forged, f"{SECRET}_ws_a", at=utc_now())
        await services.receiver.receive(forged, signature=header, webhook_id=None)[1]
        await services.applier.drain()
        assert await outcome(services) is DeliveryOutcome.QUARANTINED
        done = await services.replayer.replay("whd_1")
        assert done.outcome is DeliveryOutcome.QUARANTINED
        assert "ws_b" in (done.reason or "")
        assert await read.get_run(services.database, "run_1") is None


async def test_a_corrected_workspace_id_makes_a_replay_work(sqlite_url: str) -> None:
    """The id was mistyped, so all callbacks were quarantined; when it is right they are taken."""
    async with open_services(settings(sqlite_url, "ws_mistyped")) as services:
        content = body(workspace_id="ws_right")
        header = sign(content, SECRET, at=utc_now())
        await services.receiver.receive(content, signature=header, webhook_id=None)[1]
        await services.applier.drain()
        assert await outcome(services) is DeliveryOutcome.QUARANTINED
    async with open_services(settings(sqlite_url, "ws_right")) as services:
        done = await services.replayer.replay("whd_1")
        assert done.outcome is DeliveryOutcome.APPLIED
        record = await read.get_run(services.database, "run_1")
        assert record is not None
        assert record.run.workspace_id == "ws_right"


async def test_an_unknown_signer_does_not_open_an_unknown_workspace(sqlite_url: str) -> None:
    """What speaks of a workspace that is not configured here stays where it is."""
    async with open_services(settings(sqlite_url, "ws_a", "ws_b")) as services:
        await keep(services, body(workspace_id="ws_stranger"), signer="ws_gone")
        done = await services.replayer.replay("whd_1")
        assert done.outcome is DeliveryOutcome.QUARANTINED
        assert "not configured" in (done.reason or "")


async def test_an_id_that_stood_in_a_header_is_kept(sqlite_url: str) -> None:
    """The header is not stored, so the body alone would give the delivery another name."""
    async with open_services(settings(sqlite_url)) as services:
        content = json.loads(body())
        del content["id"]
        await keep(services, json.dumps(content).encode())
        assert (await services.replayer.replay("whd_1")).outcome is DeliveryOutcome.APPLIED
        rows, _ = await list_deliveries(services.database)
        assert [row.delivery_id for row in rows] == ["whd_1"]
