"""Everyday use: sign in, filter, follow a run, replay a callback, move around."""

import json
import re

import pytest
from playwright.async_api import expect

from tests.browser.conftest import TOKEN, LiveTracker, OpenPage, sign_in
from tests.support.deliveries import Delivered, keep
from tracker.core.clock import utc_now
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.starting.start import StartRequest
from tracker.store.queries.deliveries import get_delivery

pytestmark = pytest.mark.asyncio(loop_scope="session")

INPUT = [{"id": "prompt", "type": "text", "value": "garden tools"}]


async def start(live: LiveTracker, technique: str = "icon-pack") -> str:
    """Start a run and return its id."""
    request = StartRequest(
        technique=technique, inputs=INPUT, workspace_id=None, idempotency_key=None
    )
    started = await live.services.starter.start(request)
    return started.record.run.run_id


async def test_signing_in_and_out(live: LiveTracker, open_page: OpenPage) -> None:
    """The form refuses a wrong token, and the right one leads to the wanted page."""
    watched = await open_page()
    page = watched.page
    await page.goto(f"{live.url}/runs?state=failed")
    await expect(page.get_by_label("Token")).to_be_focused()
    await page.keyboard.type("wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("The token is wrong")
    await page.get_by_label("Token").fill(TOKEN)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page).to_have_url(f"{live.url}/runs?state=failed")
    await page.get_by_role("button", name="Sign out").click()
    await expect(page).to_have_url(f"{live.url}/login")
    await page.goto(f"{live.url}/runs")
    await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert (watched.dialogs, watched.refused) == ([], [])


async def test_signing_out_ends_a_copied_cookie(live: LiveTracker, open_page: OpenPage) -> None:
    """A copy of the cookie works in another browser until the first one signs out."""
    first, second = await open_page(), await open_page()
    await sign_in(first.page, live.url)
    await second.page.context.add_cookies(await first.page.context.cookies())
    await second.page.goto(f"{live.url}/runs")
    await expect(second.page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
    await second.page.goto("about:blank")  # a live page would leave for the sign-in by itself
    await first.page.get_by_role("button", name="Sign out").click()
    await expect(first.page).to_have_url(f"{live.url}/login")
    await second.page.goto(f"{live.url}/runs")
    await expect(second.page.get_by_role("heading", name="Sign in")).to_be_visible()
    answer = await second.page.request.get(f"{live.url}/api/runs")
    assert answer.status == 401
    first.assert_quiet()


async def test_a_run_page_is_updated_live(live: LiveTracker, open_page: OpenPage) -> None:
    """The page shows the end, the outputs and the cost without a reload."""
    watched = await open_page()
    page = watched.page
    await sign_in(page, live.url)
    run_id = await start(live)
    await page.goto(f"{live.url}/runs/{run_id}")
    await page.evaluate("window.untouched = true")
    await expect(page.locator("#live-state")).to_contain_text("live")
    await expect(page.locator(".summary .pill")).to_have_text("completed")
    await expect(page.locator(".gallery img")).to_have_count(4)
    await expect(page.locator(".summary")).to_contain_text("$0.25")
    await expect(page.locator(".gallery figcaption").first).to_contain_text("Icon 1")
    await expect(page.locator(".timeline")).to_contain_text("Callback received")
    sizes = "[...document.querySelectorAll('.gallery img')].map((each) => each.naturalWidth)"
    await page.locator(".gallery img").last.scroll_into_view_if_needed()
    await page.wait_for_function(f"{sizes}.every((width) => width > 0)")
    assert await page.evaluate("window.untouched") is True
    watched.assert_quiet()


async def test_the_list_is_filtered_and_stays_live(live: LiveTracker, open_page: OpenPage) -> None:
    """A filter changes the list and the address, and can be cleared then; new runs appear by
    themselves."""
    watched = await open_page()
    page = watched.page
    first = await start(live)
    await sign_in(page, f"{live.url}/runs")
    await expect(page.get_by_role("link", name=first)).to_be_visible()
    await page.evaluate("window.untouched = true")
    clear = page.get_by_role("link", name="Clear")
    await expect(clear).to_be_hidden()

    await page.get_by_label("Search").fill("no such run")
    await expect(clear).to_be_visible()
    await expect(page.get_by_role("heading", name="No matching runs")).to_be_visible()
    await expect(page).to_have_url(f"{live.url}/runs?text=no+such+run")
    await page.get_by_label("Search").fill("")
    await expect(clear).to_be_hidden()
    await page.get_by_label("Technique").select_option(label="Icon Pack")
    await expect(page.get_by_role("link", name=first)).to_be_visible()
    await expect(page).to_have_url(f"{live.url}/runs?technique=tech_icon-pack")

    second = await start(live)
    await expect(page.get_by_role("link", name=second)).to_be_visible()
    row = page.locator(f'tr[data-run="{second}"]')
    await expect(row.locator(".pill")).to_have_text("completed")
    await page.get_by_label("State").select_option(label="Not found at FLORA")
    await expect(page.get_by_role("heading", name="No matching runs")).to_be_visible()
    assert await page.evaluate("window.untouched") is True
    watched.assert_quiet()


async def test_times_are_in_the_viewers_zone(live: LiveTracker, open_page: OpenPage) -> None:
    """Date fields are in local time and sent in UTC; times are shown in local time, with UTC in the
    title."""
    watched = await open_page(timezone_id="Asia/Kolkata")
    page = watched.page
    await start(live)
    await sign_in(page, f"{live.url}/runs")
    await page.get_by_text("Custom range").click()
    await page.get_by_label("From").fill("2026-01-01T05:30")
    await page.get_by_label("From").blur()
    await page.wait_for_url("**/runs?from=2026-01-01T00%3A00%3A00Z")
    title = await page.locator("td time").first.get_attribute("title")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} UTC", title or "")
    await page.reload()
    await expect(page.get_by_label("From")).to_have_value("2026-01-01T05:30")
    await expect(page.locator("#zone")).to_have_text("Asia/Calcutta")
    watched.assert_quiet()


