"""The site is built without a warning, and a reader's browser fetches nothing from elsewhere."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

import tracker
import tracker.errors
from tests.browser.conftest import CHROMIUM, FLAGS
from tests.docs.pages import PAGES, ROOT
from tests.support.sharing import made_once

# The build takes longer than all other tests of the documentation.
pytestmark = pytest.mark.thorough

LOADS = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}
"""The elements that make a browser fetch something, and the attribute that says what."""


class Fetched(HTMLParser):
    """Collects what a page makes a browser fetch, and its headings' ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one element."""
        given = {name: value or "" for name, value in attrs}
        self.addresses += [given[name] for name in [LOADS.get(tag)] if name and name in given]
        self.ids.add(given.get("id", ""))
        self.classes |= set(given.get("class", "").split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as the configuration says: strictly."""
    return made_once(tmp_path_factory, "site", _build)


def _build(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        # The theme's own news would look like a warning of the build.
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or "WARNING" in done.stderr:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_the_site_is_built_strictly(site: Path) -> None:
    """Every page is there, and every link within the documentation leads to something."""
    made = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {f"{page.stem}.html" for page in PAGES} <= made
    assert {"readme.html", "contributing.html", "security.html", "changelog.html"} <= made
    assert {"files/compose.yaml.html", "files/deploy/cron/tracker.html"} <= made


def test_nothing_is_fetched_from_outside(site: Path) -> None:
    """No page and no style names a script, style, font or picture of another host."""
    for path in site.rglob("*.html"):
        page = Fetched(path.read_text(encoding="utf-8"))
        assert page.addresses
        away = [one for one in page.addresses if re.match(r"(?:[a-z]+:)?//", one)]
        assert away == [], path.name
        # What the theme's own script would fetch if a page had one.
        assert not {"mermaid", "md-source"} & page.classes, path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import", path.read_text()), path.name


@pytest.mark.thorough
def test_the_search_finds_it(served: Page) -> None:
    """What someone with a sheet or an application types leads first to the guide about it."""
    field = served.locator("input[name=query]")
    first = served.locator(".md-search-result__item").first
    for words, found, leads_to in (
        ("excel", "From Excel to files", "excel"),
        ("semicolon", "The sheet", "excel"),
        ("xlsx", "From Excel to files", "excel"),
        ("notebook", "Notebooks", "python"),
        ("django", "examples/django_app.py", "files/examples/django_app.py"),
        ("fastapi", "examples/fastapi_app.py", "files/examples/fastapi_app.py"),
    ):
        for _ in range(5):  # until the theme's scripts are there
            field.fill("")
            field.press_sequentially(words)  # it searches as keys are released
            with contextlib.suppress(AssertionError):
                expect(first).to_contain_text(found, timeout=10_000)
                break
        link = re.compile(rf"/{leads_to}\.html")
        expect(first.locator("a").first).to_have_attribute("href", link)


@pytest.fixture
def served(site: Path) -> Iterator[Page]:
    """The first page of the site in Chromium: its search needs a server."""
    if CHROMIUM is None:
        if os.environ.get("TRACKER_REQUIRE_BROWSER"):
            pytest.fail("Chromium is not installed, and TRACKER_REQUIRE_BROWSER is set")
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.locator("label[for=__search]").first.wait_for(state="attached")
        yield page
        browser.close()
        server.shutdown()


def test_each_alert_has_its_section_in_the_site(site: Path) -> None:
    """The runbook's addresses that the alert rules name are headings of the built page."""
    rules = (ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"runbook_url: https://\S+/runbook.html#(\w+)", rules))
    page = Fetched((site / "runbook.html").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert named <= page.ids


def test_the_command_page_shows_every_help(site: Path) -> None:
    """The page ends with what each command's `--help` says."""
    text = (site / "cli.html").read_text(encoding="utf-8")
    page = Fetched(text)
    assert {"tracker-serve", "tracker-runs-start", "tracker-db-prune"} <= page.ids
    assert "Usage: tracker serve [OPTIONS]" in text


def test_the_reference_has_every_public_name(site: Path) -> None:
    """Each public class, function, method and error has its section, made from its docstring."""
    wanted = {f"tracker.{name}" for name in tracker.__all__ if name not in ("errors", "sync")}
    for value in (tracker.Tracker, tracker.Run, tracker.Batch):
        names = [name for name in dir(value) if not name.startswith("_")]
        wanted |= {f"tracker.{value.__name__}.{name}" for name in names}
    wanted |= {f"tracker.errors.{name}" for name in tracker.errors.__all__}
    assert wanted <= set(Fetched((site / "python-reference.html").read_text(encoding="utf-8")).ids)
