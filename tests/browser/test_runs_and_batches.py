"""Runs and batches as a producer uses them: rows that lead on, the search, pictures, a phone."""

import re
from dataclasses import replace
from decimal import Decimal

import pytest
from playwright.async_api import expect

from tests.browser.conftest import LiveTracker, OpenPage, sign_in
from tests.browser.test_flows import start
from tests.browser.test_layout import PHONE
from tests.support.started import of_start
from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import Output, RunError, RunStatus
from tracker.store.queries import batches, starts
from tracker.store.queries import runs as read
from tracker.store.queries.batches import BatchEntry, BatchRow

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROWS = 100
FAILED = 11


async def pictures(live: LiveTracker) -> tuple[Output, ...]:
    """The outputs of a run that has settled."""
    run_id, found = await start(live), list[Output]()

    async def settled() -> bool:
        record = await read.get_run(live.services.database, run_id)
        found.extend((record and record.run.outputs) or ())
        return len(found) > 0

    await eventually(settled, timeout=30)
    return tuple(found)


async def keep_batch(live: LiveTracker, batch_id: str, *, rows: int = ROWS) -> None:
    """A finished batch, of which some rows failed and the others have pictures."""
    database, outputs = live.services.database, await pictures(live)
    workspace = live.flora.world.options.workspace_id
    batch = BatchRow(
        batch_id=batch_id,
        workspace_id=workspace,
        technique_id="tech_icon-pack",
        name=f"{batch_id}.csv",
        created_at=utc_now(),
        columns=["SKU", "client"],
    )
    entries = [
        BatchEntry(
            position=number,
            line=number + 1,
            digest=f"{batch_id.encode().hex()[:16]:0>16}{number:08x}",
            carried={"SKU": f"SKU-{number:04}", "client": "Studio North"},
        )
        for number in range(1, rows + 1)
    ]
    await batches.keep(database, batch, entries)
    seen = []
    for entry in entries:
        inputs = [{"id": "prompt", "type": "text", "value": f"a garden tool on white {entry.line}"}]
        await starts.reserve(
            database,
            starts.StartRow(
                workspace_id=workspace,
                idempotency_key=entry.key,
                technique_id=batch.technique_id,
                fingerprint="",
                inputs=inputs,
                created_at=utc_now(),
            ),
        )
        failed = entry.position <= FAILED
        observation = Observation(
            run_id=f"run_{batch_id}_{entry.position}",
            source=Source.POLL,
            at=utc_now(),
            status=RunStatus.FAILED if failed else RunStatus.COMPLETED,
            technique_id=batch.technique_id,
            created_at=utc_now(),
            completed_at=utc_now(),
            outputs=None if failed else outputs,
            error=RunError("model_timeout", "The model took too long.") if failed else None,
        )
        of = {"workspace_id": workspace, "idempotency_key": entry.key, "inputs": inputs}
        seen.append(of_start(Observed(observation=observation), **of))
    await live.services.writer.submit_all(seen)
    await batches.finish(database, batch, utc_now())


async def test_a_batch_of_a_hundred_rows_fits_a_phone(
    live: LiveTracker, open_page: OpenPage
) -> None:
    """A compact page with a picture and a name in each row; the filters are in the address, and the
    pictures that are out of sight are not loaded."""
    await keep_batch(live, "bat_phone")
    watched = await open_page(**PHONE)
    page = watched.page
    await sign_in(page, f"{live.url}/batches/bat_phone")
    assert await page.evaluate("document.documentElement.scrollHeight") < 6_000
    await expect(page.locator(".summary .progress")).to_have_text(f"finished, {FAILED} failed")
    row = page.locator("#row-12")
    await row.scroll_into_view_if_needed()
    await page.wait_for_function("document.querySelector('#row-12 .thumb img').naturalWidth > 0")
    box = await row.locator(".thumb").first.bounding_box()
    assert box is not None
    assert (box["width"], box["height"]) == (40, 40)
    loaded = "[...document.querySelectorAll('.thumb img')].filter((each) => each.complete).length"
    assert await page.evaluate(loaded) < ROWS
    await expect(row.get_by_role("link", name="SKU-0012")).to_be_visible()
    await page.get_by_role("link", name=f"Failed {FAILED}").tap()
    await expect(page).to_have_url(f"{live.url}/batches/bat_phone?show=failed")
    await expect(page.locator("tr[id^=row-]")).to_have_count(FAILED)
    await page.get_by_role("link", name=re.compile("model_timeout")).tap()
    await expect(page).to_have_url(re.compile("error=model_timeout"))
    await page.locator("#row-3").tap(position={"x": 8, "y": 8}, force=True)
    await expect(page).to_have_url(f"{live.url}/runs/run_bat_phone_3")
    await page.get_by_role("link", name="row 3 of bat_phone.csv").tap()
    await expect(page).to_have_url(f"{live.url}/batches/bat_phone#row-3")
    watched.assert_quiet()


