"""`GET /metrics`: what Prometheus scrapes, from every process that serves a port."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.web.services import Tells


class MetricsText:
    """The endpoint."""

    def __init__(self, metrics: Tells) -> None:
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/metrics", self.show)]

    async def show(self, request: Request) -> Response:
        """200 always: that the database does not answer is told by a metric of its own."""
        text, content_type = await self._metrics.exposition(request.headers.get("accept", ""))
        return Response(text, media_type=content_type)
