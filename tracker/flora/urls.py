"""The URLs of FLORA, which alone get the API key."""

from urllib.parse import quote

import httpx

from tracker.core.errors import FloraError, FloraUnreadable, NotFound, SettingsError
from tracker.core.net import is_loopback
from tracker.flora.parse import LONGEST_ID


class PollUrlRefused(FloraError):
    """A `poll_url` leads away from the configured FLORA; the key is not sent there."""


class FloraUrls:
    """The URLs to which the API key may be sent: those below one base URL.

    Raises `SettingsError` for a base URL that is not `https` (`http` only on this machine itself),
    or that holds more than an origin and a path.
    """

    def __init__(self, base_url: str) -> None:
        try:
            self.base = httpx.URL(base_url.strip().rstrip("/"))
        except (httpx.InvalidURL, ValueError) as exc:
            raise SettingsError("FLORA_BASE_URL is not a URL") from exc
        self.on_loopback = is_loopback(self.base.raw_host.decode())
        """Whether FLORA is on this machine, a simulator."""
        secure = self.base.scheme == "https" or (self.base.scheme == "http" and self.on_loopback)
        if not secure or not self.base.raw_host:
            raise SettingsError("FLORA_BASE_URL must be https (http only for a loopback host)")
        if self.base.userinfo or self.base.query or self.base.fragment:
            raise SettingsError("FLORA_BASE_URL must have no user, query or fragment in it")

    def of(self, *segments: str, **params: str | int | None) -> httpx.URL:
        """The URL of a path below the base; a parameter that is `None` is left out.

        Raises `NotFound` for a segment that can be no id, `FloraUnreadable` for a cursor that is
        too long.
        """
        path = "/".join(_segment(segment) for segment in segments)
        query = {name: value for name, value in params.items() if value is not None}
        try:
            return httpx.URL(f"{self.base}/{path}").copy_merge_params(query)
        except httpx.InvalidURL as exc:
            raise FloraUnreadable("FLORA's cursor is too long to be sent back") from exc

    def follow(self, poll_url: str) -> httpx.URL:
        """The URL of a `poll_url`. Raises `PollUrlRefused` if it is on another origin.

        The parser that checks it is the one that the request uses.
        """
        try:
            url = self.base.join(poll_url).copy_with(fragment=None)
        except (httpx.InvalidURL, ValueError) as exc:
            raise PollUrlRefused("the poll_url is not a URL, so it is not followed") from exc
        if _origin(url) != _origin(self.base) or url.userinfo:
            raise PollUrlRefused("the poll_url is not below FLORA_BASE_URL's origin: not followed")
        return url


def _origin(url: httpx.URL) -> tuple[str, bytes, int | None]:
    return (url.scheme, url.raw_host, url.port)


def _segment(value: str) -> str:
    """One segment of a path, which it cannot leave. Nothing is sent for what can be no id."""
    if value in ("", ".", "..") or len(value) > LONGEST_ID:
        raise NotFound(status=404, code="not_found", message=f"{value[:80]!r} can be no id")
    return quote(value, safe="", errors="replace")
