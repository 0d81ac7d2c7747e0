"""Access control: everything is closed except the paths that are listed as open here.

With tokens set, a request has to present one of them, or the cookie of a browser that signed in
with one, and the token needs the scope for the operation. Without tokens only this machine is
served, and a request is refused if anything indicates that it may come from another one:

===============================  ===================================================================
check                            reason
===============================  ===================================================================
the address connected to         if it is not loopback, other machines reach it
`Host`, or an absolute target    a page whose own name points at this machine sends that name
`Forwarded`, `X-Forwarded-*`,    a proxy forwards requests of other machines
`X-Real-IP`, `Via`
`TRACKER_PUBLIC_URL`             other machines are meant to reach it, by whatever proxy
`Origin`, `Sec-Fetch-*`          a browser lets any page send requests to loopback
===============================  ===================================================================

A proxy on this machine is indistinguishable from other local programs if it adds no such header,
sends a loopback `Host` or the client's own, and `TRACKER_PUBLIC_URL` is not set.
"""

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final, Literal

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.core.clock import Clock
from tracker.core.log import LOG_INTERVAL, LogRateLimit, get_logger
from tracker.core.net import hide_callback_token, is_loopback
from tracker.operations.metrics import Metrics
from tracker.settings.tokens import Scope as TokenScope
from tracker.settings.tokens import Token, Tokens
from tracker.starting.start import Started, Starter, StartRequest
from tracker.store.queries.audit import Principal, Refusals, acting
from tracker.web.http import Limits
from tracker.web.http.request import (
    SAFE_METHODS,
    header,
    is_forwarded,
    is_navigation,
    is_same_origin,
    network_of,
    peer_of,
    requested_host,
)
from tracker.web.http.responses import Fault, forbidden, request_id_of
from tracker.web.sessions import Session, Sessions

Reason = Literal["missing", "wrong", "expired", "scope", "cross_site", "not_local"]
"""Why a request is refused: no token, a wrong or expired one, one without the scope, sent by
another site's page, or, without tokens, not certain to come from this machine."""

EACH_BURST: Final = 10
"""Wrong tokens from one address at once, then one every `Limits.wrong_token_seconds`."""
ALL_BURST: Final = 100
ALL_REFILL: Final = 1.0
"""From all addresses together: a hundred, then one a second."""
MOST_KEYS: Final = 10_000
"""Addresses that a throttle remembers; more displace the oldest."""

_OPEN: Final = frozenset({"/healthz", "/readyz"})
_OPEN_BELOW: Final = "/callbacks/"  # FLORA has no token; its callbacks are signed
_SIGN_IN: Final = "/login"
_SIGN_IN_BELOW: Final = "/static/"  # the style of the sign-in page: nothing from the database
_ACTOR: Final = "tracker.actor"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who sends a request: by which token, and in which session if a browser signed in with it."""

    token: Token
    session: Session | None = None

    @property
    def name(self) -> str:
        """The token's name; `local` if no token is set."""
        return self.token.name


LOCAL: Final = Actor(token=Token(name="local", value="", scopes=frozenset({TokenScope.ADMIN})))
"""Any program on this machine, if no token is set."""


