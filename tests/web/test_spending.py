"""Tags, budgets and spending over HTTP, and as pages show them."""

import re
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.web.conftest import Serve, Site
from tests.web.flora import START
from tracker.core.starts import Period
from tracker.settings.model import BudgetSettings
from tracker.simulator import Options, running

BUDGETS = (BudgetSettings(usd=Decimal("0.60"), period=Period.TOTAL, tag=("team", "red")),)


async def start(site: Site, key: str, **more: Any) -> httpx.Response:
    body = START | {"idempotency_key": key, "tags": {"team": "red"}} | more
    return await site.client.post("/api/runs", json=body)


async def test_tags_budgets_and_spending(serve: Serve, database_url: str) -> None:
    """A start beyond a budget is a 402 that names it; what was spent is told as JSON, as metrics
    and on the page; runs are found by tag and project."""
    async with (
        running(Options(failures=0)) as flora,
        serve(
            database_url,
            flora_base_url=flora.base_url,
            flora_api_key=flora.world.options.api_key,
            tracker_budget_month="$12.50",
            budgets=BUDGETS,
        ) as site,
    ):
        run = (await start(site, "a")).json()
        assert run["tags"] == {"team": "red"}
        assert run["reserved_cost"] == 0.25
        assert (await start(site, "b", tags={"team": "red", "n": "1"})).status_code == 201
        refused = await start(site, "c")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (402, "budget_exceeded")
        assert (error["budget"], error["left"]) == ("total:tag=team=red", 0.1)
        assert error["renews_at"] is None
        assert "Nothing was sent" in error["message"]
        assert len(flora.world.runs) == 2

        get = site.client.get
        found = (await get("/api/runs", params={"tag": "n=1"})).json()["runs"]
        assert [one["tags"] for one in found] == [{"n": "1", "team": "red"}]
        assert (await get("/api/runs", params={"tag": "team=blue"})).json()["runs"] == []
        assert (await get("/api/runs", params={"project_id": "prj_9"})).json()["runs"] == []
        wrong = (await get("/api/runs", params={"tag": "team"})).json()["error"]
        assert "'team' is not KEY=VALUE" in wrong["fields"][0]["message"]

        shown = (await get("/api/spending", params={"by": "tag:team"})).json()
        assert [(one["of"], one["runs"], one["quoted"]) for one in shown["spending"]] == [
            ("red", 2, 0.5)
        ]
        month, total = shown["budgets"]
        assert (month["budget"], month["usd"]) == ("month:workspace_id=ws_simulator", 12.5)
        assert (total["quoted"], total["left"], total["tag"]) == (0.5, 0.1, "team=red")
        assert (await get("/api/spending", params={"by": "team"})).status_code == 400

        metrics = (await get("/metrics")).text
        assert 'tracker_budget_usd{budget="total:tag=team=red"} 0.6' in metrics
        assert re.search(r'budget_used_usd\{budget="total:[^}]+part="quoted"\} 0.5', metrics)
        assert 'starts_over_budget_total{budget="total:tag=team=red"} 1.0' in metrics

        page = (await get("/spending?tag=team", headers={"Accept": "text/html"})).text
        assert "$0.10</strong> of $0.60 left" in page
        assert "/runs?tag=team%3Dred" in page
        overview = (await get("/", headers={"Accept": "text/html"})).text
        told = "83.3 % of a budget is used: $0.50 of $0.60 in total for tag team=red."
        assert told in overview
        runs = (await get("/runs", params={"tag": "n=1"})).text
        assert (runs.count('id="row-'), run["run_id"] in runs) == (1, False)
        assert (await get("/runs", params={"tag": "n"})).status_code == 400
        one = (await get(f"/runs/{run['run_id']}")).text
        assert 'href="/runs?tag=team%3Dred">team=red</a>' in one


@pytest.mark.parametrize(
    ("tags", "told"),
    [({"a b": "c"}, "a key is 1 to 64"), ({"a": ""}, "1 to 255"), ({"a": 1}, "valid string")],
)
async def test_wrong_tags_are_refused(small_site: Site, tags: Any, told: str) -> None:
    """With the field that is wrong, and before anything is looked up."""
    answer = await start(small_site, "a", tags=tags)
    assert answer.status_code == 400
    (fault,) = answer.json()["error"]["fields"]
    assert fault["field"].startswith("tags")
    assert told in fault["message"]


async def test_the_page_begins_with_a_tag_of_a_budget(serve: Serve, sqlite_url: str) -> None:
    """Else with the tag that has the fewest values; what has no such tag is not hidden behind the
    highest values."""
    async with (
        running(Options(failures=0)) as flora,
        serve(
            sqlite_url,
            flora_base_url=flora.base_url,
            flora_api_key=flora.world.options.api_key,
            budgets=[{"usd": 100, "period": "total", "tag": "order=1"}],
        ) as site,
    ):
        assert (await start(site, "none", tags={})).status_code == 201
        for number in range(13):
            tags = {"order": str(number), "a-team": "red"}
            assert (await start(site, f"{number}", tags=tags)).status_code == 201
        page = (await site.client.get("/spending", headers={"Accept": "text/html"})).text
        assert 'By tag <span class="id">order</span>' in page
        assert "other runs" in page
        assert "1 more: <code>tracker spending --by tag:order</code>" in page


async def test_the_page_is_there_before_anything_was_spent(small_site: Site) -> None:
    """Without budgets it says how to set some."""
    page = await small_site.client.get("/spending", headers={"Accept": "text/html"})
    assert page.status_code == 200
    assert "TRACKER_BUDGET_DAY" in page.text
    assert (await small_site.client.get("/spending?span=1y")).status_code == 400
