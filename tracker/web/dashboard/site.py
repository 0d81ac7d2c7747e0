"""The dashboard as a whole: its routes, its sign-in, and errors as pages."""

from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from tracker.services import Services
from tracker.web.auth import Access
from tracker.web.dashboard.assets import Assets
from tracker.web.dashboard.audit import AuditPage
from tracker.web.dashboard.batches import BatchesPage
from tracker.web.dashboard.deliveries import DeliveriesPage
from tracker.web.dashboard.outputs import Gallery
from tracker.web.dashboard.overview import OverviewPage
from tracker.web.dashboard.render import Renderer, query
from tracker.web.dashboard.run import RunPage
from tracker.web.dashboard.runs import RunsPage
from tracker.web.dashboard.signin import SignIn, local_path
from tracker.web.dashboard.spending import SpendingPage
from tracker.web.dashboard.starts import StartsPage
from tracker.web.dashboard.sweeps import SweepsPage
from tracker.web.dashboard.techniques import TechniquesPage
from tracker.web.http.errors import Fault

_FOR_PROGRAMS: Final = (
    "/api",
    "/callbacks",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/static",
)
"""Paths whose errors are JSON, whoever asks."""
_TITLES: Final = {
    400: "That cannot be read",
    401: "Sign in first",
    403: "That is not allowed",
    404: "There is nothing here",
    405: "That is not how this page is used",
    413: "That is too much",
    429: "Too many wrong tokens",
    503: "Not available at the moment",
}


class Dashboard:
    """Everything that people see."""

    def __init__(self, services: Services, access: Access) -> None:
        gallery = Gallery(services.settings.flora_base_url)
        self._access = access
        self._assets = Assets()
        self._render = Renderer(self._assets, gallery, clock=services.clock)
        self._sign_in = SignIn(self._render, access)
        self._pages = (
            OverviewPage(services, self._render),
            RunsPage(services, self._render),
            RunPage(services, self._render, gallery),
            DeliveriesPage(services, self._render),
            TechniquesPage(services, self._render),
            BatchesPage(services, self._render),
            StartsPage(services, self._render),
            SpendingPage(services, self._render),
            SweepsPage(services, self._render),
            AuditPage(services, self._render),
        )

    def routes(self) -> list[Route]:
        """All routes, in the order in which they are to be tried."""
        return [
            self._assets.route(),
            *self._sign_in.routes(),
            *(route for page in self._pages for route in page.routes()),
        ]

    def show_fault(self, scope: Scope, fault: Fault) -> Response | None:
        """An error as a page; `None` where it is not a browser that asks.

        Who is not signed in is led to the sign-in, and from there to where it was going.
        """
        path: str = scope["path"]
        if any(path == each or path.startswith(f"{each}/") for each in _FOR_PROGRAMS):
            return None
        request = Request(scope)
        if fault.status == 401 and self._access.has_tokens:
            return self._to_sign_in(request)
        if "text/html" not in request.headers.get("accept", ""):
            return None
        return self._render.page(
            request,
            "error.html",
            status=fault.status,
            headers=fault.headers,
            title=_TITLES.get(fault.status, "Something went wrong"),
            message=fault.message,
            fields=fault.fields,
        )

    def _to_sign_in(self, request: Request) -> Response:
        """The way to the sign-in and back to the page that was wanted, or where a script ran."""
        if request.headers.get("hx-request") == "true":
            wanted = _path_in(request.headers.get("hx-current-url", ""))
            # A redirect would put the sign-in's page into the middle of the one that is shown.
            return Response(status_code=401, headers={"HX-Redirect": _sign_in_for(wanted)})
        wanted = "/"
        if request.method == "GET":
            wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(
            _sign_in_for(wanted), status_code=303, headers={"Cache-Control": "no-store"}
        )


def _path_in(url: str) -> str:
    """Path and query of an address, whatever a client sends for one."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "/"
    return local_path(parts._replace(scheme="", netloc="", fragment="").geturl())


def _sign_in_for(wanted: str) -> str:
    return query("/login", next=wanted if wanted != "/" else None)