@dataclass(kw_only=True, eq=False)
class AccessControl:
    """Identifies who sends a request.

    `tokens` returns the current ones, and `refresh` checks whether they have just changed;
    `is_public` is whether `TRACKER_PUBLIC_URL` leads here from outside. Refusals for one reason
    have a log line every `log_interval` seconds, with their number.
    """

    tokens: Callable[[], Tokens]
    refresh: Callable[[], bool]
    is_public: bool
    sessions: Sessions
    refusals: Refusals
    metrics: Metrics
    clock: Clock
    limits: Limits = field(default_factory=Limits)
    log_interval: float = LOG_INTERVAL

    def __post_init__(self) -> None:
        self._each = Throttle(burst=EACH_BURST, refill=self.limits.wrong_token_seconds)
        self._all = Throttle(burst=ALL_BURST, refill=ALL_REFILL)
        self._logged = LogRateLimit(self.log_interval)
        self._log_scheduled: set[Reason] = set()

    @property
    def has_tokens(self) -> bool:
        """Whether any token is set, so that there is something to sign in with."""
        return len(self.tokens()) > 0

    async def authenticate(self, scope: Scope, needs: TokenScope | None = None) -> Actor:
        """Who sends this request.

        Raises `Fault` (401, 403, 429) if that is not known or not allowed, 403 also if the token
        lacks the scope `needs`, and `StoreUnavailable` if a session cannot be looked up.
        """
        actor = await self._actor(scope)
        if needs is not None and not actor.token.allows(needs):
            why = f"The token {actor.name} may not do this: it needs the scope {needs}."
            raise self.refuse("scope", scope, forbidden(why), token=actor.name)
        return actor

    async def _actor(self, scope: Scope) -> Actor:
        if not self.has_tokens:
            if (why := self._not_local(scope)) is not None:
                raise self.refuse("not_local", scope, forbidden(why))
            return LOCAL
        presented = _bearer_token(scope)
        if presented is not None:
            return Actor(token=self.check_token(scope, presented))
        session = await self.sessions.of(scope)
        if session is None:
            why = (
                "This needs the header Authorization: Bearer, with TRACKER_API_TOKEN or one of the "
                "[[tokens]] that are set."
            )
            raise self.refuse("missing", scope, _unauthorized(why))
        if not self.sessions.may_send(scope, session):
            why = "This was not sent by a current page of this dashboard: reload the page."
            raise self.refuse("cross_site", scope, _unauthorized(why), token=session.token.name)
        return Actor(token=session.token, session=session)

    async def identify(self, scope: Scope) -> Actor | None:
        """Who asks for something open to everyone but with more detail for local requests, if no
        token is set, and for valid tokens; `None` for anyone else."""
        if not self.has_tokens:  # nothing is refused here, so nothing is counted
            return LOCAL if self._not_local(scope) is None else None
        if _bearer_token(scope) is None:
            return None
        try:
            return await self.authenticate(scope)
        except Fault:
            return None

    async def may_read_on(self, actor: Actor) -> bool:
        """Whether an actor may still read a response that lasts. Raises `StoreUnavailable`."""
        if actor is LOCAL:
            return not self.has_tokens
        if actor.session is not None:
            token = await self.sessions.token_of(actor.session)
        else:
            token = self.tokens().find(actor.token.value.encode())
            if token is not None and token.expired(self.clock()):
                token = None
        return token is not None and token.allows(TokenScope.READ)

    def check_token(self, scope: Scope, presented: bytes) -> Token:
        """The presented token. Raises `Fault` 401, or 429 after many wrong ones.

        A valid token is looked up first, so that the guesses of others never lock it out.
        """
        token = self.tokens().find(presented)
        if token is None and self.refresh():
            token = self.tokens().find(presented)
        if token is None:
            if (wait := self._throttle(network_of(scope))) > 0:
                seconds = ceil(wait)
                fault = Fault(
                    429,
                    "too_many_attempts",
                    f"Too many wrong tokens were sent. Retry in {seconds} s; a valid token is "
                    "accepted at any time.",
                    headers={"Retry-After": str(seconds), "Connection": "close"},
                )
            else:
                fault = _unauthorized("The token is wrong.")
            raise self.refuse("wrong", scope, fault)
        if token.expired(self.clock()):
            fault = _unauthorized(f"The token {token.name} has expired.")
            raise self.refuse("expired", scope, fault, token=token.name)
        return token

    def _throttle(self, network: str) -> float:
        """Count a wrong token; the seconds to wait if there were too many, from one address or
        altogether."""
        wait = self._each.take(network)
        if wait == 0 and (wait := self._all.take("")) > 0:
            self._each.give_back(network)  # an attempt that is refused for all costs no address
        return wait

    def refuse(
        self, reason: Reason, scope: Scope, fault: Fault, *, token: str | None = None
    ) -> Fault:
        """Count and log a refusal, and return it.

        Many are one log line per interval, and one row of the audit log per address and minute.
        """
        path = hide_callback_token(scope["path"])[:200]
        self.metrics.count("auth_refused", reason)
        self.refusals.add(
            reason,
            address=network_of(scope),
            actor=token,
            request_id=request_id_of(scope),
            method=scope["method"],
            path=path,
        )
        loop = asyncio.get_running_loop()
        fields = {
            "reason": reason,
            "message": fault.message,
            "peer": peer_of(scope),
            "method": scope["method"],
            "path": path,
            **({"token": token} if token else {}),
        }
        if count := self._logged.count(reason, now=loop.time()):
            log.warning("auth.refused", count=count, **fields)
        elif reason not in self._log_scheduled:
            self._log_scheduled.add(reason)
            loop.call_later(self.log_interval, self._log_rest, reason, fields)
        return fault

    def _log_rest(self, reason: Reason, fields: dict[str, str]) -> None:
        """Log those since the last line."""
        self._log_scheduled.discard(reason)
        if count := self._logged.rest(reason, now=asyncio.get_running_loop().time()):
            log.warning("auth.refused", count=count, **fields)

    def _not_local(self, scope: Scope) -> str | None:
        """Why the request may come from another machine; `None` if it comes from this one."""
        server, host = scope.get("server"), requested_host(scope)
        if self.is_public:
            why = "TRACKER_PUBLIC_URL is set, so any request may come from another machine."
        elif host is None or not is_loopback(host):
            named = "no host" if host is None else repr(host[:255])
            why = f"This one is for {named}, not for localhost or a loopback address."
        elif server is None or not is_loopback(server[0]):
            why = "This one arrived at an address that other machines reach."
        elif is_forwarded(scope):
            why = "This one was forwarded by a proxy."
        elif not is_same_origin(scope) and not is_navigation(scope):
            return (
                "This request comes from a page of another origin. To let other pages in, set "
                "TRACKER_API_TOKEN and send it."
            )
        else:
            return None
        return (
            f"Without TRACKER_API_TOKEN only requests from this machine itself are served. {why} "
            "Set TRACKER_API_TOKEN, and send it."
        )


