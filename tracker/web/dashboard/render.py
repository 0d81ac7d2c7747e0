"""Templates become answers here, each with the headers that keep a page to what it is.

Every value is escaped as it is put in, whichever file the template is. No page has a script or a
style in itself, so the content policy needs no exception. No page is larger than `PAGE_BYTES`,
however much text other people put into a run: long values are cut, and then all that is longer than
a word.
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from tracker import __version__
from tracker.core.clock import Clock
from tracker.core.tokens import Scope
from tracker.web.auth import may, session_of
from tracker.web.dashboard.assets import Assets
from tracker.web.dashboard.outputs import Gallery
from tracker.web.dashboard.words import FILTERS
from tracker.web.http.errors import Fault

PLACES: Final = (
    ("/", "Overview"),
    ("/runs", "Runs"),
    ("/deliveries", "Deliveries"),
    ("/techniques", "Techniques"),
    ("/batches", "Batches"),
    ("/starts", "Starts"),
    ("/spending", "Spending"),
    ("/sweeps", "Sweeps"),
)
"""What the navigation leads to."""
FOR_ADMINS: Final = ("/audit", "Audit")
"""What else it leads to, for who may administer."""
PAGE_BYTES: Final = 2_000_000
LONGEST: Final = 32 * 1024
"""Characters of one value. Escaping makes five of some."""
_ALL_LONG: Final = 256 * 1024
"""Characters of all values of a page that are longer than `_SHORT`."""
_SHORT: Final = 100


class Renderer:
    """Makes pages."""

    def __init__(self, assets: Assets, gallery: Gallery, *, clock: Clock) -> None:
        self._clock = clock
        self._left = 0
        """Characters of long values that the page being made may still show."""
        self._headers = {
            "Content-Security-Policy": _policy(gallery.plain_origin),
            "Cache-Control": "no-store",
            "Cross-Origin-Opener-Policy": "same-origin",
            # Nothing to other hosts. (With no-referrer a form of ours would come from "null".)
            "Referrer-Policy": "same-origin",
            "X-Frame-Options": "DENY",
        }
        self._environment = Environment(
            loader=PackageLoader("tracker.web.dashboard", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=self._cut,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals.update(asset=assets.url, version=__version__, query=query)
        self._environment.filters.update(FILTERS, segment=lambda text: quote(text, safe=""))

    def page(
        self,
        request: Request,
        template: str,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **values: Any,
    ) -> Response:
        """A page as the answer to a request. Raises `Fault` where it would be too large."""
        session = session_of(request.scope)
        may_administer = may(request.scope, Scope.ADMIN)
        self._left = _ALL_LONG
        parts = self._environment.get_template(template).generate(
            now=self._clock(),
            path=request.url.path,
            csrf=session.csrf if session else "",
            signed_in=session.token.name if session else None,
            may_start=may(request.scope, Scope.START),
            may_administer=may_administer,
            places=(*PLACES, FOR_ADMINS) if may_administer else PLACES,
            **values,
        )
        content = bytearray()
        for part in parts:
            content += part.encode(errors="replace")
            if len(content) > PAGE_BYTES:
                raise Fault(500, "page_too_large", "This page is too large to show: use the API.")
        return Response(
            bytes(content),
            status_code=status,
            media_type="text/html",
            headers={**self._headers, **(headers or {})},
        )

    def _cut(self, value: Any) -> Any:
        """A value as it is put into a page."""
        if type(value) is not str or len(value) <= _SHORT:
            return value
        room = min(LONGEST, max(_SHORT, self._left))
        self._left -= min(len(value), room)
        if len(value) <= room:
            return value
        return f"{value[:room]}… ({len(value):,} characters, cut here)"


def query(path: str, **values: str | None) -> str:
    """`path` with those of the values that are given as its query."""
    pairs = [f"{name}={quote(value, safe='')}" for name, value in values.items() if value]
    return f"{path}?{'&'.join(pairs)}" if pairs else path


def _policy(plain_origin: str | None) -> str:
    """Everything comes from here; media from any https address, or from a local FLORA."""
    plain = f" {plain_origin}" if plain_origin else ""
    return "; ".join(
        (
            "default-src 'self'",
            f"img-src 'self' https: data:{plain}",
            f"media-src https:{plain}",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )
