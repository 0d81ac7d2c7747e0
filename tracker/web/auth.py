"""Who may see what: everything is closed but the few paths that are named open here.

With a token set, a request has to show it (or be let in by another `Pass`, such as a sign-in's
cookie). With none, only this machine is served: the request's `Host` has to be loopback, which
keeps out a web page whose own name was pointed here, and nothing but the following of a link may
come from a page of another origin, which a browser would send to loopback as readily as anywhere.
"""

import hmac
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.core.loopback import is_loopback
from tracker.web.faults import Fault

Pass = Callable[[Scope], bool]
"""One way of being let in: whether this request shows what it takes."""

SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""The methods that change nothing."""

_OPEN: Final = frozenset({"/healthz", "/readyz"})
_OPEN_BELOW: Final = "/callbacks/"  # FLORA has no token; its callbacks are signed
_SIGN_IN: Final = "/login"
_SIGN_IN_BELOW: Final = "/static/"  # the style of the sign-in's page: nothing of the database


class Gate:
    """Lets a request through, or answers 401 or 403.

    `token` is the bearer token, `None` where none is set; `passes` are the other ways in where one
    is.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, passes: Sequence[Pass] = ()) -> None:
        self._app = app
        self._passes = None if token is None else (bearer(token), *passes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; raises `Fault` for one that is not let in."""
        if scope["type"] == "http" and not _is_open(scope["path"]):
            if self._passes is None:
                _only_this_machine(scope)
            elif not _is_sign_in(scope["path"]) and not any(shows(scope) for shows in self._passes):
                raise Fault(
                    401,
                    "unauthorized",
                    "This needs the header Authorization: Bearer, with the token that "
                    "TRACKER_API_TOKEN is set to.",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)


def bearer(token: str) -> Pass:
    """Being let in by `Authorization: Bearer <token>`."""
    is_token = matching(token)

    def shows(scope: Scope) -> bool:
        given = header_of(scope, b"authorization")
        if given is None:
            return False
        scheme, _, shown = given.partition(b" ")
        return scheme.lower() == b"bearer" and is_token(shown.strip(b" "))

    return shows


def matching(token: str) -> Callable[[bytes], bool]:
    """Says of what is shown whether it is `token`; how long that takes tells nothing of it.

    Digests are compared, because of two texts that differ in length even `compare_digest` may let
    the length be measured.
    """
    expected = sha256(token.encode()).digest()

    def is_token(shown: bytes) -> bool:
        return hmac.compare_digest(sha256(shown).digest(), expected)

    return is_token


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_BELOW)


def _is_sign_in(path: str) -> bool:
    """Whether the path is needed to sign in; there is something to sign in with only where a token
    is set."""
    return path == _SIGN_IN or path.startswith(_SIGN_IN_BELOW)


def from_own_page(scope: Scope, *, also: str | None = None) -> bool:
    """Whether a request comes from a page of our own, or from no page at all.

    Only browsers send `Origin` and `Sec-Fetch-Site`. Ours is the `Host` that was asked, and `also`
    where a proxy in front asks us by another name.
    """
    site = _headers(scope, b"sec-fetch-site")
    if any(value not in (b"same-origin", b"none") for value in site):
        return False
    host = header_of(scope, b"host")
    own = {host.lower()} if host else set()
    if also:
        own.add(also.encode("latin-1"))
    origins = _headers(scope, b"origin")
    return len(origins) <= 1 and all(
        origin.partition(b"://")[2].lower() in own for origin in origins
    )


def _only_this_machine(scope: Scope) -> None:
    host = header_of(scope, b"host")
    name = None if host is None else _name_of(host)
    if name is None or not is_loopback(name):
        raise Fault(
            403,
            "forbidden",
            "Without TRACKER_API_TOKEN only this machine is served, under localhost or a loopback "
            "address. Set TRACKER_API_TOKEN to serve other hosts.",
        )
    if not from_own_page(scope) and not _is_visit(scope):
        raise Fault(
            403,
            "forbidden",
            "This request comes from a page of another origin. Set TRACKER_API_TOKEN and send it "
            "to let other pages in.",
        )


def _is_visit(scope: Scope) -> bool:
    """Whether somebody follows a link of another page to one of ours.

    What a page of theirs loads into itself, as an image, a script or a frame, is no visit: they
    would learn from it what there is here, and spend what FLORA lets us ask.
    """
    asked_by_script = bool(_headers(scope, b"origin"))
    into = _headers(scope, b"sec-fetch-dest")  # an old browser does not say
    return (
        scope["method"] in SAFE and not asked_by_script and all(one == b"document" for one in into)
    )


def _name_of(host: bytes) -> str | None:
    """The name in a `Host` header, without port and brackets; `None` where it is malformed."""
    try:
        parts = urlsplit(b"//" + host)
        _ = parts.port  # raises where it is no port
    except ValueError:
        return None
    if parts.netloc != host or parts.username is not None or parts.hostname is None:
        return None
    return parts.hostname.decode("latin-1")


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """The value of a header that may stand once; `None` where it is missing or stands twice."""
    values = _headers(scope, name)
    return values[0] if len(values) == 1 else None


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
