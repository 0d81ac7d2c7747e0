"""Who may do what: everything is closed but the few paths that are named open here.

With tokens set, a request has to show one of them, or the cookie of a browser that signed in with
one, and the token needs the scope for what is asked. Without any, only this machine is served, and
a request is refused where anything says that it may come from another machine:

===============================  ===================================================================
what is checked                  why
===============================  ===================================================================
the address that was connected   it is loopback, or other machines reach it
`Host`                           a page whose own name was pointed at this machine sends that name
`Forwarded`, `X-Forwarded-*`,    a proxy passes on what other machines ask
`X-Real-IP`, `Via`
`TRACKER_PUBLIC_URL`             other machines are meant to reach it, by whatever proxy
`Origin`, `Sec-Fetch-*`          a browser lets any page send to loopback
===============================  ===================================================================

A proxy on this machine cannot be told from its other programs where it adds no such header, sends a
loopback `Host` or the one that its client wrote, and no `TRACKER_PUBLIC_URL` is set.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Final, Literal

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.core.clock import Clock
from tracker.core.net import hide_callback_token, is_loopback
from tracker.core.rate_limited_log import LOG_INTERVAL, Seldom
from tracker.core.tokens import Scope as TokenScope
from tracker.core.tokens import Token, Tokens
from tracker.operations.metrics import Metrics
from tracker.store.queries.audit import Principal, Refusals, acting
from tracker.web.http.answers import request_id_of
from tracker.web.http.errors import Fault
from tracker.web.http.limits import Throttle
from tracker.web.http.origin import (
    SAFE,
    from_own_page,
    header_of,
    host_of,
    is_forwarded,
    is_visit,
    network_of,
    peer_of,
)
from tracker.web.sessions import Session, Sessions

Reason = Literal["missing", "wrong", "expired", "scope", "cross_site", "not_local"]
"""Why a request was refused: no token, a wrong or expired one, one without the scope for it, sent
by another site's page, or not known to come from this machine where no token is set."""

EACH_BURST: Final = 10
EACH_REFILL: Final = 6.0
"""From one address ten wrong tokens at once, then one in six seconds; further ones are 429."""
ALL_BURST: Final = 100
ALL_REFILL: Final = 1.0
"""From everywhere together a hundred, then one a second."""

_OPEN: Final = frozenset({"/healthz", "/readyz"})
_OPEN_BELOW: Final = "/callbacks/"  # FLORA has no token; its callbacks are signed
_SIGN_IN: Final = "/login"
_SIGN_IN_BELOW: Final = "/static/"  # the style of the sign-in's page: nothing of the database
_STARTS: Final = re.compile(r"/api/runs(/track)?|/runs/.*/check", re.DOTALL)
_ACTOR: Final = "tracker.actor"
_CHALLENGE: Final = {"WWW-Authenticate": "Bearer"}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who sends a request: by which token, and in which session if a browser signed in with it."""

    token: Token
    session: Session | None = None

    @property
    def name(self) -> str:
        """The token's name; `local` where none is set."""
        return self.token.name


LOCAL: Final = Actor(
    token=Token(name="local", value="", scopes=frozenset({TokenScope.ADMIN})),
)
"""Whoever is on this machine, where no token is set."""


