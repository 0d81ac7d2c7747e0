"""`/starts`: starts whose outcome is not known yet."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.services import Services
from tracker.store.queries import starts
from tracker.store.queries.starts import LISTED
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.render import Renderer, query
from tracker.web.http.errors import invalid

PAGE: Final = 50


class StartsPage:
    """The list."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/starts", self.list, methods=["GET"])]

    async def list(self, request: Request) -> Response:
        """A page of starts."""
        state, cursor = given(request, "state"), given(request, "cursor")
        if state is not None and state not in LISTED:
            raise invalid(FieldFault("state", f"must be one of {', '.join(LISTED)}"))
        rows, next_cursor = await starts.list_starts(
            self._services.database,
            states=None if state is None else [state],
            cursor=cursor,
            limit=PAGE,
        )
        return self._render.page(
            request,
            "starts.html",
            rows=rows,
            state=state,
            states=LISTED,
            older=query("/starts", state=state, cursor=next_cursor) if next_cursor else None,
            newest=query("/starts", state=state) if cursor else None,
        )
