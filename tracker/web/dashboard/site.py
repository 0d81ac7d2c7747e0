"""The dashboard as a whole: its routes, and errors as pages."""

from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Scope

from tracker.services import Services
from tracker.web.auth import AccessControl, ScopedRoute
from tracker.web.dashboard.access import AccessPages, local_path, login_url
from tracker.web.dashboard.batch import BatchPages
from tracker.web.dashboard.deliveries import DeliveryPages
from tracker.web.dashboard.health import HealthPages
from tracker.web.dashboard.overview import OverviewPage
from tracker.web.dashboard.render import PageGroup, Renderer
from tracker.web.dashboard.runs import RunPages
from tracker.web.dashboard.spending import SpendingPage
from tracker.web.dashboard.techniques import TechniquePages
from tracker.web.dashboard.webhooks import WebhookPages
from tracker.web.http import Limits
from tracker.web.http.request import prefix_of
from tracker.web.http.responses import Fault

_JSON_PATHS: Final = (
    "/api",
    "/callbacks",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/static",
)
"""Paths whose errors are always JSON."""
_GROUPS: Final[tuple[type[PageGroup], ...]] = (
    *(OverviewPage, RunPages, DeliveryPages, TechniquePages, BatchPages, SpendingPage),
    *(HealthPages, WebhookPages),
)
_TITLES: Final = {
    400: "Invalid request",
    401: "Sign in first",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    413: "Request too large",
    429: "Too many wrong tokens",
    503: "Temporarily unavailable",
}


class Dashboard:
    """All pages."""

    def __init__(self, services: Services, access: AccessControl, limits: Limits) -> None:
        self._access = access
        self._renderer = Renderer(services)
        self._pages = (
            AccessPages(services, self._renderer, limits, access),
            *(group(services, self._renderer, limits) for group in _GROUPS),
        )

    def routes(self) -> list[ScopedRoute]:
        """All routes, in the order in which they match."""
        pages = [route for group in self._pages for route in group.routes()]
        pages.sort(key=lambda route: route.path.endswith(":any}"))  # matches what is below, too
        return [self._renderer.assets.route(), *pages]

    def show_fault(self, scope: Scope, fault: Fault) -> Response | None:
        """An error as a page; `None` where no browser asks. Without a session, the sign-in."""
        path: str = scope["path"]
        if any(path == each or path.startswith(f"{each}/") for each in _JSON_PATHS):
            return None
        request = Request(scope)
        if fault.status == 401 and self._access.has_tokens:
            return _to_sign_in(request)
        if "text/html" not in request.headers.get("accept", ""):
            return None
        return self._renderer.page(
            request,
            "error.html",
            status=fault.status,
            headers=fault.headers,
            title=_TITLES.get(fault.status, "Something went wrong"),
            message=fault.message,
            fields=fault.fields,
        )


def _to_sign_in(request: Request) -> Response:
    """To the sign-in, and from there to the wanted page, or to the one whose script or form asked:
    what was asked for is not done, and has to be seen before it is asked for again."""
    if request.headers.get("hx-request") == "true":
        page = _page_of(request, "hx-current-url")
        # A redirect would put the sign-in into the middle of the present page.
        return Response(status_code=401, headers={"HX-Redirect": login_url(page)})
    if request.method == "GET":
        wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    else:
        wanted = _page_of(request, "referer")
    return RedirectResponse(login_url(wanted), status_code=303)


def _page_of(request: Request, header: str) -> str:
    """Path and query, without the prefix, of the address that a client sent in a header."""
    try:
        parts = urlsplit(request.headers.get(header, ""))
    except ValueError:
        return "/"
    path = local_path(parts._replace(scheme="", netloc="", fragment="").geturl())
    return path.removeprefix(prefix_of(request.scope)) or "/"