class Throttle:
    """Token buckets: `burst` attempts at once, then one every `refill` seconds, for each key."""

    def __init__(
        self, *, burst: int, refill: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._refill = refill
        self._monotonic = monotonic
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when the bucket is full again

    def take(self, key: str) -> float:
        """Take an attempt: 0 if there was one, else the seconds until the next."""
        now = self._monotonic()
        full_at = max(self._full_at.get(key, now), now) + self._refill
        wait = full_at - now - self._burst * self._refill
        if wait > 1e-9:
            return wait
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        if len(self._full_at) > MOST_KEYS:
            self._full_at.popitem(last=False)
        return 0.0

    def give_back(self, key: str) -> None:
        """The last attempt of this key does not count."""
        if key in self._full_at:
            self._full_at[key] -= self._refill


class ScopedRoute(Route):
    """A route, and the scope that each of its methods needs; `None` if any token suffices."""

    def __init__(
        self, path: str, endpoint: Callable[..., Any], scopes: Mapping[str, TokenScope | None]
    ) -> None:
        super().__init__(path, endpoint, methods=list(scopes))
        # Starlette's `$` matches before a trailing line end, too.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")
        self.scopes = scopes


class AuthMiddleware:
    """Serves a request as its sender, or raises `Fault`: 401, 403 or 429."""

    def __init__(
        self, app: ASGIApp, *, access: AccessControl, routes: Sequence[ScopedRoute] = ()
    ) -> None:
        self._app = app
        self._access = access
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, actor = scope["path"], None
        for_sign_in = path == _SIGN_IN or path.startswith(_SIGN_IN_BELOW)
        is_open = path in _OPEN or path.startswith(_OPEN_BELOW)
        if not is_open and not (for_sign_in and self._access.has_tokens):
            needs = self._needed_scope(scope["method"], path)
            actor = scope[_ACTOR] = await self._access.authenticate(scope, needs)
        try:
            with acting(principal_of(scope, actor.name)) if actor else nullcontext():
                await self._app(scope, receive, send)
        except Fault as fault:
            if fault.status == 403:  # a form that another page sent, or without the CSRF token
                self._access.refuse("cross_site", scope, fault)
            raise

    def _needed_scope(self, method: str, path: str) -> TokenScope | None:
        """The scope for a request. What no route names needs `read`, and `admin` if it changes
        something."""
        method = "GET" if method in SAFE_METHODS else method
        for route in self._routes:
            if method in route.scopes and route.path_regex.match(path):
                return route.scopes[method]
        return TokenScope.READ if method == "GET" else TokenScope.ADMIN


def principal_of(scope: Scope, name: str) -> Principal:
    """Who sends a request, for the audit log."""
    return Principal(name=name, address=peer_of(scope), request_id=request_id_of(scope))


def actor_of(scope: Scope) -> Actor:
    """Who sends a request, once `AuthMiddleware` has let it in."""
    actor: Actor = scope[_ACTOR]
    return actor


async def start_logged(starter: Starter, scope: Scope, start: StartRequest) -> Started:
    """Start a run for the sender of a request, and log who it is; a run that the key had started
    before is not logged as started. Raises like `Starter.start`."""
    by = {"token": start.started_by, "peer": peer_of(scope)}
    # Before anything is sent: whatever becomes of it, the log has who asked for it.
    log.info("run.start_requested", technique=start.technique, key=start.idempotency_key, **by)
    started = await starter.start(start)
    if not started.replayed:
        run = started.record.run
        log.info("run.started", run_id=run.run_id, technique_id=run.technique_id, **by)
    return started


def session_of(scope: Scope) -> Session | None:
    """The session of a request, if it was let in by one."""
    actor: Actor | None = scope.get(_ACTOR)
    return actor.session if actor else None


def may(scope: Scope, what: TokenScope) -> bool:
    """Whether the sender may do that, so that a page can offer it."""
    actor: Actor | None = scope.get(_ACTOR)
    return actor is not None and actor.token.allows(what)


def _unauthorized(message: str) -> Fault:
    return Fault(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})


def _bearer_token(scope: Scope) -> bytes | None:
    """The bearer token of a request; `None` if it has none, or two."""
    scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
    return token.strip(b" ") if scheme.lower() == b"bearer" else None
