"""That FLORA does not answer, or that its address does not fit, is told wherever someone looks."""

import time
from datetime import UTC, datetime

import pytest

from tests.support.waiting import never
from tests.web.conftest import Serve, Site
from tests.web.flora import START, with_flora
from tests.web.test_metrics import scrape
from tracker.core.errors import FloraError
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.flora.client import FloraClient

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("answers", "ready", "metrics"),
    [
        ("502", "unreachable since 20", (0, 0)),
        ("404", "not FLORA's API since 20", (0, 1)),
    ],
)
async def test_a_flora_that_does_not_answer_is_reported(
    serve: Serve,
    sqlite_url: str,
    answers: str,
    ready: str,
    metrics: tuple[int, int],
) -> None:
    """By `/readyz`, the metrics and the overview, once it was asked in vain for 30 s, and until it
    answers again."""
    passed = [0.0]
    async with with_flora(serve, sqlite_url) as (site, flora):
        [workspace] = site.services.workspaces
        async with FloraClient(
            base_url=flora.base_url,
            api_key=flora.world.options.api_key,
            monotonic=lambda: time.monotonic() + passed[0],
            backoff=never,
        ) as workspace.client:
            flora.world.change({"gateway": 1, "gateway_answers": answers, "gateway_works": 0})
            with pytest.raises(FloraError):
                await workspace.require_client().history(limit=1)
            assert (await site.client.get("/readyz")).json()["flora"].startswith("no answer yet")
            passed[0] = 31.0
            answer = await site.client.get("/readyz")
            assert answer.status_code == 200
            assert answer.json()["flora"].startswith(ready)
            found = await scrape(site.client)
            assert (
                found.value("tracker_flora_up", workspace_id=workspace.name),
                found.value("tracker_flora_misconfigured", workspace_id=workspace.name),
            ) == metrics
            page = (await site.client.get("/")).text
            assert "No run is lost by this" in page
            flora.world.change({"gateway": 0})
            assert (await site.client.post("/api/runs", json=START)).status_code == 201
            assert (await site.client.get("/readyz")).json()["flora"] == "ok"
            assert (await scrape(site.client)).value(
                "tracker_flora_up", workspace_id=workspace.name
            ) == 1


async def test_a_status_of_a_newer_flora_is_shown_and_filtered_by(site: Site) -> None:
    """By the API and the pages, an end of an unknown kind too; a status that no run has is named
    as a fault."""
    for run_id, status, ended in (("run_q", "queued", None), ("run_c", "<b>cancelled</b>", NOW)):
        seen = Observation(
            run_id=run_id, source=Source.POLL, at=NOW, status=status, completed_at=ended
        )
        await site.services.writer.submit(Observed(observation=seen))
    run = (await site.client.get("/api/runs/run_c")).json()
    assert (run["status"], run["tracking"]) == ("<b>cancelled</b>", "settled")
    for status, run_id in (("queued", "run_q"), ("<b>cancelled</b>", "run_c")):
        found = await site.client.get("/api/runs", params={"status": status})
        assert [one["run_id"] for one in found.json()["runs"]] == [run_id]
    events = (await site.client.get("/api/runs/run_q/events")).json()["events"]
    assert [event["status"] for event in events] == ["queued"]
    wrong = await site.client.get("/api/runs", params={"status": "done"})
    assert (wrong.status_code, wrong.json()["error"]["fields"][0]["field"]) == (400, "status")
    for path in ("/", "/runs?state=other", "/runs/run_c", "/runs/run_q"):
        page = await site.client.get(path)
        assert page.status_code == 200
        assert "<b>cancelled" not in page.text
    listed = (await site.client.get("/runs?state=other")).text
    assert ("run_q" in listed, "run_c" in listed) == (True, True)
