"""`/audit`: who did what, and who was refused."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.services import Services
from tracker.store.queries import audit
from tracker.store.queries.audit import Action
from tracker.views import audit_facts
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.render import Renderer, query
from tracker.web.http.errors import invalid

PAGE: Final = 50


class AuditPage:
    """The list."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/audit", self.list, methods=["GET"])]

    async def list(self, request: Request) -> Response:
        """A page of the audit log."""
        action, cursor = given(request, "action"), given(request, "cursor")
        if action is not None and action not in list(Action):
            raise invalid(FieldFault("action", f"must be one of {', '.join(Action)}"))
        rows, next_cursor = await audit.list_audit(
            self._services.database, action=action, cursor=cursor, limit=PAGE
        )
        return self._render.page(
            request,
            "audit.html",
            rows=[(row, audit_facts(row.detail)) for row in rows],
            action=action,
            actions=list(Action),
            older=query("/audit", action=action, cursor=next_cursor) if next_cursor else None,
            newest=query("/audit", action=action) if cursor else None,
        )
