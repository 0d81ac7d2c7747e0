"""`/login`, `/logout` and `/audit`: a browser exchanges a token for a session, and who did what."""

from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tracker.core.log import get_logger
from tracker.services import Services
from tracker.settings.tokens import Scope
from tracker.store.queries import audit
from tracker.store.queries.audit import Action, acting
from tracker.views import audit_facts
from tracker.web.auth import AccessControl, principal_of, session_of
from tracker.web.dashboard.forms import query_field, read_filters, read_form
from tracker.web.dashboard.render import PageGroup, Renderer, action, page, query
from tracker.web.http import Limits
from tracker.web.http.request import peer_of
from tracker.web.http.responses import Fault, forbidden

PAGE_SIZE: Final = 50

log = get_logger(__name__)


class AccessPages(PageGroup):
    """Sign-in, sign-out and the audit log. Where no token is set, no sign-in is needed."""

    def __init__(
        self, services: Services, renderer: Renderer, limits: Limits, access: AccessControl
    ) -> None:
        super().__init__(services, renderer, limits)
        self._access = access

    @page("/login", post=Scope.READ)
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
        if not token.allows(Scope.READ):
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

    @page("/audit", scope=Scope.ADMIN)  # who works with the tracker, and from where
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

    def _form(self, request: Request, wanted: str, *, refusal: Fault | None = None) -> Response:
        return self._render(
            request,
            "login.html",
            status=refusal.status if refusal else 200,
            headers=refusal.headers if refusal else None,
            action=login_url(wanted),
            refusal=refusal.message if refusal else None,
        )


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
