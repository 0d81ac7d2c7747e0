"""`/runbook.html`: what each alert means and what to do, from docs/runbook.md of this version.

So a page can link to it where nothing else can be reached. With `TRACKER_DOCS_URL` pages link to
the documentation there instead.
"""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.web.dashboard.render import PageGroup


class RunbookPage(PageGroup):
    """The page."""

    def routes(self) -> list[Route]:
        return [Route("/runbook.html", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """All sections; an alert's is `#` and its name in lower case."""
        return self._render(
            request, "runbook.html", text=rendered(self._services.settings.tracker_docs_url)
        )


@cache
def rendered(docs_url: str | None) -> Markup:
    """The runbook as HTML. Links to other pages of the documentation lead to `docs_url`, and are
    plain text without one."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(_text())
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", re.sub(r"[^a-z0-9]+", "-", inline.content.lower()))
        opened = False
        for child in token.children or ():
            if child.type == "link_open":
                href = _target(str(child.attrGet("href")), docs_url)
                opened = href is not None
                child.attrSet("href", href or "")
            if child.type in ("link_open", "link_close") and not opened:
                child.type, child.tag, child.content = "text", "", ""
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))  # noqa: S704


def _target(href: str, docs_url: str | None) -> str | None:
    """Where a link of the page leads; `None` if nowhere."""
    if href.startswith("#"):
        return href
    page = re.fullmatch(r"([a-z-]+)\.md(#.*)?", href)
    return f"{docs_url}/{page[1]}.html{page[2] or ''}" if docs_url and page else None


def _text() -> str:
    """The file, which is inside the package in a wheel and beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    found = [root / "docs" / "runbook.md" for root in (package, package.parent)]
    return next(path for path in found if path.is_file()).read_text(encoding="utf-8")