class Access:
    """Tells who sends a request.

    `tokens` gives those in force, and `refresh` looks whether they have just changed; `is_public`
    is whether `TRACKER_PUBLIC_URL` leads here from outside. The log has a line for refusals of one
    kind every `say_again_after` seconds, with their number.
    """

    def __init__(
        self,
        *,
        tokens: Callable[[], Tokens],
        refresh: Callable[[], bool],
        is_public: bool,
        sessions: Sessions,
        refusals: Refusals,
        counts: Metrics,
        clock: Clock,
        say_again_after: float = LOG_INTERVAL,
    ) -> None:
        self._tokens = tokens
        self._refresh = refresh
        self._is_public = is_public
        self._refusals = refusals
        self._counts = counts
        self._clock = clock
        self._each = Throttle(burst=EACH_BURST, refill=EACH_REFILL)
        self._all = Throttle(burst=ALL_BURST, refill=ALL_REFILL)
        self._say_again_after = say_again_after
        self._seldom = Seldom(say_again_after)
        self._unsaid: set[Reason] = set()
        self.sessions = sessions

    @property
    def has_tokens(self) -> bool:
        """Whether there is anything to show, and so to sign in with."""
        return len(self._tokens()) > 0

    async def actor(self, scope: Scope) -> Actor:
        """Who sends this request.

        Raises `Fault` (401, 403, 429) where it is nobody whom it is for, and `StoreUnavailable`
        where a session cannot be looked up.
        """
        if not self.has_tokens:
            if (why := self._not_local(scope)) is not None:
                raise self.refused("not_local", scope, Fault(403, "forbidden", why))
            return LOCAL
        shown = _shown(scope)
        if shown is not None:
            return Actor(token=self.token(scope, shown))
        session = await self.sessions.of(scope)
        if session is not None and self.sessions.may_send(scope, session):
            return Actor(token=session.token, session=session)
        if session is not None:
            why = "This was not sent by a page of this dashboard that is up to date: load it again."
            fault = Fault(401, "unauthorized", why, headers=_CHALLENGE)
            raise self.refused("cross_site", scope, fault, token=session.token.name)
        why = (
            "This needs the header Authorization: Bearer, with TRACKER_API_TOKEN or one of the "
            "[[tokens]] that are set."
        )
        raise self.refused("missing", scope, Fault(401, "unauthorized", why, headers=_CHALLENGE))

    async def admit(self, scope: Scope, needs: TokenScope | None) -> Actor:
        """As `actor`; raises `Fault` 403 as well where the token lacks the scope that it needs."""
        actor = await self.actor(scope)
        if needs is not None and not actor.token.allows(needs):
            fault = Fault(
                403,
                "forbidden",
                f"The token {actor.name} may not do this: it needs the scope {needs}.",
            )
            raise self.refused("scope", scope, fault, token=actor.name)
        return actor

    async def known(self, scope: Scope) -> Actor | None:
        """Who asks for what is answered to everybody, in more detail to this machine where no token
        is set, and to whoever shows one; `None` for anybody else."""
        if self.has_tokens and _shown(scope) is None:
            return None
        try:
            return await self.actor(scope)
        except Fault:
            return None

    async def holds(self, actor: Actor) -> bool:
        """Whether an actor who was let in may still read an answer that goes on for long.

        Raises `StoreUnavailable`.
        """
        if actor.session is not None:
            return await self.sessions.holds(actor.session)
        if actor is LOCAL:
            return not self.has_tokens
        token = self._tokens().find(actor.token.value.encode())
        return token is not None and not token.expired(self._clock())

    def token(self, scope: Scope, shown: bytes) -> Token:
        """The token that is shown. Raises `Fault` 401, or 429 to who showed many wrong ones.

        A right token is looked for first, so that other people's guesses never keep it out.
        """
        token = self._tokens().find(shown)
        if token is None and self._refresh():
            token = self._tokens().find(shown)
        if token is None:
            if (wait := self._take(network_of(scope))) > 0:
                seconds = ceil(wait)
                fault = Fault(
                    429,
                    "too_many_attempts",
                    f"Too many wrong tokens were sent. Try again in {seconds} s; a right token is "
                    "taken at any time.",
                    headers={"Retry-After": str(seconds), "Connection": "close"},
                )
            else:
                fault = Fault(401, "unauthorized", "The token is wrong.", headers=_CHALLENGE)
            raise self.refused("wrong", scope, fault)
        if token.expired(self._clock()):
            message = f"The token {token.name} has expired."
            fault = Fault(401, "unauthorized", message, headers=_CHALLENGE)
            raise self.refused("expired", scope, fault, token=token.name)
        return token

    def _take(self, network: str) -> float:
        """Take a wrong try; else the seconds until there is one. Who has none takes none from
        others."""
        wait = self._each.take(network)
        if wait == 0 and (wait := self._all.take("")) > 0:
            self._each.give_back(network)
        return wait

    def refused(
        self, reason: Reason, scope: Scope, fault: Fault, *, token: str | None = None
    ) -> Fault:
        """Count, log and note a refusal, and return it; of many the log has a line now and then,
        and the audit log a row for each address and minute."""
        self._counts.auth_refused(reason)
        self._refusals.add(
            reason,
            address=network_of(scope),
            actor=token,
            request_id=request_id_of(scope),
            method=scope["method"],
            path=hide_callback_token(scope["path"])[:200],
        )
        loop = asyncio.get_running_loop()
        fields = {
            "reason": reason,
            "message": fault.message,
            "peer": peer_of(scope),
            "method": scope["method"],
            "path": hide_callback_token(scope["path"])[:200],
            **({"token": token} if token else {}),
        }
        if count := self._seldom.count(reason, now=loop.time()):
            log.warning("auth.refused", count=count, **fields)
        elif reason not in self._unsaid:
            self._unsaid.add(reason)
            loop.call_later(self._say_again_after, self._say_rest, reason, fields)
        return fault

    def _say_rest(self, reason: Reason, fields: dict[str, str]) -> None:
        """Log those that came since the last line."""
        self._unsaid.discard(reason)
        if count := self._seldom.rest(reason, now=asyncio.get_running_loop().time()):
            log.warning("auth.refused", count=count, **fields)

    def _not_local(self, scope: Scope) -> str | None:
        """Why the request may come from elsewhere; `None` where it comes from this machine."""
        server, host = scope.get("server"), host_of(scope)
        if self._is_public:
            why = "TRACKER_PUBLIC_URL is set, so that any request may come from elsewhere."
        elif server is None or not is_loopback(server[0]):
            why = "This one came to an address that other machines reach, too."
        elif host is None or not is_loopback(host):
            why = "This one asks for another host than localhost or a loopback address."
        elif is_forwarded(scope):
            why = "This one was passed on by a proxy."
        elif not from_own_page(scope) and not is_visit(scope):
            return (
                "This request comes from a page of another origin. Set TRACKER_API_TOKEN and send "
                "it to let other pages in."
            )
        else:
            return None
        return (
            f"Without TRACKER_API_TOKEN only requests from this machine itself are served. {why} "
            "Set TRACKER_API_TOKEN, and send it."
        )


