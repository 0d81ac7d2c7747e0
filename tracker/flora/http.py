"""What HTTP clients of the tracker share: the waits that answers ask for, what they refuse, and how
they are replaced."""

import asyncio
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar
from typing import Final

import httpx

CONNECTION_ERRORS: Final = (httpx.TransportError, ssl.SSLError)
"""What httpx raises where no answer comes, or only a part of it. It does not translate that a TLS
record is damaged."""
LONGEST_WAIT: Final = 60.0
"""The longest wait, in seconds, that an answer can impose."""
_NUMBER: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")


def retry_after_of(
    headers: Mapping[str, str], *, now: datetime, longest: float = LONGEST_WAIT
) -> float | None:
    """The wait that an answer asks for, at most `longest` seconds; `None` without one.

    `retry-after-ms` precedes `retry-after`, which is in seconds or a date. A date is measured from
    the answer's own `date`, so that our clock (`now`, UTC) does not matter.
    """
    milliseconds = headers.get("retry-after-ms", "")
    if _NUMBER.fullmatch(milliseconds):
        return min(float(milliseconds) / 1000, longest)
    asked = headers.get("retry-after", "")
    if _NUMBER.fullmatch(asked):
        return min(float(asked), longest)
    when = http_date(asked)
    if when is None:
        return None
    seconds = (when - (http_date(headers.get("date", "")) or now)).total_seconds()
    return min(max(seconds, 0.0), longest)


def http_date(text: str) -> datetime | None:
    """An HTTP date as aware UTC; `None` if it is none."""
    try:
        parsed = parsedate_to_datetime(text)
        return parsed.replace(tzinfo=parsed.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


# A body that is compressed twice, or with a newer method, can expand from kilobytes to gigabytes
# before anything counts it. One layer of these expands a thousandfold at most.
_BOUNDED: Final = frozenset({"", "identity", "gzip", "deflate"})


def is_bounded(content_encoding: str | None) -> bool:
    """Whether a body with this `Content-Encoding` (`None` for none) may be decompressed."""
    return (content_encoding or "").strip().lower() in _BOUNDED


class NoCookies(CookieJar):
    """The jar of an HTTP client that keeps no cookies.

    httpx keeps what any server sets for as long as the client lives, without limit, and sends all
    of it with every request: a few hundred answers would fill the memory.
    """

    def extract_cookies(self, response: object, request: object) -> None:
        """Keep nothing of the response."""


class ReplaceableClient:
    """A client of httpx, which is replaced when a request is cancelled.

    At many moments of a request, httpcore then keeps its connection open and counts it as busy for
    ever (https://github.com/encode/httpcore/issues/1093). `new` makes a client; the `current` one
    is for new requests. One that was replaced is closed when its last request ends. With
    `is_fixed`, as for a transport that all clients share, none is replaced.
    """

    def __init__(self, new: Callable[[], httpx.AsyncClient], *, is_fixed: bool = False) -> None:
        self.current = new()
        self._new = new
        self._is_fixed = is_fixed
        self._requests = Counter[httpx.AsyncClient]()
        """How many requests each client is sending."""

    @asynccontextmanager
    async def for_request(self) -> AsyncIterator[httpx.AsyncClient]:
        """The client for one request."""
        http = self.current
        self._requests[http] += 1
        try:
            yield http
        except asyncio.CancelledError:
            if not self._is_fixed and http is self.current and not http.is_closed:
                self.current = self._new()
                self.current.headers, self.current.event_hooks = http.headers, http.event_hooks
            raise
        finally:
            self._requests[http] -= 1
            if not self._requests[http]:
                del self._requests[http]
                if http is not self.current:
                    # Also if the caller is cancelled again: the rest would stay open.
                    await asyncio.shield(http.aclose())

    async def aclose(self) -> None:
        """Close all connections, those of requests under way too."""
        # The present one first: it is not replaced any more.
        for http in (self.current, *self._requests):
            await http.aclose()
