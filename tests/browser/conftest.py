"""Fixtures: Chromium, a tracker with a local FLORA, and a tracker full of hostile text.

All are made once for each process and share one event loop; each test has its own browser context.
Without Chromium the tests are skipped, or fail where TRACKER_REQUIRE_BROWSER is set.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import (
    Browser,
    BrowserContext,
    Page,
    async_playwright,
    expect,
)
from pydantic import SecretStr

from tests.support.databases import sqlite_url_of
from tests.support.waiting import NO_SWEEPS
from tests.web.dashboard.hostile import attack
from tests.web.serving import serving
from tracker.services import Services, open_services
from tracker.settings import Settings, TokenSettings
from tracker.settings.tokens import Scope
from tracker.simulator import Options, Simulator, running
from tracker.web.app import build_app
from tracker.worker import Worker

TOKEN: Final = "a-token-of-the-tests"
READER: Final = "a-token-that-only-reads"
# Milliseconds: other tests may keep the machine busy.
expect.set_options(timeout=30_000)
# The shell that has no window takes half of the processor time.
CHROMIUM: Final = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser"))),
    None,
)
FLAGS: Final = [
    "--no-sandbox",
    "--disable-gpu",
    # Pages that live for a second do not repay the compilation of their scripts.
    "--js-flags=--no-maglev,--no-opt",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No other host name resolves, and what is not for this machine ends at a proxy that is not
    # there. (Routes through the test would do so too, but switch the browser's cache off.)
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=<-loopback>;127.0.0.1;localhost",
]


@dataclass(slots=True)
class Watched:
    """A page, and its forbidden actions: dialogs, errors, and violations of its policy."""

    page: Page
    dialogs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Record them from now on."""

        async def dismiss(dialog: Any) -> None:
            self.dialogs.append(dialog.message)
            await dialog.dismiss()

        def console(message: Any) -> None:
            if "Content Security Policy" in message.text:
                self.refused.append(message.text)
            elif message.type == "error" and "net::ERR_" not in message.text:
                self.errors.append(message.text)

        self.page.on("dialog", dismiss)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", console)

    def assert_quiet(self) -> None:
        """Fail where there was any."""
        assert (self.dialogs, self.errors, self.refused) == ([], [], [])


@dataclass(frozen=True, slots=True)
class LiveTracker:
    """A served tracker, its services, and its local FLORA."""

    url: str
    services: Services
    flora: Simulator


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[Browser]:
    """The browser."""
    if CHROMIUM is None:
        if os.environ.get("TRACKER_REQUIRE_BROWSER"):
            pytest.fail("Chromium is not installed, and TRACKER_REQUIRE_BROWSER is set")
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveTracker]:
    """A tracker with a token and a worker, whose runs take a second and a half."""
    path = tmp_path_factory.mktemp("live") / "tracker.db"
    options = Options(seed=4, run_seconds=1.5, failures=0)
    async with running(options) as flora, _served(path, flora) as live:
        yield live


@asynccontextmanager
async def _served(path: Path, flora: Simulator) -> AsyncIterator[LiveTracker]:
    options = flora.world.options
    port = _free_port()
    settings = Settings(
        tracker_database_url=sqlite_url_of(path),
        tracker_public_url=f"http://127.0.0.1:{port}",
        tracker_api_token=SecretStr(TOKEN),
        tokens=(TokenSettings(name="producer", token=SecretStr(READER), scopes={Scope.READ}),),
        flora_api_key=SecretStr(options.api_key),
        flora_webhook_secret=options.webhook_secret,
        flora_base_url=flora.base_url,
        flora_workspace_id=options.workspace_id,
        tracker_budget_day=Decimal(25),
        tracker_reconcile_cron=NO_SWEEPS,
    )
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(open_services(settings, background=True))
        url = await stack.enter_async_context(serving(build_app(services), port))
        worker = Worker(services)
        await worker.start()
        stack.push_async_callback(worker.stop)
        yield LiveTracker(url, services, flora)


def _free_port() -> int:
    from tests.support.waiting import free_port

    return free_port()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def hostile_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A tracker without a token in which every text is an attack."""
    path = tmp_path_factory.mktemp("hostile") / "tracker.db"
    settings = Settings(tracker_database_url=sqlite_url_of(path))
    async with open_services(settings, background=True) as services:
        await attack(services)
        async with serving(build_app(services)) as url:
            yield url


OpenPage = Callable[..., Awaitable[Watched]]


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(chromium: Browser) -> AsyncIterator[OpenPage]:
    """Opens a page in its own context; it can reach only this machine."""
    contexts: list[BrowserContext] = []

    async def open_page(**options: Any) -> Watched:
        context = await chromium.new_context(**{"locale": "en-GB", **options})
        context.set_default_timeout(30_000)
        contexts.append(context)
        watched = Watched(await context.new_page())
        watched.listen()
        return watched

    yield open_page
    await asyncio.gather(*(context.close() for context in contexts))


async def resize(page: Page, width: int, height: int) -> None:
    """Change the size of the window. The page's script hears of that in the next frame, and draws
    the charts anew."""
    await page.set_viewport_size({"width": width, "height": height})
    frames = "requestAnimationFrame(() => requestAnimationFrame(done))"
    await page.evaluate(f"() => new Promise((done) => {frames})")


async def sign_in(page: Page, url: str, token: str = TOKEN) -> None:
    """Give the page's context a session of its own, and wait for the page and its scripts."""
    login = urlsplit(url)._replace(path="/login", query="").geturl()
    answer = await page.context.request.post(login, form={"token": token}, max_redirects=0)
    assert answer.status == 303
    await page.goto(url)
    await page.wait_for_selector("#live")
    await page.wait_for_load_state("load")  # its scripts are loaded
