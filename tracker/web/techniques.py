"""`/api/techniques`: FLORA's catalogue, as it is known here."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.store import techniques
from tracker.views import technique_json
from tracker.web.answers import Json
from tracker.web.faults import not_found
from tracker.web.schemas import TechniqueQuery, checked_query
from tracker.web.services import Services


class Techniques:
    """The endpoints."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[Route]:
        """The routes, in the order in which they are to be tried."""
        return [
            Route("/api/techniques", self.list, methods=["GET"]),
            Route("/api/techniques/{technique}", self.show, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """One page of the techniques that are known, by name."""
        query = checked_query(TechniqueQuery, request.query_params)
        rows, next_cursor = await techniques.page(
            self._services.database,
            query=query.query,
            gone=query.gone,
            cursor=query.cursor,
            limit=query.limit,
        )
        return Json(
            {
                "techniques": [technique_json(row) for row in rows],
                "meta": {"next_cursor": next_cursor},
            }
        )

    async def show(self, request: Request) -> Response:
        """One technique with its inputs and outputs; FLORA is asked where they are not known."""
        technique = request.path_params["technique"]
        row = await self._services.catalogue.find(technique)
        if row is None:
            raise not_found(f"No technique {technique[:255]} is known here or to FLORA.")
        return Json(technique_json(row))
