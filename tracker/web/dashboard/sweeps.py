"""`/sweeps`: the ledger of sweeps, newest first."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.store import sweeps
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.render import Renderer, query
from tracker.web.faults import invalid
from tracker.web.services import Services

PAGE: Final = 50


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
            has_key=any(one.client is not None for one in self._services.workspaces),
            older=query("/sweeps", before=str(page[-1].id)) if len(rows) > PAGE else None,
            newest="/sweeps" if before else None,
        )
