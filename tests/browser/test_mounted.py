"""The dashboard of a tracker that is mounted in another application."""

from pathlib import Path

import pytest
from playwright.async_api import expect
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.browser.conftest import TOKEN, OpenPage
from tests.support.databases import sqlite_url_of
from tests.support.shares import share_of
from tests.support.waiting import NO_SWEEPS
from tests.web.mounting import plain_uvicorn
from tracker import Tracker
from tracker.settings import Settings
from tracker.simulator import Options, running

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_walk_through_a_mounted_dashboard(
    tmp_path: Path, open_page: OpenPage, thorough: bool
) -> None:
    """Sign in, see a run end live with its image, filter, open pages, sign out: all
    under the prefix, and nothing is refused or missing."""
    async with running(Options(seed=4, run_seconds=2, failures=0, drop=1)) as flora:
        options = flora.world.options
        tracker = Tracker(
            Settings(
                tracker_database_url=sqlite_url_of(tmp_path / "tracker.db"),
                tracker_api_token=TOKEN,
                flora_api_key=options.api_key,
                flora_base_url=flora.base_url,
                tracker_reconcile_cron=NO_SWEEPS,
            )
        )
        app = Starlette(routes=[Mount("/flora", tracker.asgi())], lifespan=tracker.lifespan)
        async with plain_uvicorn(app) as origin:
            watched = await open_page()
            page, url = watched.page, f"{origin}/flora"
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            missing: list[str] = []
            page.on("response", lambda one: missing.append(one.url) if one.status >= 400 else None)
            await page.goto(f"{url}/runs")
            await page.get_by_label("Token").fill(TOKEN)
            await page.keyboard.press("Enter")
            await expect(page).to_have_url(f"{url}/runs")
            await expect(page.locator("#live-state .word")).to_have_text("live")
            run = await tracker.start("icon-pack", {"prompt": "garden tools"})
            row = page.locator(f"[data-run='{run.run_id}']")
            await expect(row).to_contain_text("completed")
            await expect(row.locator("img").first).to_be_visible()
            await page.get_by_label("Search").fill("no such run")
            await expect(page.get_by_role("heading", name="No matching runs")).to_be_visible()
            await page.goto(f"{url}/runs/{run.run_id}")
            await expect(page.locator("#live img").first).to_be_visible()
            pages = await page.locator("nav[aria-label=Pages] a").evaluate_all(
                "links => links.map((link) => link.href)"
            )
            assert len(pages) == 10
            for address in share_of(pages, of=5, thorough=thorough):
                await page.goto(address)
                await expect(page.locator("main h1")).to_be_visible()
            await page.get_by_role("button", name="Sign out").click()
            await expect(page).to_have_url(f"{url}/login")
            watched.assert_quiet()
            assert missing == []
            assert [one for one in asked if one.startswith(origin) and f"{url}/" not in one] == []
            await page.close()
