"""Signed-in browsers: what the cookie holds, whom it lets in, and what keeps other pages out.

A session is a row of the database, found by the digest of a random cookie. Signing out removes the
row, and so ends the session for every copy of the cookie and in every process. It also ends after a
while without use, at the latest a working day after the sign-in, and with the token that was shown.

A browser sends cookies with whatever any page makes it send. So what changes something needs more:
it has to come from a page of our own, and to show the session's CSRF token, which only such a page
can read.
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
from tracker.core.tokens import Token, Tokens
from tracker.store.engine import Database
from tracker.store.queries import sessions as store
from tracker.store.queries.sessions import SessionRow
from tracker.web.http.origin import SAFE, came_by_https, from_own_page, header_of

LASTS: Final = timedelta(hours=12)
"""How long a sign-in holds at most: a working day."""
IDLE: Final = timedelta(hours=2)
"""How long it holds without being used."""
CSRF_HEADER: Final = "x-csrf-token"
CSRF_FIELD: Final = "csrf_token"

_NOTE_USE: Final = timedelta(minutes=1)
"""How often the use of a session is written down."""
_NAME: Final = "tracker_session"
_SECURE_NAME: Final = f"__Host-{_NAME}"
_COOKIE: Final = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A signed-in browser, and the token that it signed in with.

    `csrf` is what its requests show when they change something.
    """

    session_id: str
    token: Token
    csrf: str = field(repr=False)

    def shown(self, csrf: str | None) -> bool:
        """Whether `csrf` is this session's, compared in constant time."""
        return csrf is not None and hmac.compare_digest(self.csrf.encode(), csrf.encode())


class Sessions:
    """Begins, finds and ends sessions. `tokens` are those in force; `public_url` is where browsers
    reach us, if that is set."""

    def __init__(
        self,
        database: Database,
        *,
        tokens: Callable[[], Tokens],
        public_url: str | None,
        clock: Clock,
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._clock = clock
        self._digests: dict[str, str] = {}
        public = urlsplit(public_url) if public_url else None
        self._secure_host = public.netloc.lower() if public and public.scheme == "https" else None

    async def begin(self, scope: Scope, token: Token) -> str:
        """The `Set-Cookie` of a new session. Raises `StoreUnavailable`."""
        cookie = secrets.token_urlsafe(32)
        now = self._clock()
        secure = self._is_secure(scope)
        row = SessionRow(
            session_id=_id_of(cookie),
            token_name=token.name,
            token_digest=await self._digest(token),
            secure=secure,
            started_at=now,
            last_used_at=now,
        )
        await store.begin(self._database, row, idle=IDLE, lasts=LASTS)
        return _set_cookie(cookie, LASTS, secure=secure)

    async def end(self, scope: Scope, session: Session | None) -> str:
        """End a session; the `Set-Cookie` that makes the browser forget it.

        Raises `StoreUnavailable`.
        """
        if session is not None:
            await store.end(self._database, session.session_id, now=self._clock())
        return _set_cookie("", timedelta(0), secure=self._is_secure(scope))

    async def of(self, scope: Scope) -> Session | None:
        """The session whose cookie the request carries, as long as it holds.

        Raises `StoreUnavailable`.
        """
        secure = self._is_secure(scope)
        cookie = _cookie(scope, _SECURE_NAME if secure else _NAME)
        if cookie is None or not _COOKIE.fullmatch(cookie):
            return None
        return await self._find(_id_of(cookie), cookie, secure=secure)

    async def holds(self, session: Session) -> bool:
        """Whether a session that held before still does. Raises `StoreUnavailable`."""
        row = await store.find(self._database, session.session_id)
        return row is not None and await self._token_of(row) is not None

    def is_own(self, scope: Scope) -> bool:
        """Whether a request comes from a page of our own, or from no page at all."""
        return from_own_page(scope, also=self._secure_host)

    def may_send(self, scope: Scope, session: Session) -> bool:
        """Whether this request is one that our own pages make, where it changes something.

        Pages carry the CSRF token in a field of their form, which they check themselves.
        """
        if scope["method"] in SAFE:
            return True
        if not self.is_own(scope):
            return False
        if not scope["path"].startswith("/api"):
            return True
        shown = header_of(scope, CSRF_HEADER.encode())
        return session.shown(None if shown is None else shown.decode("latin-1"))

    async def _find(self, session_id: str, cookie: str, *, secure: bool) -> Session | None:
        row = await store.find(self._database, session_id)
        if row is None or row.secure != secure:
            return None
        token = await self._token_of(row)
        if token is None:
            return None
        now = self._clock()
        if now - row.last_used_at >= _NOTE_USE:
            with suppress(StoreError):  # who only reads is served by a database that only reads
                await store.use(self._database, session_id, now=now)
        return Session(session_id=session_id, token=token, csrf=_csrf_of(cookie))

    async def _token_of(self, row: SessionRow) -> Token | None:
        """The token that a session began with, while both it and the session hold."""
        now = self._clock()
        if now - row.started_at >= LASTS or now - row.last_used_at >= IDLE:
            return None
        for token in self._tokens():
            if await self._digest(token) == row.token_digest:
                return None if token.expired(now) else token
        return None

    async def _digest(self, token: Token) -> str:
        """What a row keeps of a token. Slow on purpose, and made once: who reads the table must not
        try tokens quickly."""
        if token.value not in self._digests:
            digest = await asyncio.to_thread(
                hashlib.scrypt, token.value.encode(), salt=b"tracker session", n=2**14, r=8, p=1
            )
            self._digests[token.value] = digest.hex()
        return self._digests[token.value]

    def _is_secure(self, scope: Scope) -> bool:
        """Whether the browser came over https.

        Some proxies do not say so. A cookie that only https can set tells it, and so does the host
        of an https `TRACKER_PUBLIC_URL`.
        """
        if came_by_https(scope) or _cookie(scope, _SECURE_NAME) is not None:
            return True
        host = header_of(scope, b"host")
        return self._secure_host is not None and (
            host is not None and host.lower() == self._secure_host.encode("latin-1")
        )


def _id_of(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()


def _csrf_of(cookie: str) -> str:
    digest = hmac.digest(cookie.encode(), b"csrf", "sha256")
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _set_cookie(value: str, lasts: timedelta, *, secure: bool) -> str:
    """Over https under a name that no other host and no http page can set."""
    parts = [
        f"{_SECURE_NAME if secure else _NAME}={value}",
        f"Max-Age={int(lasts.total_seconds())}",
        "Path=/",
        "HttpOnly",
        "SameSite=Lax",
    ]
    return "; ".join([*parts, "Secure"] if secure else parts)


def _cookie(scope: Scope, name: str) -> str | None:
    """The cookie of that name; `None` where there is none, or more than one."""
    found = []
    for key, value in scope["headers"]:
        if key != b"cookie":
            continue
        for part in value.decode("latin-1").split(";"):
            given, equals, text = part.strip().partition("=")
            if equals and given == name:
                found.append(text)
    return found[0] if len(found) == 1 else None
