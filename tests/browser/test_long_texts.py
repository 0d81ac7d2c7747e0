"""Long texts, right-to-left ones, and statuses of a newer FLORA: nothing is cut or mixed up."""

from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from typing import Final
from urllib.parse import quote

import pytest
import pytest_asyncio
from playwright.async_api import expect

from tests.browser.conftest import OpenPage, resize
from tests.support.databases import sqlite_url_of
from tests.support.shares import share_of
from tests.web.dashboard.hostile import attack
from tests.web.serving import serving
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import Output, RunStatus
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.web.app import build_app

pytestmark = pytest.mark.asyncio(loop_scope="session")

HEBREW: Final = "מחולל תמונות מוצר"
LONG: Final = f"{HEBREW} {'without_any_space_' * 8} a sentence that goes on"
STATUS: Final = "paused_by_the_moderation_of_next_year"
PATHS: Final = (
    "/",
    "/runs",
    "/runs?state=other",
    "/batches",
    f"/batches/{quote(f'batch_{LONG}', safe='')}",
    "/deliveries",
    "/techniques",
    "/endpoints",
    "/messages",
    "/starts",
    "/audit",
    "/health",
    f"/runs/{quote(f'run_{LONG}', safe='')}",
)
CUT: Final = """
() => [...document.querySelectorAll("main *")]
  .filter((each) => each.clientWidth > 1 && each.scrollWidth > each.clientWidth + 1)
  .filter((each) => ["hidden", "clip"].includes(getComputedStyle(each).overflowX))
  .filter((each) => getComputedStyle(each).textOverflow !== "ellipsis" && !each.closest(".sr"))
  .map((each) => each.outerHTML.slice(0, 160))
"""
BROKEN: Final = """
() => [...document.querySelectorAll("td.num, td time, td .pill")].flatMap((each) => {
  const found = [];
  const walker = document.createTreeWalker(each, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const {scrollWidth, clientWidth} = text.parentElement;
    if (scrollWidth > clientWidth && clientWidth) continue; // it ends in an ellipsis
    for (const word of text.data.matchAll(/\\S+/g)) {
      const range = document.createRange();
      range.setStart(text, word.index);
      range.setEnd(text, word.index + word[0].length);
      if (range.getClientRects().length > 1) found.push(word[0]);
    }
  }
  return found;
})
"""
"""Amounts, times and states of which a word is broken over two lines."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def long_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A tracker without a token in which every text is long and begins in Hebrew."""
    path = tmp_path_factory.mktemp("long") / "tracker.db"
    settings = Settings(tracker_database_url=sqlite_url_of(path))
    async with open_services(settings, background=True) as services:
        await attack(services, LONG)
        await _runs(services)
        async with serving(build_app(services)) as url:
            yield url


async def _runs(services: Services) -> None:
    """A run with a hundred outputs that is in conflict, and one with a status of its own."""
    now = utc_now()
    outputs = tuple(Output(f"o{n}", "imageUrl", f"https://cdn.example/{n}") for n in range(100))
    for run_id, status, source in (
        ("run_conflict", RunStatus.COMPLETED, Source.POLL),
        ("run_conflict", RunStatus.FAILED, Source.CALLBACK),
        ("run_unknown", STATUS, Source.POLL),
    ):
        ended = status == RunStatus.COMPLETED
        observation = Observation(
            run_id=run_id,
            source=source,
            at=now,
            status=status,
            progress=None if ended else 42.0,
            technique_id="tech_1",
            technique_name=LONG,
            created_at=now - timedelta(minutes=12),
            completed_at=now if ended else None,
            charged_cost=Decimal("1234.0125"),
            outputs=outputs if ended else None,
        )
        await services.writer.submit(Observed(observation=observation))


@pytest.mark.timeout(180)  # many pages, each at six widths
async def test_nothing_is_cut_and_no_amount_is_broken(
    long_url: str, open_page: OpenPage, thorough: bool
) -> None:
    """On a phone and at every width of a table; what has no room ends in an ellipsis."""
    watched = await open_page()
    page = watched.page
    widths = (320, 390, 961, 1100, 1240, 1440) if thorough else (320, 961, 1240)
    for path in share_of(PATHS, of=4, thorough=thorough):
        await page.goto(f"{long_url}{path}")
        for width in widths:
            await resize(page, width, 800)
            assert await page.evaluate(CUT) == [], (path, width)
            assert await page.evaluate(BROKEN) == [], (path, width)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width, path
    watched.assert_quiet()


async def test_a_right_to_left_name_leaves_the_time_beside_it(
    long_url: str, open_page: OpenPage
) -> None:
    """`5 min ago` follows a Hebrew name in one piece; without care its number would change to the
    other side of the name."""
    page = (await open_page(viewport={"width": 1440, "height": 900})).page
    await page.goto(long_url)
    hint = page.locator(".cards .hint").first
    await expect(hint).to_contain_text(HEBREW)
    # Short, so that all is on one line.
    short = "(each, text) => { each.firstChild.data = `${text} · ` }"
    await hint.evaluate(short, HEBREW)
    earlier = "(each) => { each.dateTime = new Date(Date.now() - 310_000).toISOString() }"
    await hint.locator("time").evaluate(earlier)
    await expect(hint.locator("time")).to_have_text("5 min ago")
    pieces = """() => [...document.querySelectorAll(".cards .hint")].slice(0, 1).map((hint) => {
      const name = document.createRange();
      name.selectNodeContents(hint.firstChild);
      const number = document.createRange();
      number.setStart(hint.querySelector("time").firstChild, 0);
      number.setEnd(hint.querySelector("time").firstChild, 1);
      return [name.getBoundingClientRect().right, number.getBoundingClientRect().left];
    })"""
    [[ends, begins]] = await page.evaluate(pieces)
    assert begins >= ends - 1


async def test_buttons_that_copy_are_shown_where_the_browser_can_copy(
    long_url: str, open_page: OpenPage
) -> None:
    """Not without a script, and not on a page by plain http from another machine."""
    path = f"/runs/{quote(f'run_{LONG}', safe='')}"
    page = (await open_page()).page
    await page.goto(f"{long_url}{path}")
    await expect(page.locator("button.copy").first).to_be_visible()
    plain = (await open_page(java_script_enabled=False)).page
    await plain.goto(f"{long_url}{path}")
    assert await plain.locator("button.copy").count() > 3
    assert await plain.locator("button.copy:visible").count() == 0
