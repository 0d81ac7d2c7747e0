"""`/login` and `/logout`: a browser shows the token once and gets a session for it."""

from ipaddress import IPv6Address, ip_address
from math import ceil
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tracker.web.auth import matching
from tracker.web.dashboard.forms import check_action, read_form
from tracker.web.dashboard.render import Renderer, query
from tracker.web.faults import Fault
from tracker.web.sessions import Sessions
from tracker.web.throttle import Throttle

EACH_BURST: Final = 10
EACH_REFILL: Final = 6.0
"""From one address ten wrong tokens at once, then one in six seconds."""
ALL_BURST: Final = 100
ALL_REFILL: Final = 1.0
"""From everywhere together a hundred, then one a second."""


class SignIn:
    """The two routes. `token` is what has to be shown; without one there is nothing to sign in to.

    A right token gives its try back, so that only wrong ones count.
    """

    def __init__(self, render: Renderer, *, token: str | None, sessions: Sessions | None) -> None:
        self._render = render
        self._is_token = None if token is None else matching(token)
        self._sessions = sessions
        self._each = Throttle(burst=EACH_BURST, refill=EACH_REFILL)
        self._all = Throttle(burst=ALL_BURST, refill=ALL_REFILL)

    def routes(self) -> list[Route]:
        """Both routes."""
        return [
            Route("/login", self.login, methods=["GET", "POST"]),
            Route("/logout", self.logout, methods=["POST"]),
        ]

    async def login(self, request: Request) -> Response:
        """`GET` shows the form, `POST` takes the token and leads to where one wanted to go."""
        wanted = local_path(request.query_params.get("next"))
        sessions, is_token = self._sessions, self._is_token
        if sessions is None or is_token is None:
            return RedirectResponse("/", status_code=303)
        if request.method != "POST":
            if sessions.of(request.scope) is not None:
                return RedirectResponse(wanted, status_code=303)
            return self._form(request, wanted)
        if not sessions.is_own(request.scope):
            raise Fault(403, "forbidden", "The form was sent by a page of another origin.")
        address = _network(request)
        if (wait := self._take(address)) > 0:
            return self._form(request, wanted, wait=wait)
        shown = (await read_form(request)).get("token", "").strip()
        if not is_token(shown.encode()):
            return self._form(request, wanted, wrong=True)
        self._each.give_back(address)
        self._all.give_back("")
        answer = RedirectResponse(wanted, status_code=303)
        answer.headers["Set-Cookie"] = sessions.begin(request.scope)
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def logout(self, request: Request) -> Response:
        """Makes the browser forget its session."""
        await check_action(request)
        answer = RedirectResponse("/login", status_code=303)
        if self._sessions is not None:
            answer.headers["Set-Cookie"] = self._sessions.end(request.scope)
        return answer

    def _take(self, address: str) -> float:
        """Take a try; else the seconds until there is one. Who has none takes none from others."""
        wait = self._each.take(address)
        if wait == 0 and (wait := self._all.take("")) > 0:
            self._each.give_back(address)
        return wait

    def _form(
        self, request: Request, wanted: str, *, wrong: bool = False, wait: float = 0.0
    ) -> Response:
        status, headers = 200, {}
        if wait > 0:
            status, headers = 429, {"Retry-After": str(ceil(wait))}
        elif wrong:
            status, headers = 401, {"WWW-Authenticate": "Bearer"}
        return self._render.page(
            request,
            "login.html",
            status=status,
            headers=headers,
            action=query("/login", next=wanted if wanted != "/" else None),
            wrong=wrong,
            wait=ceil(wait),
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


def _network(request: Request) -> str:
    """Who is counted as one: an IPv4 address, or the /64 that an IPv6 subscriber has."""
    host = request.client.host if request.client else ""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return str(IPv6Address(int(address) >> 64 << 64))
    return str(address)
