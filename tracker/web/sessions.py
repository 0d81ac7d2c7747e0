"""Signed-in browsers: what the cookie holds, whom it lets in, and what keeps other pages out.

A session is not kept anywhere. Its cookie is a random number and the time of the sign-in, signed
with a key that is made of the token, so every process that has the token knows it, and changing the
token ends all sessions. Each sign-in makes a new one.

A browser sends cookies with whatever any page makes it send. So what changes something needs more:
it has to come from a page of our own, and to show the session's CSRF token, which only such a page
can read.
"""

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

from starlette.types import Scope

from tracker.core.clock import Clock
from tracker.web.auth import SAFE, from_own_page, header_of

LASTS: Final = timedelta(hours=12)
"""How long a sign-in holds: a working day."""
CSRF_HEADER: Final = "x-csrf-token"
CSRF_FIELD: Final = "csrf_token"

_NAME: Final = "tracker_session"
_SECURE_NAME: Final = f"__Host-{_NAME}"
_SKEW: Final = timedelta(minutes=1)
"""How far two processes' clocks may be apart."""
_SESSION: Final = "tracker.session"


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in browser. `csrf` is what its requests show when they change something."""

    csrf: str

    def shown(self, csrf: str | None) -> bool:
        """Whether `csrf` is this session's, compared in constant time."""
        return csrf is not None and hmac.compare_digest(self.csrf.encode(), csrf.encode())


class Sessions:
    """Makes and reads the cookies of one token. `public_url` is where browsers reach us, if set."""

    def __init__(self, token: str, *, public_url: str | None, clock: Clock) -> None:
        # Slow on purpose: whoever gets hold of a cookie must not try tokens quickly.
        self._key = hashlib.scrypt(token.encode(), salt=b"tracker session", n=2**14, r=8, p=1)
        self._clock = clock
        public = urlsplit(public_url) if public_url else None
        self._secure_host = public.netloc.lower() if public and public.scheme == "https" else None

    def begin(self, scope: Scope) -> str:
        """The `Set-Cookie` of a new session."""
        issued = int(self._clock().timestamp())
        text = f"{issued}.{secrets.token_urlsafe(18)}"
        return self._set_cookie(scope, f"{text}.{self._sign('session', text)}", LASTS)

    def end(self, scope: Scope) -> str:
        """The `Set-Cookie` that makes the browser forget its session."""
        return self._set_cookie(scope, "", timedelta(0))

    def of(self, scope: Scope) -> Session | None:
        """The session whose cookie the request carries, as long as it holds."""
        value = _cookie(scope, self._name(scope))
        text, _, signature = (value or "").rpartition(".")
        expected = self._sign("session", text)
        if not text or not hmac.compare_digest(expected.encode(), signature.encode()):
            return None
        issued = int(text.partition(".")[0])  # ours, since we signed it
        age = timedelta(seconds=self._clock().timestamp() - issued)
        if not -_SKEW <= age < LASTS:
            return None
        return Session(csrf=self._sign("csrf", text))

    def lets_in(self, scope: Scope) -> bool:
        """The gate's pass: a session; and what changes something has to show more.

        Pages carry the CSRF token in a field of their form, which they check themselves.
        """
        session = self.of(scope)
        if session is None:
            return False
        if scope["method"] not in SAFE and not self._may_change(scope, session):
            return False
        scope[_SESSION] = session
        return True

    def is_own(self, scope: Scope) -> bool:
        """Whether a request comes from a page of our own, or from no page at all."""
        return from_own_page(scope, also=self._secure_host)

    def _may_change(self, scope: Scope, session: Session) -> bool:
        if not self.is_own(scope):
            return False
        if not scope["path"].startswith("/api"):
            return True
        shown = header_of(scope, CSRF_HEADER.encode())
        return session.shown(None if shown is None else shown.decode("latin-1"))

    def _sign(self, purpose: str, text: str) -> str:
        digest = hmac.digest(self._key, f"{purpose}:{text}".encode("latin-1", "replace"), "sha256")
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def _secure(self, scope: Scope) -> bool:
        """Whether the browser came over https, be it that a proxy in front ends it.

        Some proxies ask by a name of their own. The browser tells all the same: a form that is sent
        says where its page came from, and only over https it shows a `__Host-` cookie.
        """
        if scope.get("scheme") == "https" or _cookie(scope, _SECURE_NAME) is not None:
            return True
        if self._secure_host is None:
            return False
        host, origin = (header_of(scope, name) or b"" for name in (b"host", b"origin"))
        public = self._secure_host.encode("latin-1")
        return host.lower() == public or origin.lower() == b"https://" + public

    def _name(self, scope: Scope) -> str:
        """The cookie's name; over https one that no other host and no http page can set."""
        return _SECURE_NAME if self._secure(scope) else _NAME

    def _set_cookie(self, scope: Scope, value: str, lasts: timedelta) -> str:
        parts = [
            f"{self._name(scope)}={value}",
            f"Max-Age={int(lasts.total_seconds())}",
            "Path=/",
            "HttpOnly",
            "SameSite=Lax",
        ]
        return "; ".join([*parts, "Secure"] if self._secure(scope) else parts)


def session_of(scope: Scope) -> Session | None:
    """The session that let this request in; `None` where something else did."""
    session: Session | None = scope.get(_SESSION)
    return session


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
