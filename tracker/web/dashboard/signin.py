"""`/login` and `/logout`: a browser shows a token once and gets a session for it."""

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tracker.core.tokens import Scope
from tracker.store.queries.audit import acting
from tracker.web.auth import Access, principal_of, session_of
from tracker.web.dashboard.forms import check_action, read_form
from tracker.web.dashboard.render import Renderer, query
from tracker.web.http.errors import Fault
from tracker.web.http.origin import peer_of

log = structlog.get_logger(__name__)


class SignIn:
    """The two routes. Where no token is set there is nothing to sign in to."""

    def __init__(self, render: Renderer, access: Access) -> None:
        self._render = render
        self._access = access

    def routes(self) -> list[Route]:
        """Both routes."""
        return [
            Route("/login", self.login, methods=["GET", "POST"]),
            Route("/logout", self.logout, methods=["POST"]),
        ]

    async def login(self, request: Request) -> Response:
        """`GET` shows the form, `POST` takes the token and leads to where one wanted to go."""
        wanted = local_path(request.query_params.get("next"))
        sessions = self._access.sessions
        if not self._access.has_tokens:
            return RedirectResponse("/", status_code=303)
        if request.method != "POST":
            if await sessions.of(request.scope) is not None:
                return RedirectResponse(wanted, status_code=303)
            return self._form(request, wanted)
        if not sessions.is_own(request.scope):
            raise Fault(403, "forbidden", "The form was sent by a page of another origin.")
        shown = (await read_form(request)).get("token", "").strip()
        try:
            token = self._access.token(request.scope, shown.encode())
        except Fault as refusal:
            return self._form(request, wanted, refusal=refusal)
        if not token.allows(Scope.READ):
            message = f"The token {token.name} may not see pages: it lacks the scope read."
            fault = Fault(403, "forbidden", message)
            self._access.refused("scope", request.scope, fault, token=token.name)
            return self._form(request, wanted, refusal=fault)
        answer = RedirectResponse(wanted, status_code=303)
        with acting(principal_of(request.scope, token.name)):
            answer.headers["Set-Cookie"] = await sessions.begin(request.scope, token)
        answer.headers["Cache-Control"] = "no-store"
        log.info("auth.signed_in", token=token.name, peer=peer_of(request.scope))
        return answer

    async def logout(self, request: Request) -> Response:
        """Ends the session, here and for every copy of its cookie."""
        await check_action(request)
        session = session_of(request.scope)
        answer = RedirectResponse("/login", status_code=303)
        answer.headers["Set-Cookie"] = await self._access.sessions.end(request.scope, session)
        if session is not None:
            log.info("auth.signed_out", token=session.token.name, peer=peer_of(request.scope))
        return answer

    def _form(self, request: Request, wanted: str, *, refusal: Fault | None = None) -> Response:
        return self._render.page(
            request,
            "login.html",
            status=refusal.status if refusal else 200,
            headers=refusal.headers if refusal else None,
            action=query("/login", next=wanted if wanted != "/" else None),
            refusal=refusal.message if refusal else None,
        )


def local_path(text: str | None) -> str:
    """`text` where it is a path of ours to go to, else the overview.

    `//host` and `/\\host` are other hosts to a browser, and it drops tabs and line ends first.
    """
    if not text or not text.startswith("/") or len(text) > 2048:
        return "/"
    if text[1:2] in ("/", "\\") or any(ord(each) < 0x20 or ord(each) == 0x7F for each in text):
        return "/"
    return text
