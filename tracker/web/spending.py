"""`/api/spending`: what was spent, and how far each budget is used."""

from datetime import timedelta

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.store.spending import spending
from tracker.views import spending_json
from tracker.web.answers import Json
from tracker.web.schemas import SpendingQuery, checked_query
from tracker.web.services import Services


class SpendingReport:
    """The endpoint."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/api/spending", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """What the runs of the last days cost, the budgets beside it."""
        query = checked_query(SpendingQuery, request.query_params)
        since = self._services.clock() - timedelta(days=query.days)
        rows, total = await spending(
            self._services.database, query.by, since=since, workspace_id=query.workspace_id
        )
        usages = await self._services.budgets.usages()
        return Json(spending_json(query.by, since, rows, total, usages))
