"""`tracker deliveries`: callbacks listed, shown and replayed from the command line."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Commands
from tests.support.deliveries import Delivered, keep
from tracker.core.clock import utc_now
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.services import open_services
from tracker.settings import Settings

GOOD = json.dumps(
    {"id": "whd_good", "type": "run.failed", "data": {"run_id": "run_1", "status": "failed"}}
).encode()


async def _fill(folder: Path) -> None:
    settings = Settings(tracker_database_url=f"sqlite:///{folder / 'tracker.db'}")
    async with open_services(settings) as services:
        for name, body in (("whd_good", GOOD), ("whd_bad", b"\xff\x00 no text")):
            await keep(
                services.database,
                Delivered(
                    delivery=Delivery(
                        delivery_id=name,
                        received_at=utc_now(),
                        body=body,
                    ),
                    outcome=DeliveryOutcome.QUARANTINED,
                    reason="made up",
                ),
            )


@pytest.fixture
def filled(tracker: Commands) -> Commands:
    """Two quarantined deliveries, of which one can be replayed."""
    asyncio.run(_fill(tracker.folder))
    return tracker


def test_callbacks_are_listed_shown_and_replayed(filled: Commands) -> None:
    """One that is understood now is applied; one that is not makes the status 1 and says why."""
    listed = filled.json("deliveries", "list", "--outcome", "quarantined")["deliveries"]
    assert [one["delivery_id"] for one in listed] == ["whd_bad", "whd_good"]
    assert "body" not in listed[0]
    assert filled.json("deliveries", "show", "whd_good")["body"] == GOOD.decode()
    assert filled.json("deliveries", "show", "whd_bad")["body_base64"] == "/wAgbm8gdGV4dA=="

    done = filled("deliveries", "replay", "--all", "--json")
    assert done.returncode == 1
    good, bad = json.loads(done.stdout)["deliveries"]
    assert (good["delivery_id"], good["outcome"], good["run_id"]) == (
        "whd_good",
        "applied",
        "run_1",
    )
    assert (bad["outcome"], bool(bad["reason"])) == ("quarantined", True)
    assert filled.json("runs", "show", "run_1")["status"] == "failed"
    assert "applied" in filled("deliveries", "replay", "whd_good").stdout


def test_acknowledged_callbacks_stay_and_are_counted_no_more(filled: Commands) -> None:
    """Acknowledging changes what counts as a problem, not the outcome, and allows a replay."""
    done = filled.json("deliveries", "acknowledge", "whd_bad")
    assert done == {"acknowledged": ["whd_bad"]}
    bad, good = filled.json("deliveries", "list", "--outcome", "quarantined")["deliveries"]
    assert bad["acknowledged_at"].endswith("Z")
    assert good["acknowledged_at"] is None
    assert filled.json("deliveries", "acknowledge", "--all") == {"acknowledged": ["whd_good"]}
    assert "0 deliveries" in filled("deliveries", "acknowledge", "--all").stderr
    entries = filled.json("audit", "list", "--action", "acknowledge")["entries"]
    assert [one["detail"] for one in entries] == [
        {"delivery_id": "whd_good"},
        {"delivery_id": "whd_bad"},
    ]
    assert "applied" in filled("deliveries", "replay", "whd_good").stdout
    unknown = filled("deliveries", "acknowledge", "whd_none")
    assert (unknown.returncode, "whd_none" in unknown.stderr) == (1, True)
    assert filled("deliveries", "acknowledge").returncode == 2


def test_what_cannot_be_replayed_is_told(tracker: Commands) -> None:
    """An unknown id is status 1; neither ids nor --all is wrong usage; an empty quarantine is
    fine."""
    unknown = tracker("deliveries", "replay", "whd_none")
    assert (unknown.returncode, "whd_none" in unknown.stderr) == (1, True)
    assert tracker("deliveries", "replay").returncode == 2
    assert tracker("deliveries", "replay", "whd_1", "--all").returncode == 2
    assert tracker("deliveries", "replay", "--all").returncode == 0
    assert tracker("deliveries", "show", "whd_none").returncode == 1
