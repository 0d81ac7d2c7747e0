"""`/healthz` says that the process serves; `/readyz`, that it can do its work."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import SchemaOutdated, StoreError
from tracker.operations.metrics import Metrics
from tracker.polling.workspaces import Workspace
from tracker.services import Services
from tracker.store import migrate
from tracker.views import time_json
from tracker.web.auth import Access
from tracker.web.http.answers import Json
from tracker.web.http.errors import unavailable
from tracker.web.http.limits import Limits


class Health:
    """The two endpoints. Without `access` no details are told to anybody."""

    def __init__(self, services: Services, access: Access | None, *, limits: Limits) -> None:
        self._services = services
        self._access = access
        self._limits = limits
        self._checking: asyncio.Task[None] | None = None

    def routes(self) -> list[Route]:
        """Both routes."""
        return [Route("/healthz", self.healthz), Route("/readyz", self.readyz)]

    async def healthz(self, request: Request) -> Response:
        """200 while the process serves."""
        return Json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """200 where the database answers and its schema is new enough, else 503 and why, in short.

        A refused API key or a FLORA that does not answer does not make the service unready, because
        callbacks are still taken. Who shows a token, or asks from this machine where none is set,
        is told it beside the status.
        """
        # Strangers may ask, and as many as like: one question to the database answers all who wait.
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        try:
            await asyncio.shield(self._checking)
        except TimeoutError:
            raise unavailable("The database does not answer.") from None
        except SchemaOutdated as error:
            raise unavailable(str(error)) from error
        except StoreError as error:
            # Not the driver's own words, which name the server and its user: anybody may ask.
            raise unavailable(f"{str(error).partition(':')[0]}.") from error
        if self._access is None or await self._access.known(request.scope) is None:
            return Json({"status": "ready"})
        return Json({"status": "ready", "flora": _flora(list(self._services.workspaces))})

    async def _check(self) -> None:
        async with asyncio.timeout(self._limits.ready_seconds):
            await migrate.check(self._services.database)


def _flora(workspaces: list[Workspace]) -> str:
    """What is known of FLORA and the API keys, in words."""
    keyed = [workspace for workspace in workspaces if workspace.client is not None]
    if not keyed:
        return "no key is set"
    troubles = [words for workspace in keyed if (words := _trouble(workspace))]
    return "; ".join(troubles) or "ok"


def _trouble(workspace: Workspace) -> str | None:
    client = workspace.client
    if client is None:
        return None
    whose = "" if workspace.workspace_id is None else f" ({workspace.workspace_id})"
    if client.breaker.open:
        since = client.breaker.since
        return f"key refused{'' if since is None else f' since {time_json(since)}'}{whose}"
    found = client.contact.found
    if found is None:
        return None
    return f"{found.trouble} since {time_json(found.since)}{whose}: {found.reason}"


# `GET /metrics`: what Prometheus scrapes, from every process that serves a port.


class MetricsText:
    """The endpoint."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/metrics", self.show)]

    async def show(self, request: Request) -> Response:
        """200 always: that the database does not answer is told by a metric of its own."""
        text, content_type = await self._metrics.exposition(request.headers.get("accept", ""))
        return Response(text, media_type=content_type)
