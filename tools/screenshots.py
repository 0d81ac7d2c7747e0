"""Takes screenshots of every page, light and dark, into docs/screenshots: `make screenshots`.

Serves a local FLORA and a tracker, stores a made-up day of runs, runs some more, and opens the
pages in Chromium. Needs Chromium (Debian's package `chromium`) and the tools of `make install`.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from playwright.async_api import Browser, Page, async_playwright
from pydantic import SecretStr

from tools.history import store_a_day
from tracker.core.clock import utc_now
from tracker.core.run import Tracking
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.simulator import Options, running
from tracker.simulator.catalogue import load_catalogue
from tracker.starting.sheet import read_csv
from tracker.starting.start import StartRequest
from tracker.store.queries import runs as read
from tracker.web.app import build_app
from tracker.web.http.server import Server, listen
from tracker.worker import Worker

TARGET: Final = Path(__file__).parents[1] / "docs" / "screenshots"
CHROMIUM: Final = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TOKEN: Final = "only-for-screenshots"  # noqa: S105 - it opens a tracker that lives for a minute
ENDED: Final = ("icon-pack", "moodboard-maker", "location-scouter", "podcast-intro", "cctv-cam")
"""Techniques that are run to their end, for their outputs."""
OPEN: Final = ("fit-checks", "logo-stylist", "character-lock", "glam-shots", "earth-zoom-out")
"""Techniques that are still running when the screenshots are taken."""

ARE_DECODED = """() =>
    Promise.all([...document.images].map((each) => each.decode())).then(() => true, () => false)"""
"""Whether all pictures are there; a live update may have replaced some meanwhile."""
IS_LIVE: Final = """
() => ["slow", undefined].includes(document.getElementById("live")?.dataset.live)
  || document.getElementById("live-state").dataset.state === "on"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One screenshot: its name, the page, and the size of the screen."""

    name: str
    path: str
    width: int = 1280
    height: int = 860
    whole: bool = True
    """Whether the whole page is shown, or only the first screen of a long list."""


async def main() -> None:
    """Take them all."""
    TARGET.mkdir(parents=True, exist_ok=True)
    async with _served() as (address, services), async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        shots = await _shots(services)
        for scheme in ("light", "dark"):
            await _take(browser, address, shots, scheme)
        await browser.close()


async def _shots(services: Services) -> list[Shot]:
    batch = await _run_a_batch(services)
    shown = await _run_some(services)
    return [
        Shot(name="overview", path="/"),
        Shot(name="runs", path="/runs", whole=False),
        Shot(name="run", path=f"/runs/{shown}"),
        Shot(name="deliveries", path="/deliveries?outcome=quarantined"),
        Shot(name="delivery", path="/deliveries/whd_9b1e"),
        Shot(name="techniques", path="/techniques", whole=False),
        Shot(name="technique", path="/techniques/tech_icon-pack"),
        Shot(name="batches", path="/batches"),
        Shot(name="batch", path=f"/batches/{batch}"),
        Shot(name="spending", path="/spending"),
        Shot(name="health", path="/health", whole=False),
        Shot(name="phone-overview", path="/", width=390, height=844, whole=False),
        Shot(name="phone-runs", path="/runs", width=390, height=844, whole=False),
    ]


async def _run_some(services: Services) -> str:
    """Start runs and wait for some; the id of one with typical outputs."""
    ended = [await _start(services, slug) for slug in ENDED if f"tech_{slug}" in load_catalogue()]
    for run_id in ended:
        while True:
            record = await read.get_run(services.database, run_id)
            if record is not None and record.tracking is Tracking.SETTLED:
                break
            await asyncio.sleep(0.2)
    for slug in OPEN:
        await _start(services, slug)
    return ended[1]


async def _run_a_batch(services: Services) -> str:
    """Run a batch of icons to its end; its id."""
    rows = ("prompt", "garden tools", "kitchen", "camping", "music", "weather", "chess", "trains")
    plan, _ = await services.batches.plan(
        "icon-pack", read_csv("\n".join(rows).encode()), name="autumn-icons.csv"
    )
    await services.batches.run(plan, concurrency=2, wait=True, on_progress=lambda _: None)
    return plan.batch.batch_id


async def _start(services: Services, slug: str) -> str:
    technique = load_catalogue()[f"tech_{slug}"]
    started = await services.starter.start(
        StartRequest(
            technique=slug,
            inputs=technique.sample_inputs(),
            workspace_id=None,
            idempotency_key=None,
        )
    )
    return started.record.run.run_id


async def _take(browser: Browser, address: str, shots: list[Shot], scheme: str) -> None:
    for phone in (False, True):
        wanted = [shot for shot in shots if (shot.width < 600) is phone]
        context = await browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light",
            locale="en-GB",
            timezone_id="Europe/Amsterdam",
            viewport={"width": wanted[0].width, "height": wanted[0].height},
        )
        page = await context.new_page()
        await _sign_in(page, address, scheme if not phone else None)
        for shot in wanted:
            await page.goto(f"{address}{shot.path}")
            await page.wait_for_function(IS_LIVE)
            await page.wait_for_function(ARE_DECODED)
            await page.wait_for_load_state("load")
            await page.screenshot(
                path=TARGET / f"{shot.name}-{scheme}.png",
                full_page=shot.whole,
                animations="disabled",
            )
        await context.close()


async def _sign_in(page: Page, address: str, scheme: str | None) -> None:
    await page.goto(f"{address}/login")
    if scheme:
        await page.screenshot(path=TARGET / f"sign-in-{scheme}.png")
    await page.fill("#token", TOKEN)
    await page.click("button[type=submit]:has-text('Sign in')")
    await page.wait_for_selector("#live")


@asynccontextmanager
async def _served() -> AsyncIterator[tuple[str, Services]]:
    """A local FLORA, and a tracker with a worker on a temporary file."""
    options = Options(seed=12, run_seconds=5, failures=0.0, drop=0.2)
    with TemporaryDirectory(prefix="tracker-screenshots-") as folder:
        async with running(options) as simulator:
            with listen("127.0.0.1", 0, local_only=True) as sockets:
                address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
                settings = Settings(
                    flora_api_key=SecretStr(options.api_key),
                    flora_workspace_id=options.workspace_id,
                    flora_base_url=simulator.base_url,
                    flora_webhook_secret=(SecretStr(options.webhook_secret),),
                    tracker_database_url=f"sqlite:///{Path(folder) / 'tracker.db'}",
                    tracker_public_url=address,
                    tracker_api_token=(SecretStr(TOKEN),),
                    tracker_callback_grace=8,
                    tracker_poll_interval=2,
                )
                async with open_services(settings, background=True) as services:
                    await store_a_day(services, now=utc_now(), seed=7)
                    ready = asyncio.Event()
                    server = Server(build_app(services), on_ready=ready.set)
                    serving = asyncio.create_task(server.serve(sockets=sockets))
                    worker = Worker(services)
                    await ready.wait()
                    await worker.start()
                    try:
                        yield address, services
                    finally:
                        server.stop(force=True)
                        await serving
                        await worker.stop()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
