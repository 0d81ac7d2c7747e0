"""`/api/starts`: what was asked of FLORA, and what came of it."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.store import starts
from tracker.views import start_json
from tracker.web.answers import Json
from tracker.web.schemas import StartsQuery, checked_query
from tracker.web.services import Services


class StartLog:
    """The endpoint."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/api/starts", self.list, methods=["GET"])]

    async def list(self, request: Request) -> Response:
        """One page of starts, newest first; without a state those whose outcome is not known."""
        query = checked_query(StartsQuery, request.query_params)
        rows, next_cursor = await starts.list_starts(
            self._services.database,
            states=[query.state] if query.state else None,
            workspace_id=query.workspace_id,
            cursor=query.cursor,
            limit=query.limit,
        )
        return Json(
            {"starts": [start_json(row) for row in rows], "meta": {"next_cursor": next_cursor}}
        )
