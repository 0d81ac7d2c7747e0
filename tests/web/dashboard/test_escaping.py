"""Other people's text stays text on every page."""

import re
from html.parser import HTMLParser
from urllib.parse import quote

import pytest

from tests.web.conftest import Site
from tests.web.dashboard.conftest import HTML
from tests.web.dashboard.hostile import (
    BATCH_ID,
    DELIVERY_ID,
    ENDPOINT_ID,
    EVIL,
    LINKS,
    MARK,
    MESSAGE_ID,
    RUN_ID,
    TECHNIQUE_ID,
    attack,
)
from tracker.core.run import Output
from tracker.views import plain_http_origin, presentation, web_link

PAGES = {
    "/": False,
    "/runs": True,
    f"/runs?text={quote(EVIL)}": True,
    f"/runs/{quote(RUN_ID, safe='')}": True,
    "/deliveries": True,
    f"/deliveries?run={quote(EVIL)}": True,
    f"/deliveries/{quote(DELIVERY_ID + '0', safe='')}": True,
    f"/deliveries/{quote(DELIVERY_ID + '1', safe='')}": True,
    "/techniques": True,
    f"/techniques?text={quote(EVIL)}": True,
    f"/techniques/{quote(TECHNIQUE_ID, safe='')}": True,
    "/health": True,
    "/endpoints": True,
    f"/endpoints/{quote(ENDPOINT_ID, safe='')}": True,
    "/messages": True,
    f"/messages/{quote(MESSAGE_ID, safe='')}": True,
    "/audit": True,
    "/batches": True,
    f"/batches/{quote(BATCH_ID, safe='')}": True,
    f"/batches/{quote('none' + EVIL, safe='')}": True,
    f"/runs/{quote('none' + EVIL, safe='')}": True,
    f"/techniques/{quote('none' + EVIL, safe='')}": True,
    f"/runs?state={quote(EVIL)}": False,
    f"/runs?cursor={quote(EVIL)}": False,
}
"""Each page, and whether it has to show the text."""


class _Reader(HTMLParser):
    """Collects everything in a page that could run or load something."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.dangers: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "script":
            self.scripts += 1
            if not (values.get("src") or "").startswith("/static/"):
                self.dangers.append(f"<script> {values}")
        if tag in ("style", "iframe", "object", "embed", "base", "textarea"):
            self.dangers.append(f"<{tag}>")
        for name, value in attrs:
            if name.startswith("on") or name in ("style", "srcdoc", "hx-on"):
                self.dangers.append(f"{name}={value}")
            if name in ("href", "src", "action", "formaction", "hx-get", "hx-post"):
                own = (value or "").startswith(("/", "#"))
                outside = (value or "").startswith(("https://", "http://"))
                if not own and not outside:
                    self.dangers.append(f"{name}={value}")
                if (value or "").startswith("//"):
                    self.dangers.append(f"{name}={value}")
                if outside and tag == "a":
                    assert values["rel"] == "noopener noreferrer nofollow"
                    assert values["referrerpolicy"] == "no-referrer"
        if tag == "script" and attrs == []:
            self.dangers.append("an inline script")

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_no_text_becomes_anything_else(small_site: Site) -> None:
    """On no page does an element, attribute or address come from FLORA's text."""
    await attack(small_site.services)
    for path, shows in PAGES.items():
        answer = await small_site.client.get(path, headers=HTML)
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8", path
        reader = _Reader()
        reader.feed(answer.text)
        assert reader.dangers == [], path
        assert "alert(&#39;" in answer.text or not shows, path
        assert f"<script>alert('{MARK}')" not in answer.text, path
        assert "49" not in reader.text or "{{ 7*7 }}" in reader.text or not shows, path


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", ["imageUrl", "videoUrl", "audioUrl", "documentUrl", "new"])
def test_unsafe_addresses_are_shown_as_text(kind: str, link: str) -> None:
    """Neither a link nor a source comes of it; only a quotation mark in a path may stay one."""
    shown, _ = presentation(Output("o", kind, link), media_origin=None)
    assert (shown == "unsafe") is (web_link(link) is None)
    if '"' not in link:
        assert shown == "unsafe"


@pytest.mark.parametrize(
    ("flora", "url", "kind"),
    [
        ("https://app.flora.ai/api/v1", "https://cdn.example/x.png", "image"),
        ("https://app.flora.ai/api/v1", "http://cdn.example/x.png", "link"),
        ("http://127.0.0.1:8090/api/v1", "http://127.0.0.1:8090/media/x.png", "image"),
        ("http://127.0.0.1:8090/api/v1", "http://127.0.0.1:8091/media/x.png", "link"),
        ("http://127.0.0.1:8090/api/v1", "http://cdn.example/x.png", "link"),
        ("http://127.0.0.1:8090/api/v1", "https://cdn.example/x.png", "image"),
    ],
)
def test_plain_http_is_loaded_from_a_local_flora_alone(flora: str, url: str, kind: str) -> None:
    """Every other address that is not https is only a link."""
    origin = plain_http_origin(flora)
    assert presentation(Output("o", "imageUrl", url), media_origin=origin)[0] == kind


def test_types_are_shown_as_what_they_are() -> None:
    """An unknown type is a link."""
    kinds = ("imageUrl", "videoUrl", "audioUrl", "documentUrl", "text", "model3dUrl")
    outputs = [Output("o", kind, "https://cdn.example/x") for kind in kinds]
    shown = [presentation(one, media_origin=None)[0] for one in outputs]
    assert shown == ["image", "video", "audio", "document", "text", "link"]


TURNING = "invoice\u202egnp.exe \u2067name\u2069"
"""Browsers show it as `invoiceexe.png`, and would turn what comes after it, too."""


async def test_no_text_turns_the_direction_of_another(small_site: Site) -> None:
    """The characters that do so are shown as escapes on every page. Forms and scripts get them
    back as they were, and an address that has some is no link."""
    await attack(small_site.services, TURNING)
    for path in PAGES:
        path = path.replace(quote(EVIL, safe=""), quote(TURNING, safe=""))
        page = (await small_site.client.get(path, headers=HTML)).text
        values = re.findall(r' (?:value|data-copy|data-run)="([^"]*)"', page)
        outside = re.sub(r' (?:value|data-copy|data-run)="[^"]*"', "", page)
        assert re.search("[\u202a-\u202e\u2066-\u2069]", outside) is None, path
        assert "\\u202e" not in "".join(values), path
    page = (await small_site.client.get("/deliveries", headers=HTML)).text
    assert f'name="cause" value="{TURNING}"' in page
    assert f'name="delivery_id" value="whd_{TURNING}2"' in page
    assert "invoice\\u202egnp.exe \\u2067name\\u2069" in page
    assert web_link("https://cdn.example/\u202egnp.exe") is None