async def test_a_row_of_the_list_is_a_link(live: LiveTracker, open_page: OpenPage) -> None:
    """A click anywhere in it leads to the run, the middle button opens a tab, Enter works from the
    keyboard, and links within the row keep their own way; "/" moves to the search."""
    run_id = await start(live)
    watched = await open_page()
    page = watched.page
    await sign_in(page, f"{live.url}/runs")
    row = page.locator(f'tr[data-run="{run_id}"]')
    async with page.context.expect_page() as opened:
        await row.locator("td").last.click(button="middle", force=True)
    tab = await opened.value
    await expect(tab).to_have_url(f"{live.url}/runs/{run_id}")
    await tab.close()
    await row.locator("td").last.click(position={"x": 4, "y": 4}, force=True)
    await expect(page).to_have_url(f"{live.url}/runs/{run_id}")
    await page.go_back()
    await row.get_by_role("link", name=run_id).focus()
    await page.keyboard.press("Enter")
    await expect(page).to_have_url(f"{live.url}/runs/{run_id}")
    await page.go_back()
    await row.get_by_role("link", name="Icon Pack").click()
    await expect(page).to_have_url(f"{live.url}/techniques/tech_icon-pack")
    await page.go_back()
    await expect(page.get_by_label("Search")).not_to_be_focused()
    await page.keyboard.press("/")
    await expect(page.get_by_label("Search")).to_be_focused()
    await page.keyboard.type("x/y")
    await expect(page.get_by_role("heading", name="No matching runs")).to_be_visible()
    await page.get_by_label("Search").fill("garden tools")
    await expect(row).to_be_visible()
    watched.assert_quiet()


async def test_a_picture_that_does_not_load_becomes_an_icon(
    live: LiveTracker, open_page: OpenPage
) -> None:
    """Quietly, and the row keeps its height; the run's page explains it. Live updates of both
    pages keep that."""
    seen = Observation(
        run_id="run_broken",
        source=Source.POLL,
        at=utc_now(),
        status=RunStatus.COMPLETED,
        created_at=utc_now(),
        outputs=(Output("a", "imageUrl", f"{live.flora.base_url}/no/such.png"),),
    )
    await live.services.writer.submit(Observed(observation=seen))
    watched = await open_page()
    page = watched.page
    await sign_in(page, f"{live.url}/runs?text=run_broken")
    thumb = page.locator('tr[data-run="run_broken"] .thumb')
    await expect(thumb).to_have_class(re.compile("broken"))
    billed = replace(seen, at=utc_now(), charged_cost=Decimal("0.25"))
    await live.services.writer.submit(Observed(observation=billed))
    await expect(page.locator('tr[data-run="run_broken"]')).to_contain_text("$0.25")
    await expect(thumb.locator("img")).to_be_hidden()
    await expect(thumb.locator("svg")).to_be_visible()
    box = await thumb.bounding_box()
    assert box is not None
    assert box["height"] == 40
    await page.goto(f"{live.url}/runs/run_broken")
    await expect(page.locator(".gone")).to_have_count(1)
    billed = replace(seen, at=utc_now(), charged_cost=Decimal("0.50"))
    await live.services.writer.submit(Observed(observation=billed))
    await expect(page.locator("main")).to_contain_text("$0.50")
    await expect(page.locator(".gone")).to_have_count(1)