async def quarantine(live: LiveTracker, delivery_id: str, run_id: str, reason: str) -> None:
    body = {
        "id": delivery_id,
        "type": "run.completed",
        "data": {"run_id": run_id, "status": "completed"},
    }
    delivery = Delivery(
        delivery_id=delivery_id,
        received_at=utc_now(),
        body=json.dumps(body).encode(),
        run_id=run_id,
    )
    outcome = DeliveryOutcome.QUARANTINED
    await keep(live.services.database, Delivered(delivery=delivery, outcome=outcome, reason=reason))


async def _outcome(live: LiveTracker, delivery_id: str) -> DeliveryOutcome:
    row = await get_delivery(live.services.database, delivery_id)
    assert row is not None
    return row.outcome


async def test_a_quarantined_delivery_is_replayed(live: LiveTracker, open_page: OpenPage) -> None:
    """One click, and the page shows the result."""
    run_id = await start(live)
    await quarantine(live, "whd_kept", run_id, "an older version did not understand it")
    watched = await open_page()
    page = watched.page
    await sign_in(page, live.url)
    await page.get_by_role("link", name="Show callbacks").click()
    await page.get_by_role("link", name="whd_kept").click()
    await page.get_by_role("button", name="Replay").click()
    await expect(page.get_by_role("status").filter(has_text="Replayed")).to_contain_text(
        f"applied to run {run_id}"
    )
    await expect(page.get_by_role("button", name="Replay")).to_have_count(0)
    assert await _outcome(live, "whd_kept") is DeliveryOutcome.APPLIED
    watched.assert_quiet()


async def test_deliveries_are_selected_and_handled_together(
    live: LiveTracker, open_page: OpenPage
) -> None:
    """A selection survives a live update, and so does the result of an action; each action asks
    first, by cause or for a selection."""
    run_id = await start(live)
    for number in range(3):
        await quarantine(live, f"whd_bulk_{number}", run_id, "made up")
    watched = await open_page()
    page = watched.page
    await sign_in(page, f"{live.url}/deliveries?outcome=quarantined")
    await page.get_by_label("Select whd_bulk_0").check()
    await quarantine(live, "whd_bulk_3", run_id, "another cause")
    await start(live)  # its events update the page
    await expect(page.get_by_role("link", name="whd_bulk_3")).to_be_visible()
    await expect(page.get_by_label("Select whd_bulk_0")).to_be_checked()
    await page.get_by_text("Acknowledge selected…").click()
    await page.get_by_role("button", name="Acknowledge selected").click()
    await expect(page.get_by_text("1 delivery acknowledged.")).to_be_visible()
    await quarantine(live, "whd_bulk_4", run_id, "another cause")
    await start(live)
    await expect(page.get_by_role("link", name="whd_bulk_4")).to_be_visible()
    await expect(page.get_by_text("1 delivery acknowledged.")).to_be_visible()
    await expect(page.get_by_role("button", name="Acknowledge selected")).to_be_hidden()
    await expect(page.get_by_role("link", name="whd_bulk_0")).to_have_count(0)
    assert page.url == f"{live.url}/deliveries?outcome=quarantined"

    await page.get_by_role("link", name="Clear").click()
    problem = page.get_by_role("listitem").filter(has_text="made up")
    await problem.get_by_text("Replay…").click()
    await problem.get_by_role("button", name="Replay 2 callbacks").click()
    await expect(page.get_by_text("Replayed: 2 deliveries applied.")).to_be_visible()
    states = [await _outcome(live, f"whd_bulk_{number}") for number in range(4)]
    assert [state.value for state in states] == [
        *("quarantined", "applied", "applied", "quarantined")
    ]
    watched.assert_quiet()


