"""`/`: what runs do now, what needs somebody, and how the parts stand."""

import json
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.services import Services
from tracker.web.dashboard.figures import gather
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.health import needs, verified_through, workspace_health
from tracker.web.dashboard.render import Renderer
from tracker.web.dashboard.spending import nearly_used

SPANS: Final = (("24h", "24 hours"), ("7d", "7 days"))
_HOURS: Final = {"24h": 24, "7d": 7 * 24}


class OverviewPage:
    """The page."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """Its route."""
        return [Route("/", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """How things stand."""
        services = self._services
        now = services.clock()
        chosen = given(request, "span")
        span = chosen if chosen in _HOURS else SPANS[0][0]
        figures = await gather(services.database, now=now, hours=_HOURS[span])
        workspaces = [workspace_health(one, figures) for one in services.workspaces]
        callback_url = services.settings.callback_url
        return self._render.page(
            request,
            "overview.html",
            figures=figures,
            chart=json.dumps(figures.chart()),
            needs=[
                *needs(figures, workspaces, now=now, callback_url=callback_url),
                *nearly_used(await services.budgets.usages()),
            ],
            verified=verified_through(workspaces),
            workspaces=workspaces,
            worker_seen_at=max(
                (one.sweep.last_started_at for one in workspaces if one.sweep), default=None
            ),
            callback_url=callback_url,
            has_key=any(one.key != "none" for one in workspaces),
            span=span,
            span_name=dict(SPANS)[span],
            spans=SPANS,
        )
