"""The layout on a phone, and times in the viewer's zone."""

import asyncio
import re

import pytest
from playwright.async_api import Route, expect

from tests.browser.conftest import LiveTracker, OpenPage, sign_in
from tests.browser.test_flows import start
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
RECORD_PAINTED_TIMES = """
window.painted = new Set();
const record = () => {
  for (const each of document.querySelectorAll("time")) painted.add(each.textContent);
  requestAnimationFrame(record);
};
requestAnimationFrame(record);
"""


async def test_the_navigation_of_a_phone_is_at_its_bottom(
    live: LiveTracker, open_page: OpenPage
) -> None:
    """Four pages and More are at the bottom of the screen, wherever it is scrolled; the other pages
    are behind More, which needs no script."""
    watched = await open_page(**PHONE, java_script_enabled=False)
    page = watched.page
    await page.goto(f"{live.url}/audit")
    await page.fill("#token", "a-token-of-the-tests")
    await page.get_by_role("button", name="Sign in").tap()
    await page.wait_for_url("**/audit")
    bar = page.get_by_role("navigation", name="Pages")
    for name in ("Overview", "Runs", "Batches", "Deliveries"):
        box = await bar.get_by_role("link", name=name).bounding_box()
        assert box is not None
        assert 780 < box["y"] + box["height"] <= 844
    await expect(bar.get_by_role("link", name="Techniques")).to_be_hidden()
    await bar.get_by_role("button", name="More").tap()
    await bar.get_by_role("link", name="Techniques").tap()
    await expect(page).to_have_url(f"{live.url}/techniques")
    # With room for all pages there is nothing to open.
    await page.set_viewport_size({"width": 1280, "height": 800})
    await expect(bar.get_by_role("link", name="Audit")).to_be_visible()
    await expect(bar.get_by_role("button", name="More")).to_be_hidden()


async def test_paper_shows_no_bars_and_buttons(live: LiveTracker, open_page: OpenPage) -> None:
    """A sheet is as narrow as a phone, whose bar would cover the end of each page."""
    watched = await open_page(viewport={"width": 718, "height": 1000})
    page = watched.page
    await sign_in(page, f"{live.url}/spending")
    await expect(page.get_by_role("navigation")).to_be_visible()
    await page.emulate_media(media="print")
    await expect(page.get_by_role("heading", name="Spending")).to_be_visible()
    await expect(page.get_by_role("navigation")).to_be_hidden()
    assert await page.locator("button:visible, select:visible").count() == 0
    watched.assert_quiet()


async def test_forced_colours_mark_the_current_page(live: LiveTracker, open_page: OpenPage) -> None:
    """They remove the background that marks it otherwise."""
    page = (await open_page(forced_colors="active")).page
    await sign_in(page, f"{live.url}/runs")
    links = page.get_by_role("navigation", name="Pages", exact=True).get_by_role("link")
    widths = await links.evaluate_all(
        "(all) => all.map((one) => [one.textContent.trim(), getComputedStyle(one).borderTopWidth])"
    )
    assert [name for name, width in widths if width != "0px"] == ["Runs"]


async def test_a_phone_folds_the_filters_away(live: LiveTracker, open_page: OpenPage) -> None:
    """The search is shown, and the other filters after a tap; a wide screen shows them all."""
    watched = await open_page(**PHONE)
    page = watched.page
    await sign_in(page, f"{live.url}/runs")
    await expect(page.get_by_label("Search")).to_be_visible()
    await expect(page.get_by_label("State")).to_be_hidden()
    await page.get_by_text("Filters", exact=True).tap()
    await page.get_by_label("State").select_option("failed")
    await page.wait_for_url("**/runs?state=failed")
    await page.reload()
    await expect(page.get_by_label("State")).to_be_hidden()
    await page.set_viewport_size({"width": 1280, "height": 800})
    await expect(page.get_by_label("State")).to_be_visible()
    watched.assert_quiet()


async def test_no_time_is_painted_in_utc_first(live: LiveTracker, open_page: OpenPage) -> None:
    """No frame shows a time in UTC, while other scripts are still being loaded either."""
    watched = await open_page(timezone_id="Asia/Kolkata")
    page = watched.page
    await start(live)
    await sign_in(page, f"{live.url}/runs")
    scripts = asyncio.Event()

    async def hold(route: Route) -> None:
        await scripts.wait()
        await route.continue_()

    await page.route("**/js/main.js", hold)
    await page.add_init_script(RECORD_PAINTED_TIMES)
    await page.goto(f"{live.url}/runs", wait_until="commit")
    painted = "[...painted]"
    await eventually(lambda: page.evaluate(f"document.querySelector('footer') && {painted}.length"))
    scripts.set()
    await page.wait_for_load_state("load")
    assert [one for one in await page.evaluate(painted) if "UTC" in one] == []
    watched.assert_quiet()


async def test_a_relative_time_is_shown_exactly_by_a_tap(
    live: LiveTracker, open_page: OpenPage
) -> None:
    """A tap shows one, the button at the bottom shows all, also on the next page; without scripts
    times are exact and in UTC."""
    watched = await open_page(**PHONE, timezone_id="Asia/Kolkata")
    page = watched.page
    run_id = await start(live)
    await sign_in(page, f"{live.url}/runs")
    shown = page.locator(f'tr[data-run="{run_id}"] time')
    await expect(shown).to_have_text(re.compile("ago|now"))
    await shown.tap()
    await expect(shown).to_have_text(re.compile(r"\d\d:\d\d:\d\d$"))
    await shown.tap()
    await expect(shown).to_have_text(re.compile("ago|now"))
    await page.get_by_role("button", name="Show exact times").tap()
    await expect(shown).to_have_text(re.compile(r"\d\d:\d\d:\d\d$"))
    await page.reload()
    await expect(shown).to_have_text(re.compile(r"\d\d:\d\d:\d\d$"))
    state = await page.context.storage_state()
    plain = await open_page(java_script_enabled=False, storage_state=state)
    await plain.page.goto(f"{live.url}/runs/{run_id}")
    await expect(plain.page.locator("main time").first).to_have_text(re.compile("UTC$"))
    watched.assert_quiet()