async def test_check_now_asks_flora(live: LiveTracker, open_page: OpenPage) -> None:
    """The button polls the run and shows the result, and the message stays; if the run is already
    settled, it says so."""
    result = re.compile("FLORA reports|Final|Settled")
    watched = await open_page()
    page = watched.page
    await sign_in(page, live.url)
    run_id = await start(live)
    await page.goto(f"{live.url}/runs/{run_id}")
    await page.get_by_role("button", name="Check now").click()
    await expect(page.locator("#flash")).to_contain_text(result)
    await expect(page.locator(".summary .pill")).to_have_text("completed")
    await expect(page.locator("#flash")).to_contain_text(result)
    watched.assert_quiet()


async def test_a_session_that_ends_leads_to_the_sign_in(
    live: LiveTracker, open_page: OpenPage
) -> None:
    """A script's request then leads to the sign-in and back, not into the middle of the page."""
    watched = await open_page()
    page = watched.page
    await sign_in(page, f"{live.url}/runs")
    # This closes the event stream, so that only the request leads to the sign-in.
    await page.evaluate("dispatchEvent(new Event('pagehide'))")
    await page.context.clear_cookies()
    await page.get_by_label("State").select_option("lost")
    await page.wait_for_url("**/login?next=*")
    await page.get_by_label("Token").fill(TOKEN)
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/runs*")


async def test_the_theme_is_chosen_and_kept(live: LiveTracker, open_page: OpenPage) -> None:
    """The system's theme, until someone chooses another; then the choice, on the next page too."""
    watched = await open_page(color_scheme="light")
    page = watched.page
    await sign_in(page, live.url)
    back = "getComputedStyle(document.body).backgroundColor"
    light = await page.evaluate(back)
    await page.get_by_role("button", name="Switch to dark").click()
    dark = await page.evaluate(back)
    assert dark != light
    await page.goto(f"{live.url}/runs")
    assert await page.evaluate(back) == dark
    await page.get_by_role("button", name="Switch to light").click()
    assert await page.evaluate(back) == light
    await page.emulate_media(color_scheme="dark")
    await page.reload()
    assert await page.evaluate(back) == dark
    watched.assert_quiet()


async def test_everything_is_reached_by_keyboard(live: LiveTracker, open_page: OpenPage) -> None:
    """From the sign-in to the page of a run without a mouse, with a visible focus."""
    watched = await open_page()
    page = watched.page
    await start(live)
    await page.goto(f"{live.url}/login")
    await page.keyboard.type(TOKEN)
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#live")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    await page.keyboard.press("Enter")
    assert await page.evaluate("document.activeElement.id") == "main"

    async def tab_to(role: str, name: str | re.Pattern[str]) -> None:
        wanted = page.get_by_role(role, name=name).first  # type: ignore[arg-type]
        await wanted.wait_for()
        for _ in range(40):
            await page.keyboard.press("Tab")
            if await wanted.evaluate("(each) => each === document.activeElement"):
                seen = "getComputedStyle(document.activeElement).outlineStyle"
                assert await page.evaluate(seen) == "solid"
                return
        raise AssertionError(f"{name} is not reached by Tab")

    await page.goto(f"{live.url}/")
    await tab_to("link", "Runs")
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/runs")
    await tab_to("link", re.compile("^run_"))
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/runs/run_*")
    watched.assert_quiet()


async def test_the_focus_survives_live_updates(live: LiveTracker, open_page: OpenPage) -> None:
    """A list that is updated keeps the focus."""
    watched = await open_page()
    page = watched.page
    first = await start(live)
    await sign_in(page, f"{live.url}/runs")
    link = page.get_by_role("link", name=first)
    await link.focus()
    second = await start(live)
    await expect(page.get_by_role("link", name=second)).to_be_visible()
    await expect(link).to_be_focused()
    watched.assert_quiet()
