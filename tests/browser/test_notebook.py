"""A run as a notebook shows it, in Chromium."""

import os
import re
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from itertools import product

import pytest
from playwright.async_api import Page, expect

from tests.browser.conftest import LiveTracker, OpenPage
from tests.browser.test_pages import AXE, VIOLATIONS, settled
from tests.web.dashboard.hostile import EVIL, LINKS, TYPES
from tracker.core.clock import utc_now
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import Output, RunState
from tracker.library.batches import BatchFields
from tracker.library.run import RunFields, RunList

pytestmark = pytest.mark.asyncio(loop_scope="session")

NOW = utc_now()
RUN = replace(
    RunFields._of(Record(run=RunState(run_id="run_1"), source=Source.START, first_seen_at=NOW)),
    technique_name="Icon Pack",
    tags={"campaign": "spring"},
)
BATCH = BatchFields(
    batch_id="bat_1",
    name="icons.csv",
    workspace_id="ws_1",
    technique_id="tech_icon-pack",
    source=None,
    created_at=NOW,
    launching=True,
    stopped=None,
    rows=12,
    started=10,
    completed=8,
    failed=1,
    active=1,
    lost=0,
    refused=0,
    unresolved=0,
    in_doubt=1,
    cost=Decimal("2.5"),
    cost_final=False,
    quoted=Decimal(0),
)
STYLES = {
    "light": "background:#ffffff;color:#000000",
    "dark": "background:#111111;color:#e0e0e0",  # JupyterLab's
}


async def show(page: Page, theme: str, *cells: str) -> None:
    """The cells of a notebook in a theme."""
    await page.set_content(
        f"<!doctype html><html lang=en><title>Notebook</title><body style='{STYLES[theme]}'>"
        f"<main><h1>Notebook</h1>{'<hr>'.join(cells)}</main>"
    )


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.thorough)])
async def test_a_notebook_shows_a_run_with_its_outputs(
    theme: str, live: LiveTracker, open_page: OpenPage
) -> None:
    """State, cost, times, tags, an error with its advice, and outputs as pictures, players, text
    and links; axe finds nothing, and no run is wider than a phone."""
    file = live.flora.world.runs[await settled(live)].outputs[0].url
    types = {"imageUrl": file, "videoUrl": file, "audioUrl": file, "text": "<b>Two\nlines</b>"}
    types |= {"documentUrl": "https://example.com/paper.pdf"}
    done = replace(
        RUN,
        status="completed",
        tracking="settled",
        completed_at=RUN.created_at + timedelta(seconds=42),
        charged_cost=Decimal("0.25"),
        outputs=tuple(Output(kind, kind, url) for kind, url in types.items()),
    )
    failed = replace(
        done,
        status="failed",
        charged_cost=None,
        cost_final=True,
        error_code="generation_prompt_moderated",
        error_message="The prompt was refused.",
        retry_advice="change_input",
        outputs=(),
    )
    lost, running = replace(RUN, tracking="lost"), replace(RUN, status="running", progress=40.0)
    runs = (done, failed, lost, running, replace(RUN, quoted_cost=Decimal(1)))
    watched = await open_page(viewport={"width": 390, "height": 800})
    page = watched.page
    shown = (*runs, BATCH, RunList([*runs] * 30))
    await show(page, theme, *(one._repr_html_() for one in shown))
    card = page.locator("main > div").first
    for text in ("Icon Pack", "completed", "run_1", "$0.25 (not final)", "42 s", "spring"):
        await expect(card).to_contain_text(text)
    await expect(card.get_by_role("group", name="Text")).to_have_text("<b>Two\nlines</b>")
    assert await card.locator("video[controls], audio[controls]").count() == 2
    picture = card.get_by_role("img", name="Image")
    await picture.scroll_into_view_if_needed()
    await expect(picture).to_have_js_property("complete", True)
    assert await picture.evaluate("image => image.naturalWidth") > 0
    for number, text in enumerate(
        ("change it", "not found at FLORA", "running, 40 %", "quoted"), 1
    ):
        await expect(page.locator("main > div").nth(number)).to_contain_text(text)
    for text in ("icons.csv", "in progress", "Completed", "$2.50 (not final)", "In doubt"):
        await expect(page.locator("main > div").nth(5)).to_contain_text(text)
    await expect(page.locator("main > div").last).to_contain_text("and 50 more runs")
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390
    if folder := os.environ.get("TRACKER_TEST_SCREENSHOTS"):
        await page.screenshot(path=f"{folder}/notebook-{theme}.png", full_page=True)
    if AXE.is_file():
        await page.evaluate(AXE.read_text())
        assert await page.evaluate(VIOLATIONS, {}) == []
    watched.assert_quiet()


async def test_plain_http_is_loaded_from_this_machine_alone() -> None:
    """Another address may be that of a device in the reader's network: it is a link."""
    hosts = ("127.0.0.1:8000", "localhost", "192.0.2.1", "printer.example", "user@localhost")
    links = [f"http://{host}/a.png" for host in hosts]
    kinds = ("imageUrl", "videoUrl", "audioUrl", "documentUrl")
    shown = replace(RUN, outputs=tuple(Output("o", *one) for one in product(kinds, links)))
    html = shown._repr_html_()
    assert set(re.findall('src="([^"]*)"', html)) == {*links[:2]}
    assert set(re.findall('href="([^"]*)"', html)) == {*links[:4]}


async def test_no_text_turns_the_direction_of_another_in_a_notebook() -> None:
    """The characters that do so are shown as escapes, as on the pages."""
    turning = replace(RUN, technique_name="invoice\u202egnp.exe")
    for html in (turning._repr_html_(), RunList([turning])._repr_html_()):
        assert "invoice\\u202egnp.exe" in html
        assert "\u202e" not in html


async def test_hostile_texts_do_nothing_in_a_notebook(open_page: OpenPage) -> None:
    """Every text is shown as it is; only plain web addresses are links or loaded."""
    texts = ("run_id", "status", "technique_name", "error_code", "error_message")
    evil = replace(
        RUN,
        **dict.fromkeys(texts, EVIL),
        tags={EVIL: EVIL},
        outputs=tuple(Output(EVIL, kind, link) for kind, link in product(TYPES, LINKS)),
    )
    evil_batch = replace(BATCH, batch_id=EVIL, name=EVIL, technique_id=EVIL, stopped=EVIL)
    long = replace(RUN, outputs=(Output("text", "text", 5000 * "a"),))
    watched = await open_page()
    page = watched.page
    await show(
        page,
        "light",
        evil._repr_html_(),
        RunList([evil])._repr_html_(),
        evil_batch._repr_html_(),
        long._repr_html_(),
    )
    await expect(page.get_by_text("1,000 more characters")).to_be_visible()
    addresses = await page.evaluate(
        "[...document.querySelectorAll('[href], [src]')].map(e => e.href || e.src)"
    )
    assert {address.split(":")[0] for address in addresses} <= {"http", "https"}
    assert await page.locator("script, [onerror], h1 ~ * title").count() == 0
    watched.assert_quiet()
