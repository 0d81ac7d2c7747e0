"""Every page, light and dark, wide and narrow: accessible, and safe against hostile text."""

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.async_api import Page, Route, expect

from tests.browser.conftest import READER, LiveTracker, OpenPage, resize, sign_in
from tests.browser.test_flows import quarantine, start
from tests.browser.test_runs_and_batches import keep_batch
from tests.support.shares import share_of
from tests.support.webhooks import add_endpoint, add_message
from tests.web.dashboard.hostile import (
    BATCH_ID,
    DELIVERY_ID,
    ENDPOINT_ID,
    EVIL,
    MESSAGE_ID,
    RUN_ID,
    TECHNIQUE_ID,
)
from tracker.core.run import Tracking
from tracker.starting.sheet import read_csv
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import list_deliveries
from tracker.store.queries.endpoints import get_message

pytestmark = pytest.mark.asyncio(loop_scope="session")

AXE = Path(__file__).parent / "axe" / "node_modules" / "axe-core" / "axe.min.js"
HOSTILE = [
    "/",
    "/runs",
    f"/runs?text={quote(EVIL)}",
    f"/runs/{quote(RUN_ID, safe='')}",
    "/batches",
    f"/batches/{quote(BATCH_ID, safe='')}",
    "/deliveries",
    f"/deliveries?cause={quote(EVIL)}",
    f"/deliveries/{quote(DELIVERY_ID + '0', safe='')}",
    f"/deliveries/{quote(DELIVERY_ID + '1', safe='')}",
    "/techniques",
    f"/techniques/{quote(TECHNIQUE_ID, safe='')}",
    "/spending",
    "/health",
    "/endpoints",
    f"/endpoints/{quote(ENDPOINT_ID, safe='')}",
    "/messages",
    f"/messages/{quote(MESSAGE_ID, safe='')}",
    "/audit",
]
VIOLATIONS = """
async (options) => {
  const found = await axe.run(document, {resultTypes: ["violations"], ...options});
  return found.violations
    .map((each) => `${each.id}: ${each.nodes.slice(0, 3).map((node) => node.html).join(" | ")}`);
}
"""
ALL_RULES = {"rules": {"target-size": {"enabled": True}}}
CONTRAST = {"runOnly": ["color-contrast"]}  # what the other colours may change
ACTIONS = """
(text) => {
  const page = new DOMParser().parseFromString(text, "text/html");
  return [
    [...page.querySelectorAll("form[method=post]")].map((each) => each.getAttribute("action")),
    page.querySelectorAll("main [hx-post], main [hx-delete]").length,
    page.querySelector("#rights").textContent,
  ];
}
"""
SMALL_TARGETS = """
() => [...document.querySelectorAll("button, summary, input, select, nav a, a.button, a.clear")]
  .map((each) => [each, each.getBoundingClientRect()])
  .filter(([each, {width, height}]) => width > 1 && height > 1 && (width < 24 || height < 24))
  .map(([each]) => each.outerHTML.slice(0, 120))
"""
NEEDS_HOVER = """
() => [...document.querySelectorAll("main [title]:not(time)")]
  .map((each) => each.outerHTML.slice(0, 120))
"""
CUT_OFF_AND_WIDTH = """
() => [
  [...document.querySelectorAll(".scroll")]
    .filter((each) => each.scrollWidth > each.clientWidth + 1)
    .map((each) => each.outerHTML.slice(0, 120)),
  document.documentElement.scrollWidth,
]
"""
TOO_WIDE = """
() => [...document.querySelectorAll("body *")]
  .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
  .filter((each) => !each.closest(".sr, .skip, pre, .small-scroll"))
  .map((each) => each.outerHTML.slice(0, 120))
"""


async def settled(live: LiveTracker) -> str:
    """The id of a settled run."""
    run_id = await start(live)
    while True:
        record = await read.get_run(live.services.database, run_id)
        if record is not None and record.tracking is Tracking.SETTLED:
            return run_id
        await live.services.signals.wait_due(0.1)


