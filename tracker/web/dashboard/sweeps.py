"""`/sweeps`: what of FLORA's history has been read, as a picture, and the sweeps, newest first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.services import Services
from tracker.store.queries import sweeps
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.sweeps import Interval, Unread
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.render import Renderer, query
from tracker.web.http.errors import invalid

PAGE: Final = 50
SHORTEST: Final = timedelta(days=1)
LONGEST: Final = timedelta(days=90)
"""How much time a bar shows at least and at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One kind's history from `since` until now, and what FLORA did not let us read of it."""

    workspace_id: str
    kind: str
    since: datetime
    until: datetime
    intervals: Sequence[Interval]
    unread: Sequence[Unread]

    @property
    def checked_until(self) -> datetime:
        """The end of the newest interval."""
        return self.intervals[0].to_at

    def parts(self) -> Iterator[tuple[str, float, float]]:
        """What to draw: a word ("read" or "unread"), and place and width in thousandths."""
        for one in self.intervals:
            yield "read", *self._place(one.from_at, one.to_at)
        for gap in self.unread:
            yield "unread", *self._place(gap.from_at or self.since, gap.to_at)

    def _place(self, begin: datetime, end: datetime) -> tuple[float, float]:
        whole = self.until - self.since
        first = max((begin - self.since) / whole, 0.0)
        last = min(max((end - self.since) / whole, first + 0.003), 1.0)  # wide enough to be seen
        return round(1000 * first, 1), round(1000 * max(last - first, 0.0), 1)


def bars(found: coverage.Coverage, now: datetime) -> list[Bar]:
    """A bar for each history."""
    unread = coverage.unread(found)
    return [
        Bar(
            workspace_id=workspace_id,
            kind=kind,
            since=min(max(intervals[-1].from_at, now - LONGEST), now - SHORTEST),
            until=max(now, intervals[0].to_at),
            intervals=intervals,
            unread=[one for one in unread if (one.workspace_id, one.run_type) == key],
        )
        for key, intervals in found.items()
        for workspace_id, kind in [key]
    ]


class SweepsPage:
    """The page."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """Its route."""
        return [Route("/sweeps", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """A page of sweeps; they are numbered, so the cursor is a number."""
        before = given(request, "before")
        if before is not None and not (before.isascii() and before.isdigit() and len(before) < 19):
            raise invalid(FieldFault("before", "must be the number of a sweep"))
        rows = await sweeps.list_sweeps(
            self._services.database, limit=PAGE + 1, before=int(before) if before else None
        )
        page = rows[:PAGE]
        return self._render.page(
            request,
            "sweeps.html",
            rows=page,
            bars=bars(await coverage.everything(self._services.database), self._services.clock()),
            has_key=any(one.client is not None for one in self._services.workspaces),
            older=query("/sweeps", before=str(page[-1].id)) if len(rows) > PAGE else None,
            newest="/sweeps" if before else None,
        )
