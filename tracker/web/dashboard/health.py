"""`/health`: FLORA, callbacks, worker and database, what of FLORA's history has been read, and the
sweeps, newest first. `/runbook.html`: what to do about alerts."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Final

from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tracker.store import migrate
from tracker.store.queries import attention, overview, sweeps
from tracker.store.queries.deliveries import list_deliveries
from tracker.store.queries.sweeps import Interval, UnreadSpan
from tracker.web.dashboard.alerts import connection, workspace_health
from tracker.web.dashboard.forms import query_position
from tracker.web.dashboard.render import PageGroup, page, query

PAGE_SIZE: Final = 50
DATABASES: Final = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
MIN_SPAN: Final = timedelta(days=1)
MAX_SPAN: Final = timedelta(days=90)
"""How much time a bar shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageBar:
    """The history of one kind of runs from `since` to `until`: what was read, and what could not
    be."""

    workspace_id: str
    kind: str
    since: datetime
    until: datetime
    intervals: Sequence[Interval]
    unread: Sequence[UnreadSpan]

    def segments(self) -> Iterator[tuple[str, float, float]]:
        """What to draw: "read" or "unread", with place and width in thousandths."""
        for one in self.intervals:
            yield "read", *self._place(one.from_at, one.to_at)
        for gap in self.unread:
            yield "unread", *self._place(gap.from_at or self.since, gap.to_at)

    def _place(self, begin: datetime, end: datetime) -> tuple[float, float]:
        span = self.until - self.since
        first = max((begin - self.since) / span, 0.0)
        last = min(max((end - self.since) / span, first + 0.003), 1.0)  # wide enough to be visible
        return round(1000 * first, 1), round(1000 * max(last - first, 0.0), 1)


class HealthPages(PageGroup):
    """The page, and the runbook."""

    @page("/sweeps")
    async def moved(self, request: Request) -> Response:
        """The address of earlier versions."""
        return RedirectResponse("/health", status_code=301)

    @page("/health")
    async def show(self, request: Request) -> Response:
        """The state of each part, with a page of sweeps, which are numbered."""
        services, db, now = self._services, self._database, self._services.clock()
        before = query_position(request, "before")
        rows = await sweeps.list_sweeps(db, limit=PAGE_SIZE + 1, before=before)
        page = rows[:PAGE_SIZE]
        began = monotonic()
        counts = await attention.counts(db, now=now)
        seconds = monotonic() - began
        workspaces = await workspace_health(services, now=now)
        deliveries, _ = await list_deliveries(db, limit=1)
        ends = await overview.ends_by_hour(db, now=now)
        return self._render(
            request,
            "health.html",
            connections=[(one, connection(one, alone=True)) for one in workspaces],
            counts=counts,
            overdue=bool(await attention.overdue(db, now=now, limit=1)),
            last_delivery=deliveries[0] if deliveries else None,
            callback_url=services.settings.callback_url,
            by_source=sum((Counter(hour.by_source) for hour in ends), Counter()),
            worker_seen_at=max(
                (one.sweep.last_started_at for one in workspaces if one.sweep), default=None
            ),
            database=DATABASES[db.dialect],
            revision=await migrate.revision(db),
            read_seconds=seconds,
            bars=_bars(await sweeps.everything(db), now),
            rows=page,
            has_key=self._has_key,
            older=query("/health", before=str(page[-1].id)) if len(rows) > PAGE_SIZE else None,
            newest="/health" if before else None,
        )

    @page("/runbook.html")
    async def runbook(self, request: Request) -> Response:
        """All sections; an alert's is `#` and its name in lower case."""
        return self._render(
            request, "runbook.html", text=runbook_html(self._services.settings.tracker_docs_url)
        )


def _bars(coverage: sweeps.Coverage, now: datetime) -> list[CoverageBar]:
    unread = sweeps.unread(coverage)
    return [
        CoverageBar(
            workspace_id=key[0],
            kind=key[1],
            since=min(max(intervals[-1].from_at, now - MAX_SPAN), now - MIN_SPAN),
            until=max(now, intervals[0].to_at),
            intervals=intervals,
            unread=[one for one in unread if (one.workspace_id, one.run_type) == key],
        )
        for key, intervals in coverage.items()
    ]


# `/runbook.html`: what each alert means and what to do, from docs/runbook.md of this version.
#
# So a page can link to it where nothing else can be reached. With `TRACKER_DOCS_URL` pages link to
# the documentation there instead.


@cache
def runbook_html(docs_url: str | None) -> Markup:
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