async def _pages(live: LiveTracker, page: Page) -> list[str]:
    """Every page of the navigation, and one of each kind behind them."""
    run_id = await settled(live)
    await keep_batch(live, "bat_axe", rows=14)
    deliveries, _ = await list_deliveries(live.services.database, run_id=run_id)
    if await get_message(live.services.database, "msg_1") is None:
        await add_endpoint(live.services.database, "shop")
        await add_message(live.services.database, "msg_1", "shop", None, 500)
        await add_endpoint(live.services.database, "store", url="python:shop.store_image")
        await add_message(live.services.database, "msg_2", "store", None)
    links = "[...document.querySelectorAll('.top nav a')].map((each) => each.pathname)"
    paths = [
        *await page.evaluate(links),
        f"/runs/{run_id}",
        f"/deliveries/{deliveries[0].delivery_id}",
        "/messages",
        "/techniques/tech_icon-pack",
        "/batches/bat_axe",
        "/batches/bat_axe/retry",
        "/runs?text=SKU-0003&sort=cost",
        "/runs/run_bat_axe_1",
        "/runs?state=lost",
        "/endpoints/shop",
        "/endpoints/store",
        "/messages",
        "/messages/msg_1",
        "/messages/msg_2",
        "/nothing/here",
    ]
    return list(dict.fromkeys(paths))


@pytest.mark.timeout(180)  # many pages, each four times
async def test_every_page_is_accessible(
    live: LiveTracker, open_page: OpenPage, thorough: bool
) -> None:
    """axe finds nothing on a page, light and narrow, dark and wide, and where it is thorough the
    other way round too; no page is wider than its screen, no target is smaller than 24 px, and
    nothing but a time needs hover."""
    if not AXE.is_file():
        if os.environ.get("TRACKER_REQUIRE_BROWSER"):
            pytest.fail("axe-core is not installed: `make install` does it where npm is")
        pytest.skip("axe-core is not installed: `make install` does it where npm is")
    watched = await open_page(color_scheme="light", reduced_motion="reduce")
    page = watched.page
    await page.add_init_script(path=AXE)
    await page.goto(f"{live.url}/login")
    await _assert_accessible(page, "/login", thorough)
    await sign_in(page, live.url)
    for path in share_of(await _pages(live, page), of=6, thorough=thorough):
        await page.goto(f"{live.url}{path}")
        await page.wait_for_load_state("load")
        await _assert_accessible(page, path, thorough)
    assert (watched.dialogs, watched.refused) == ([], [])


@pytest.mark.parametrize(
    ("status", "state"),
    [pytest.param(None, "connecting", marks=pytest.mark.thorough), (503, "offline")],
)
async def test_a_phone_has_room_for_the_state_of_the_stream(
    live: LiveTracker, open_page: OpenPage, status: int | None, state: str
) -> None:
    """While it connects, and while it cannot, with everything else that the bar shows."""

    async def answer(route: Route) -> None:
        if status is not None:
            await route.fulfill(status=status)

    page = (await open_page()).page
    await sign_in(page, live.url)
    await page.route("**/api/stream*", answer)
    await page.goto(f"{live.url}/runs", wait_until="domcontentloaded")
    await expect(page.locator("#live-state")).to_have_text(state)
    await _assert_narrow(page, state, widths=(320, 360))


async def test_a_reading_token_sees_every_page_and_is_offered_no_action(
    live: LiveTracker, open_page: OpenPage, thorough: bool
) -> None:
    """A token with the scope `read` signs in and sees runs, outputs and costs. Each page
    says what it may do, and sends nothing but the sign-out."""
    await quarantine(live, "whd_seen_by_a_reader", "run_1", "made up")
    batch = await _batch(live)
    watched = await open_page()
    page = watched.page
    await page.goto(f"{live.url}/login")
    await expect(page.locator("#hint")).to_contain_text("scope read is enough")
    await sign_in(page, live.url, READER)
    paths = [*await _pages(live, page), f"/batches/{batch}", "/deliveries/whd_seen_by_a_reader"]
    assert "/audit" not in paths
    for path in share_of(paths, of=3, thorough=thorough):
        answer = await page.request.get(f"{live.url}{path}", headers={"Accept": "text/html"})
        senders, requests, rights = await page.evaluate(ACTIONS, await answer.text())
        assert senders == ["/logout"], path
        assert requests == 0, path
        assert "start or change nothing" in rights, path
    await page.goto(f"{live.url}/runs/{await settled(live)}")
    await expect(page.locator(".gallery img").first).to_be_visible()
    await _assert_narrow(page, "a reader's page")
    assert (watched.dialogs, watched.refused) == ([], [])


