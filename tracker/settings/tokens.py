"""Access tokens: who may call the API, read the metrics and sign in, and what each of them may do.

A token has a name, which stands in logs in place of it, and scopes. `TRACKER_API_TOKEN` may do
everything; `[[tokens]]` in the file that `TRACKER_CONFIG` names may do less, and may expire.
"""

import hmac
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Final

SHORTEST: Final = 16
"""Characters of the shortest token that is accepted. What keeps guessers out is the length: a right
token is never refused for other people's guesses, so that they can be slowed down, not stopped."""


class Scope(StrEnum):
    """What a token may do. `start` includes `read`, and `admin` includes all others."""

    READ = "read"
    """See runs, callbacks, techniques and batches: every `GET` of `/api` and of the dashboard."""
    METRICS = "metrics"
    """Scrape `/metrics`."""
    START = "start"
    """Start runs, which costs money; track runs, and have one read at once."""
    ADMIN = "admin"
    """Everything else that changes something, such as the replay of a callback."""


_INCLUDES: Final = {Scope.START: {Scope.READ}, Scope.ADMIN: set(Scope)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One access token. `expires` is the moment (UTC) from which on it is refused, if any."""

    name: str
    value: str = field(repr=False)
    scopes: frozenset[Scope]
    expires: datetime | None = None

    def allows(self, scope: Scope) -> bool:
        """Whether one of its scopes is, or includes, `scope`."""
        return any(scope == own or scope in _INCLUDES.get(own, ()) for own in self.scopes)

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


class Tokens:
    """All tokens that are set; empty where none is."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._all = tuple(tokens)
        # Digests are compared: of two texts that differ in length, `compare_digest` may let the
        # length be measured.
        self._digests = [(sha256(token.value.encode()).digest(), token) for token in self._all]

    def __iter__(self) -> Iterator[Token]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def find(self, shown: bytes) -> Token | None:
        """The token whose value is `shown`, expired or not. How long it takes shows nothing."""
        digest = sha256(shown).digest()
        found = None
        for expected, token in self._digests:
            if hmac.compare_digest(digest, expected):
                found = token
        return found
