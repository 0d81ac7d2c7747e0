"""Sessions of signed-in browsers: the cookie, and the protection against other sites' pages.

A session is a row of the database, found by the digest of a random cookie. Signing out removes the
row, and so ends the session for every copy of the cookie and in every process. It also ends after a
while without use, at the latest a working day after the sign-in, and with its token.

A browser sends cookies with every request that any page makes it send. A request that changes
something therefore has to come from one of our own pages, and to carry the session's CSRF token,
which only such a page can read.
"""

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

from starlette.types import Scope

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.settings.tokens import Token, Tokens
from tracker.store.engine import Database
from tracker.store.queries import audit as store
from tracker.store.queries.audit import SessionRow
from tracker.web.http.request import (
    SAFE_METHODS,
    header,
    header_values,
    is_https,
    is_same_origin,
    prefix_of,
)

LASTS: Final = timedelta(hours=12)
"""Longest duration of a session: a working day."""
IDLE: Final = timedelta(hours=2)
"""Longest duration without use."""
CSRF_HEADER: Final = "x-csrf-token"
CSRF_FIELD: Final = "csrf_token"

_RECORD_USE: Final = timedelta(minutes=1)
"""How often the use of a session is stored."""
_NAME: Final = "tracker_session"
_COOKIE_FORM: Final = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A signed-in browser, its token, and the CSRF token of its requests that change something."""

    session_id: str
    token: Token
    csrf: str = field(repr=False)

    def matches(self, csrf: str | None) -> bool:
        """Whether `csrf` is this session's CSRF token, compared in constant time."""
        return csrf is not None and hmac.compare_digest(self.csrf.encode(), csrf.encode())


@dataclass(eq=False)
class Sessions:
    """Starts, finds and ends sessions. `tokens` returns the current ones; `public_url` is
    `TRACKER_PUBLIC_URL`."""

    database: Database
    tokens: Callable[[], Tokens]
    public_url: str | None
    clock: Clock

    def __post_init__(self) -> None:
        self._digests: dict[str, str] = {}
        public = urlsplit(self.public_url or "")
        self._secure_host = public.netloc.lower() if public.scheme == "https" else None

    async def start(self, scope: Scope, token: Token) -> str:
        """The `Set-Cookie` of a new session. Raises `StoreUnavailable`."""
        cookie = secrets.token_urlsafe(32)
        now = self.clock()
        secure = self._is_secure(scope)
        row = SessionRow(
            session_id=_id_of(cookie),
            token_name=token.name,
            token_digest=await self._digest(token),
            secure=secure,
            started_at=now,
            last_used_at=now,
        )
        await store.begin_session(self.database, row, idle=IDLE, lasts=LASTS)
        return _set_cookie(scope, cookie, LASTS, secure=secure)

    async def end(self, scope: Scope, session: Session | None) -> str:
        """End a session; the `Set-Cookie` that makes the browser forget it.

        Raises `StoreUnavailable`.
        """
        if session is not None:
            await store.end_session(self.database, session.session_id, now=self.clock())
        return _set_cookie(scope, "", timedelta(0), secure=self._is_secure(scope))

    async def of(self, scope: Scope) -> Session | None:
        """The valid session of the request's cookie, if any. Raises `StoreUnavailable`."""
        secure = self._is_secure(scope)
        cookie = _cookie(scope, _name(scope, secure=secure))
        if cookie is None or not _COOKIE_FORM.fullmatch(cookie):
            return None
        session_id = _id_of(cookie)
        row = await store.find_session(self.database, session_id)
        if row is None or row.secure != secure:
            return None
        token = await self._token_of(row)
        if token is None:
            return None
        now = self.clock()
        if now - row.last_used_at >= _RECORD_USE:
            with suppress(StoreError):  # a read-only database still serves reads
                await store.use_session(self.database, session_id, now=now)
        return Session(session_id=session_id, token=token, csrf=_csrf_of(cookie))

    async def token_of(self, session: Session) -> Token | None:
        """The token of a session as it is now, if both are still valid. Raises
        `StoreUnavailable`."""
        row = await store.find_session(self.database, session.session_id)
        return None if row is None else await self._token_of(row)

    def is_same_origin(self, scope: Scope) -> bool:
        """Whether a request comes from one of our own pages, or from no page at all."""
        return is_same_origin(scope, also=self._secure_host)

    def may_send(self, scope: Scope, session: Session) -> bool:
        """Whether this request changes nothing, or comes from one of our own pages.

        Outside `/api` the CSRF token may be a field of a form, which the pages check themselves.
        """
        if scope["method"] in SAFE_METHODS:
            return True
        if not self.is_same_origin(scope):
            return False
        if not scope["path"].startswith("/api"):
            return True
        csrf = header(scope, CSRF_HEADER.encode())
        return session.matches(None if csrf is None else csrf.decode("latin-1"))

    async def _token_of(self, row: SessionRow) -> Token | None:
        now = self.clock()
        # A time that is still to come is of a clock that was set back since.
        if abs(now - row.started_at) >= LASTS or abs(now - row.last_used_at) >= IDLE:
            return None
        for token in self.tokens():
            if await self._digest(token) == row.token_digest:
                return None if token.expired(now) else token
        return None

    async def _digest(self, token: Token) -> str:
        """The stored digest of a token. Slow on purpose, against guesses from a stolen table, and
        therefore cached."""
        if token.value not in self._digests:
            digest = await asyncio.to_thread(
                hashlib.scrypt, token.value.encode(), salt=b"tracker session", n=2**14, r=8, p=1
            )
            self._digests[token.value] = digest.hex()
        return self._digests[token.value]

    def _is_secure(self, scope: Scope) -> bool:
        """Whether the browser uses https.

        Some proxies do not say so; then a cookie that only https can set, or the host of an https
        `TRACKER_PUBLIC_URL`, does.
        """
        if is_https(scope) or _cookie(scope, _name(scope, secure=True)) is not None:
            return True
        host = header(scope, b"host")
        return self._secure_host is not None and (
            host is not None and host.lower() == self._secure_host.encode("latin-1")
        )


def _id_of(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()


def _csrf_of(cookie: str) -> str:
    digest = hmac.digest(cookie.encode(), b"csrf", "sha256")
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _name(scope: Scope, *, secure: bool) -> str:
    """The cookie's name; with https one that no http page can set, and, unless the application is
    mounted, no other host. A mounted one has a name and a path of its own."""
    prefix = prefix_of(scope)
    name = _NAME + re.sub(r"[^A-Za-z0-9]", "-", prefix)
    return f"{'__Secure-' if prefix else '__Host-'}{name}" if secure else name


def _set_cookie(scope: Scope, value: str, lasts: timedelta, *, secure: bool) -> str:
    parts = [
        f"{_name(scope, secure=secure)}={value}",
        f"Max-Age={int(lasts.total_seconds())}",
        f"Path={prefix_of(scope) or '/'}",
        "HttpOnly",
        "SameSite=Lax",
    ]
    return "; ".join([*parts, "Secure"] if secure else parts)


def _cookie(scope: Scope, name: str) -> str | None:
    """The cookie of that name; `None` if there is none, or more than one."""
    found = []
    for value in header_values(scope, b"cookie"):
        for part in value.decode("latin-1").split(";"):
            key, equals, text = part.strip().partition("=")
            if equals and key == name:
                found.append(text)
    return found[0] if len(found) == 1 else None
