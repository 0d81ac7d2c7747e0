"""`/sweeps`: how much of FLORA's history has been read, as bars, and the sweeps, newest first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.store.queries import sweeps
from tracker.store.queries.sweeps import Interval, Unread
from tracker.web.dashboard.forms import query_position
from tracker.web.dashboard.render import PageGroup, query

PAGE_SIZE: Final = 50
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
    unread: Sequence[Unread]

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


class SweepPage(PageGroup):
    """The page."""

    def routes(self) -> list[Route]:
        return [Route("/sweeps", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """A page of sweeps; they are numbered, and the cursor is a number."""
        before = query_position(request, "before")
        rows = await sweeps.list_sweeps(self._database, limit=PAGE_SIZE + 1, before=before)
        page = rows[:PAGE_SIZE]
        coverage = await sweeps.everything(self._database)
        return self._render(
            request,
            "sweeps.html",
            rows=page,
            bars=_bars(coverage, self._services.clock()),
            has_key=self._has_key,
            older=query("/sweeps", before=str(page[-1].id)) if len(rows) > PAGE_SIZE else None,
            newest="/sweeps" if before else None,
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
