"""The dashboard as a whole: its routes, errors as pages, sign-in, the audit log and the runbook.

At `/login` a browser exchanges a token for a session, which `/logout` ends. `/runbook.html` says
what each alert means and what to do, from docs/runbook.md of this version, so that a page can link
to it where nothing else can be reached. With `TRACKER_DOCS_URL` pages link to the documentation
there instead.
"""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Scope

from tracker.core.log import get_logger
from tracker.services import Services
from tracker.settings.tokens import Scope as TokenScope
from tracker.store.queries import audit
from tracker.store.queries.audit import Action, acting
from tracker.views import audit_facts
from tracker.web.auth import AccessControl, ScopedRoute, principal_of, session_of
from tracker.web.dashboard import (
    PAGE_SIZE,
    PageGroup,
    action,
    page,
    query_field,
    read_filters,
    read_form,
)
from tracker.web.dashboard.batch import BatchPages
from tracker.web.dashboard.health import HealthPages
from tracker.web.dashboard.overview import OverviewPages
from tracker.web.dashboard.render import Renderer, query
from tracker.web.dashboard.runs import RunPages
from tracker.web.dashboard.techniques import TechniquePages
from tracker.web.dashboard.webhooks import DeliveryPages, WebhookPages
from tracker.web.http import Limits
from tracker.web.http.request import peer_of, prefix_of
from tracker.web.http.responses import Fault, forbidden

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
    *(OverviewPages, RunPages, DeliveryPages, TechniquePages, BatchPages, HealthPages),
    WebhookPages,
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

log = get_logger(__name__)


class Dashboard:
    """All pages."""

    def __init__(self, services: Services, access: AccessControl, limits: Limits) -> None:
        self._access = access
        self._renderer = Renderer(services)
        self._pages = (
            SitePages(services, self._renderer, limits, access),
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


class SitePages(PageGroup):
    """Sign-in, sign-out, the audit log and the runbook. Where no token is set, no sign-in is
    needed."""

    def __init__(
        self, services: Services, renderer: Renderer, limits: Limits, access: AccessControl
    ) -> None:
        super().__init__(services, renderer, limits)
        self._access = access

    @page("/login", post=TokenScope.READ)
    async def login(self, request: Request) -> Response:
        """`GET` shows the form, `POST` takes the token and leads to the page that was wanted."""
        wanted = local_path(request.query_params.get("next"))
        sessions = self._access.sessions
        if not self._access.has_tokens:
            return RedirectResponse("/", status_code=303)
        if request.method != "POST":
            if await sessions.of(request.scope) is not None:
                return RedirectResponse(wanted, status_code=303)
            return self._form(request, wanted)
        if not sessions.is_same_origin(request.scope):
            raise forbidden("A page of another site sent the form.")
        shown = (await read_form(request)).get("token", "").strip()
        try:
            token = self._access.check_token(request.scope, shown.encode())
        except Fault as refusal:
            return self._form(request, wanted, refusal=refusal)
        if not token.allows(TokenScope.READ):
            fault = forbidden(f"The token {token.name} may not see pages: it lacks the scope read.")
            self._access.refuse("scope", request.scope, fault, token=token.name)
            return self._form(request, wanted, refusal=fault)
        answer = RedirectResponse(wanted, status_code=303)
        with acting(principal_of(request.scope, token.name)):
            answer.headers["Set-Cookie"] = await sessions.start(request.scope, token)
        log.info("auth.signed_in", token=token.name, peer=peer_of(request.scope))
        return answer

    @action("/logout", scope=None)
    async def logout(self, request: Request) -> Response:
        """Ends the session, for every copy of its cookie."""
        session = session_of(request.scope)
        answer = RedirectResponse("/login", status_code=303)
        answer.headers["Set-Cookie"] = await self._access.sessions.end(request.scope, session)
        if session is not None:
            log.info("auth.signed_out", token=session.token.name, peer=peer_of(request.scope))
        return answer

    @page("/audit", scope=TokenScope.ADMIN)  # who works with the tracker, and from where
    async def audit(self, request: Request) -> Response:
        filters, cursor = read_filters(request, {"action": Action}), query_field(request, "cursor")
        rows, next_cursor = await audit.list_audit(
            self._database, action=filters["action"], cursor=cursor, limit=PAGE_SIZE
        )
        return self._list(
            request,
            "audit.html",
            next_cursor,
            filters,
            rows=[(row, audit_facts(row.detail)) for row in rows],
            actions={one.value: one.value.replace("_", " ") for one in Action},
        )

    @page("/runbook.html")
    async def runbook(self, request: Request) -> Response:
        """All sections; an alert's is `#` and its name in lower case."""
        return self._render(
            request, "runbook.html", text=runbook_html(self._services.settings.tracker_docs_url)
        )

    def _form(self, request: Request, wanted: str, *, refusal: Fault | None = None) -> Response:
        return self._render(
            request,
            "login.html",
            status=refusal.status if refusal else 200,
            headers=refusal.headers if refusal else None,
            action=login_url(wanted),
            refusal=refusal.message if refusal else None,
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


def login_url(wanted: str) -> str:
    """The sign-in that leads to `wanted` afterwards."""
    return query("/login", next=wanted if wanted != "/" else None)


def local_path(text: str | None) -> str:
    """`text` where it is a path of this site, else the overview.

    `//host` and `/\\host` are other hosts to a browser, and it drops tabs and line ends first.
    """
    if not text or not text.startswith("/") or len(text) > 2048:
        return "/"
    if text[1:2] in ("/", "\\") or any(ord(each) < 0x20 or ord(each) == 0x7F for each in text):
        return "/"
    return text


@cache
def runbook_html(docs_url: str | None) -> Markup:
    """The runbook as HTML. Links to other pages of the documentation lead to `docs_url`, and are
    plain text without one."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(_runbook_text())
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", re.sub(r"[^a-z0-9]+", "-", inline.content.lower()))
        opened = False
        for child in token.children or ():
            if child.type == "link_open":
                href = _runbook_link(str(child.attrGet("href")), docs_url)
                opened = href is not None
                child.attrSet("href", href or "")
            if child.type in ("link_open", "link_close") and not opened:
                child.type, child.tag, child.content = "text", "", ""
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))  # noqa: S704


def _runbook_link(href: str, docs_url: str | None) -> str | None:
    """Where a link of the page leads; `None` if nowhere."""
    if href.startswith("#"):
        return href
    page = re.fullmatch(r"([a-z-]+)\.md(#.*)?", href)
    return f"{docs_url}/{page[1]}.html{page[2] or ''}" if docs_url and page else None


def _runbook_text() -> str:
    """The file, which is inside the package in a wheel and beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    found = [root / "docs" / "runbook.md" for root in (package, package.parent)]
    return next(path for path in found if path.is_file()).read_text(encoding="utf-8")