async def _batch(live: LiveTracker) -> str:
    """The id of a batch of one row."""
    batches = live.services.batches
    plan, _ = await batches.plan("icon-pack", read_csv(b"prompt\ngarden tools\n"), name="one.csv")
    await batches.run(plan, concurrency=1, wait=True, on_progress=lambda _: None)
    return plan.batch.batch_id


async def _assert_accessible(page: Page, path: str, thorough: bool) -> None:
    assert await page.evaluate(NEEDS_HOVER) == [], path
    for width in (320, 360, 1000, 1280):
        await _assert_fits(page, path, width)
        if width in (320, 1000):
            continue
        assert await page.evaluate(SMALL_TARGETS) == [], (path, width)
        for scheme, rules in (("light", ALL_RULES), ("dark", CONTRAST)):
            if not thorough and (scheme == "dark") != (width == 1280):
                continue
            await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            assert await page.evaluate(VIOLATIONS, rules) == [], (path, width, scheme)


async def _assert_narrow(
    page: Page, path: str, *, widths: tuple[int, ...] = (320, 360, 800, 1000)
) -> None:
    for width in (*widths, 1280):
        await _assert_fits(page, path, width)


async def _assert_fits(page: Page, path: str, width: int) -> None:
    await resize(page, width, 740)
    cut_off, taken = await page.evaluate(CUT_OFF_AND_WIDTH)
    assert cut_off == [], (path, width)
    assert taken <= width, (path, await page.evaluate(TOO_WIDE))


async def test_hostile_text_runs_nothing(
    hostile_url: str, open_page: OpenPage, thorough: bool
) -> None:
    """No script, dialog, error or violation of the content policy, and the page fits the screen.
    The text of all pages: tests/web/dashboard/test_escaping.py."""
    widths = (320, 360, 800, 1000) if thorough else (320,)
    watched = await open_page()
    page = watched.page
    for path in share_of(HOSTILE, of=5, thorough=thorough):
        await page.goto(f"{hostile_url}{path}")
        await page.wait_for_load_state("load")
        await expect(page.locator("main")).to_be_visible()
        assert await page.locator("main script, main iframe, main [onerror]").count() == 0
        links = await page.evaluate(
            "[...document.querySelectorAll('main a[href]')].map((each) => each.protocol)"
        )
        assert set(links) <= {"http:", "https:"}, path
        await _assert_narrow(page, path, widths=widths)
    # What is inserted later is text, too.
    await page.goto(f"{hostile_url}/runs")
    await page.get_by_label("Search").fill(EVIL)
    await page.wait_for_url("**/runs?text=*")
    await page.goto(f"{hostile_url}/runs/{quote(RUN_ID, safe='')}")
    for summary in await page.locator(".timeline summary").all():
        await summary.click()
    watched.assert_quiet()


async def test_an_image_that_does_not_load_is_explained(
    hostile_url: str, open_page: OpenPage
) -> None:
    """An image whose link has expired is explained, with the link still there."""
    watched = await open_page()
    page = watched.page
    await page.goto(f"{hostile_url}/runs/{quote(RUN_ID, safe='')}")
    broken = page.locator("figure.image").first
    await broken.scroll_into_view_if_needed()
    await expect(broken.locator(".gone")).to_contain_text("does not load")
    await expect(broken.locator("figcaption a")).to_be_visible()


async def test_the_chart_is_drawn_and_shown_as_a_table(
    live: LiveTracker, open_page: OpenPage
) -> None:
    """Bars, and the same numbers as a table."""
    await settled(live)
    watched = await open_page()
    page = watched.page
    await sign_in(page, live.url)
    await expect(page.locator(".chart canvas")).to_be_visible()
    await page.get_by_text("Show as table").click()
    hours = page.get_by_role("group", name="Finished runs per hour as a table")
    await expect(hours.locator("tbody tr").first).to_be_visible()
    second = await settled(live)
    await expect(hours).to_be_visible()  # it stays open when the page is kept up to date
    assert second
    watched.assert_quiet()