class Gate:
    """Lets a request through as whoever sent it, or raises `Fault`: 401, 403 or 429."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "http" and not _is_open(scope["path"]):
            for_sign_in = self._access.has_tokens and _is_sign_in(scope["path"])
            if not for_sign_in:
                needs = _needs(scope["method"], scope["path"])
                scope[_ACTOR] = await self._access.admit(scope, needs)
        actor: Actor | None = scope.get(_ACTOR)
        try:
            with acting(principal_of(scope, actor.name)) if actor else nullcontext():
                await self._app(scope, receive, send)
        except Fault as fault:
            if fault.status == 403:  # a form that another page sent, or without the CSRF token
                self._access.refused("cross_site", scope, fault)
            raise


def principal_of(scope: Scope, name: str) -> Principal:
    """Who sends a request, for the audit log."""
    return Principal(name=name, address=peer_of(scope), request_id=request_id_of(scope))


def actor_of(scope: Scope) -> Actor:
    """Who sent a request that was let through."""
    actor: Actor = scope[_ACTOR]
    return actor


def session_of(scope: Scope) -> Session | None:
    """The session that let this request in; `None` where something else did."""
    actor: Actor | None = scope.get(_ACTOR)
    return actor.session if actor else None


def may(scope: Scope, what: TokenScope) -> bool:
    """Whether who sent this request may do that, so that a page can offer it."""
    actor: Actor | None = scope.get(_ACTOR)
    return actor is not None and actor.token.allows(what)


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_BELOW)


def _is_sign_in(path: str) -> bool:
    return path == _SIGN_IN or path.startswith(_SIGN_IN_BELOW)


def _needs(method: str, path: str) -> TokenScope | None:
    """The scope for a request; `None` where any token will do. What nobody thought of needs all."""
    if path == "/metrics":
        return TokenScope.METRICS
    if path == "/audit":  # who works with it, and from where
        return TokenScope.ADMIN
    if method in SAFE:
        return TokenScope.READ
    if path == "/logout":
        return None
    return TokenScope.START if _STARTS.fullmatch(path) else TokenScope.ADMIN


def _shown(scope: Scope) -> bytes | None:
    """The bearer token of a request; `None` where it shows none, or two."""
    scheme, _, token = (header_of(scope, b"authorization") or b"").partition(b" ")
    return token.strip(b" ") if scheme.lower() == b"bearer" else None
