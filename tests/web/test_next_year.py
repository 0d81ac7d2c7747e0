"""What a newer version has stored is shown as it is, and makes no page or answer fail."""

import re
from collections.abc import Iterator

import pytest
from starlette.routing import Route

from tests.support import next_year
from tests.support.next_year import NEW, RUNS
from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve
from tests.web.streaming import following
from tracker.web.app import build_app

IDS = {
    "run_id": RUNS,
    "batch_id": ("bat_1",),
    "delivery_id": ("whd_1",),
    "message_id": ("msg_1",),
    "technique": ("tech_1",),
    "technique_id": ("tech_1",),
    "endpoint_id": ("hook", "paused"),
}
VIEWS = {
    "/runs": ("q=run_", "sort=cost", "sort=duration", "within=24h"),
    "/runs.csv": ("q=run_",),
    "/batches/{batch_id:any}": tuple(
        f"outcome={one}" for one in ("failed", "running", "completed")
    ),
    "/": ("period=7d",),
    "/spending": ("by=technique", "by=tag"),
    "/api/spending": ("by=technique",),
    "/api/starts": ("state=stored", "state=in_doubt"),
    "/api/batches/{batch_id}/rows": ("outcome=failed",),
}


def _addresses(routes: list[Route]) -> Iterator[str]:
    """Every page and every answer to read, of each row there is."""
    for route in routes:
        if "GET" not in (route.methods or ()) or route.path.startswith(("/static", "/api/stream")):
            continue
        name = re.search(r"{(\w+)[^}]*}", route.path)
        for one in IDS[name[1]] if name else ("",):
            path = re.sub(r"{[^}]*}", one, route.path)
            yield path
            yield from (f"{path}?{query}" for query in VIEWS.get(route.path, ()))


async def test_no_page_or_answer_fails(serve: Serve, database_url: str) -> None:
    """Every route to read is asked for every row, and those about one row show its words."""
    await next_year.fill(database_url)
    settings = {"flora_api_key": "sk_test_1", "flora_base_url": "http://127.0.0.1:9"}
    async with serve(database_url, **settings, flora_workspace_id="ws_1") as site:
        shown, failed = {}, {}
        for address in _addresses(list(build_app(site.services).routes)):
            html = {} if address.startswith("/api") else {"Accept": "text/html"}
            answer = await site.client.get(address, headers=html)
            if answer.status_code == 500:
                failed[address] = answer.text
            shown[address] = answer.text
        assert not failed
        for address in (
            *(f"/api/runs/{run_id}" for run_id in RUNS),
            *(f"/api/runs/{run_id}/events" for run_id in RUNS),
            *(f"/runs/{run_id}" for run_id in RUNS),
            *("/api/batches/bat_1/rows", "/api/deliveries", "/api/messages", "/api/techniques"),
            *("/audit", "/runs", "/batches/bat_1", "/deliveries", "/deliveries/whd_1"),
            *("/messages", "/messages/msg_1", "/endpoints/hook", "/techniques/tech_1"),
        ):
            assert NEW in shown[address], address


@pytest.mark.both_databases
async def test_a_trouble_that_another_process_reports_is_shown(
    serve: Serve, database_url: str
) -> None:
    """It takes no process out of a load balancer."""
    await next_year.fill(database_url)
    async with serve(database_url, flora_api_key="sk_test_1") as site:
        assert (await site.client.get("/readyz")).status_code == 200
        assert (await site.client.get("/metrics")).status_code == 200
        page = await site.client.get("/health", headers={"Accept": "text/html"})
        assert f"FLORA cannot be read ({NEW})" in page.text


@pytest.mark.both_databases
async def test_a_repeated_callback_is_acknowledged(serve: Serve, database_url: str) -> None:
    """With the outcome that is stored; a replay leaves it to the newer version."""
    await next_year.fill(database_url)
    async with serve(database_url) as site:
        body = event("run_ended", id="whd_1")
        answer = await site.client.post(PATH, content=body, headers=signed(body))
        assert (answer.status_code, answer.json()) == (200, {"outcome": NEW, "repeated": True})
        answer = await site.client.post("/api/deliveries/whd_1/replay")
        assert (answer.status_code, answer.json()["outcome"]) == (200, NEW)


@pytest.mark.both_databases
async def test_the_stream_shows_runs_as_they_are(serve: Serve, database_url: str) -> None:
    """The source of an event is a text."""
    await next_year.fill(database_url)
    async with serve(database_url) as site, following(site.client, last="1") as events:
        shown = [await events.next() for _ in RUNS]
    assert {one["data"]["event"]["source"] for one in shown} == {NEW}
    assert {one["data"]["run"]["source"] for one in shown} == {NEW}
