"""`GET /healthz`: the process serves; `GET /readyz`: it can do its work; `GET /metrics`."""

import asyncio
from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response

from tracker.core.contact import ContactState
from tracker.core.errors import SchemaOutdated, StoreError
from tracker.core.formatting import iso_time
from tracker.services import Services
from tracker.settings.tokens import Scope
from tracker.store import coordination, migrate
from tracker.web.auth import AccessControl, ScopedRoute
from tracker.web.http import Limits
from tracker.web.http.responses import Json, unavailable


class Health:
    """The three routes. Without `access` there are no details, and no metrics."""

    def __init__(self, services: Services, access: AccessControl | None, *, limits: Limits) -> None:
        self._services = services
        self._access = access
        self._limits = limits
        self._checking: asyncio.Task[None] | None = None

    def routes(self) -> list[ScopedRoute]:
        routes = [
            ScopedRoute("/healthz", self._healthz, {"GET": None}),
            ScopedRoute("/readyz", self._readyz, {"GET": None}),
        ]
        if self._access is None:
            return routes
        return [*routes, ScopedRoute("/metrics", self._metrics, {"GET": Scope.METRICS})]

    async def _healthz(self, request: Request) -> Response:
        return Json({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        """200 if the database answers, takes writes, and has a current schema; else 503 and why.

        A refused API key or an unreachable FLORA does not make the service unready, because
        callbacks are still received. With a valid token, or locally if no token is set, the
        response names them beside the status.
        """
        # Anyone may ask, as often as they like: one query serves all who wait.
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        try:
            await asyncio.shield(self._checking)
        except TimeoutError:
            raise unavailable("The database does not answer.") from None
        except SchemaOutdated as error:
            raise unavailable(str(error)) from error
        except StoreError as error:
            # Without the driver's message, which names the server and its user: anyone may ask.
            raise unavailable(f"{str(error).partition(':')[0]}.") from error
        if self._access is None or await self._access.identify(request.scope) is None:
            return Json({"status": "ready"})
        details = {"status": "ready", "flora": self._flora()}
        if (stale := self._services.rotation.stale) is not None:
            details["settings"] = f"not in force: {stale}"
        return Json(details)

    async def _metrics(self, request: Request) -> Response:
        """Prometheus's text format. Always 200: a metric shows a database that does not answer."""
        accept = request.headers.get("accept", "")
        text, content_type = await self._services.metrics.exposition(accept)
        return Response(text, media_type=content_type)

    async def _check(self) -> None:
        async with asyncio.timeout(self._limits.ready_seconds):
            await migrate.check(self._services.database)
            await coordination.check_writes(self._services.database)
            await self._services.contacts.read()

    def _flora(self) -> str:
        services = self._services
        now = services.clock()
        keyed = services.workspaces.keyed
        if not keyed:
            return "no key is set"
        states = [(one, _in_words(services.contacts.of(one), now)) for one in keyed]
        troubles = [
            text if one.workspace_id is None else f"{text} ({one.workspace_id})"
            for one, text in states
            if text is not None
        ]
        return "; ".join(troubles) or "ok"


def _in_words(state: ContactState | None, now: datetime) -> str | None:
    """`None` if FLORA answers."""
    if state is None:
        return "not asked yet"
    if not state.is_current(now):
        return f"not asked since {iso_time(state.asked_at)}"
    found = state.trouble
    if found is None:
        return "no answer yet" if state.answered_at is None else None
    return f"{found.trouble} since {iso_time(found.since)}: {found.reason}"
