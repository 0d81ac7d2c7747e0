"""Renders templates to answers, with the security headers of a page, and serves static files.

Every value is escaped. Characters that turn the direction of a text are shown as escapes, except in
what a form or a script sends back (`exact`). No page contains an inline script or style, so the
content security policy needs no exception. No page is larger than `PAGE_BYTES`, however long other
people's texts are: long values are cut.
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response

from tracker import __version__
from tracker.core.formatting import (
    UNKNOWN,
    clean,
    counted,
    duration,
    moment,
    money,
    number,
    percent,
    size,
    unturned,
)
from tracker.services import Services
from tracker.settings.tokens import Scope
from tracker.views import plain_http_origin
from tracker.web.auth import ScopedRoute, may, session_of
from tracker.web.http.request import prefix_of
from tracker.web.http.responses import Fault, not_found


class NavLink(NamedTuple):
    """A link of the navigation: where it leads, its name, and its icon on a phone. The pages below
    `also` belong to it too."""

    path: str
    name: str
    icon: str
    scope: Scope = Scope.READ
    also: str | None = None

    def leads_to(self, path: str) -> bool:
        return _is_below(path, self.path) or (self.also is not None and _is_below(path, self.also))


NAVIGATION: Final = (
    NavLink("/", "Overview", "overview"),
    NavLink("/runs", "Runs", "start"),
    NavLink("/batches", "Batches", "batches"),
    NavLink("/deliveries", "Deliveries", "callback"),
)
"""The pages that a phone shows in its bar."""
MORE: Final = (
    NavLink("/techniques", "Techniques", "document"),
    NavLink("/spending", "Spending", "money"),
    NavLink("/starts", "Starts", "track"),
    NavLink("/endpoints", "Webhooks", "link", also="/messages"),
    NavLink("/health", "Health", "ok"),
    NavLink("/audit", "Audit", "history", Scope.ADMIN),
)
"""The other pages; a phone shows them under More."""
IMMUTABLE: Final = "public, max-age=31536000, immutable"
_LINKS: Final = re.compile(
    rb'(\s(?:href|src|action|formaction|hx-get|hx-post|data-stream)=")(?=/(?!/))'
)
"""The attributes of our pages that hold a path. Values are escaped: a quotation mark before a path
is always one of a template."""
_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""What is served; other files (licences) are not."""
PAGE_BYTES: Final = 2_000_000
MAX_VALUE: Final = 32 * 1024
"""Characters of one value. Escaping makes five of some."""
MAX_LONG_VALUES: Final = 256 * 1024
"""Characters of all values of a page that are longer than `SHORT_VALUE`."""
SHORT_VALUE: Final = 100
PROMPT: Final = 120
"""Characters of a run's input in a list."""
MAX_FORMATTED: Final = 16 * 1024
"""Bytes of JSON that is indented: indentation multiplies it."""
_TIME_IN_TEXT: Final = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)? UTC)", re.ASCII)
MAX_DEPTH: Final = 32
"""Nesting of JSON that is indented."""


class Assets:
    """The files below /static: cached for good, under an address that changes with their content.

    One hash covers all files, so that a module which imports another by a relative address gets the
    version that belongs to it.
    """

    def __init__(self) -> None:
        root = Path(__file__).parent / "static"
        self._files = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.suffix in _TYPES
        }
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        self._hash = digest.hexdigest()[:16]

    def url(self, name: str) -> str:
        """The address of a file, for a template. Raises `KeyError` for an unknown one."""
        _ = self._files[name]
        return f"/static/{self._hash}/{name}"

    def route(self) -> ScopedRoute:
        return ScopedRoute("/static/{hash}/{name:path}", self._serve, {"GET": Scope.READ})

    async def _serve(self, request: Request) -> Response:
        """A file. Under the hash of another version it is not cached."""
        name = request.path_params["name"]
        content = self._files.get(name)
        if content is None:
            raise not_found("There is no such file.")
        current = request.path_params["hash"] == self._hash
        return Response(
            content,
            media_type=_TYPES[PurePath(name).suffix],
            headers={"Cache-Control": IMMUTABLE if current else "no-cache"},
        )


@cache
def _assets() -> Assets:
    return Assets()


class Renderer:
    """Renders pages. `media_origin` may serve images by plain http, besides every https origin."""

    def __init__(self, services: Services) -> None:
        self.assets = _assets()
        self.media_origin = plain_http_origin(services.settings.flora_base_url)
        self._clock = services.clock
        self._left = 0
        """Characters of long values that the present page may still show."""
        self._headers = {
            "Content-Security-Policy": _content_security_policy(self.media_origin),
            "Cross-Origin-Opener-Policy": "same-origin",
            # Nothing to other hosts. (With no-referrer our own forms would come from "null".)
            "Referrer-Policy": "same-origin",
            "X-Frame-Options": "DENY",
        }
        self._environment = Environment(
            loader=PackageLoader("tracker.web.dashboard", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=self._shown,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        docs_url = services.settings.tracker_docs_url or ""  # else the runbook is read here
        self._environment.globals.update(
            asset=self.assets.url,
            version=__version__,
            query=query,
            counted=counted,
            runbook=lambda section: f"{docs_url}/runbook.html#{section}",
        )
        self._environment.filters.update(
            time=time,
            sentence=lambda text: sentence(self._shown(text)),
            exact=lambda text: escape(self._cut(text)),
            money=money,
            number=number,
            percent=percent,
            duration=duration,
            size=size,
            indented_json=indented_json,
            indented=indented,
            prompt=prompt,
            raw=lambda body: body.decode(errors="replace"),
            segment=lambda text: quote(text, safe=""),
        )

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
        path, scope = request.url.path, request.scope
        links = (*NAVIGATION, *MORE)
        here = next((one.path for one in links if one.leads_to(path)), None)
        self._left = MAX_LONG_VALUES
        parts = self._environment.get_template(template).generate(
            now=self._clock(),
            here=here,
            filters_are_set=any(
                value for name, value in request.query_params.items() if name != "cursor"
            ),
            csrf=session.csrf if session else "",
            signed_in=session.token.name if session else None,
            may_start=may(scope, Scope.START),
            may_administer=may(scope, Scope.ADMIN),
            navigation=NAVIGATION,
            more=[link for link in MORE if may(scope, link.scope)],
            **values,
        )
        content = bytearray()
        for part in parts:
            content += part.encode(errors="replace")
            if len(content) > PAGE_BYTES:
                raise Fault(500, "page_too_large", "This page is too large: use the API instead.")
        page = bytes(content)
        if prefix := prefix_of(scope):
            page = _LINKS.sub(rb"\1" + prefix.encode(), page)
        return Response(
            page,
            status_code=status,
            media_type="text/html",
            headers={**self._headers, **(headers or {})},
        )

    def _shown(self, value: Any) -> Any:
        """A value as it is inserted into a page."""
        return unturned(self._cut(value)) if type(value) is str else value

    def _cut(self, value: Any) -> Any:
        """A value, or its beginning where it is too long for this page."""
        if type(value) is not str or len(value) <= SHORT_VALUE:
            return value
        allowed = min(MAX_VALUE, max(SHORT_VALUE, self._left))
        self._left -= min(len(value), allowed)
        if len(value) <= allowed:
            return value
        return f"{value[:allowed]}… ({len(value):,} characters, cut here)"


def _is_below(path: str, page: str) -> bool:
    return path == page or (page != "/" and path.startswith(f"{page}/"))


def query(path: str, **values: str | None) -> str:
    """`path` with the values that are not empty as its query."""
    pairs = [f"{name}={quote(value, safe='')}" for name, value in values.items() if value]
    return f"{path}?{'&'.join(pairs)}" if pairs else path


def time(at: datetime | None, style: str = "ago") -> Markup:
    """A `<time>` in UTC, which a script shows in the viewer's time zone.

    `style` is "ago" (how long since, or until), "clock" (to the second) or "minute", for sentences.
    """
    if at is None:
        return Markup('<span class="unknown">{}</span>').format(UNKNOWN)
    at = at.astimezone(UTC)
    return Markup('<time datetime="{}" title="{}" data-style="{}">{}</time>').format(
        at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d} UTC",
        style,
        moment(at),
    )


def sentence(text: str) -> Markup:
    """A text with the times in it, such as `2026-11-28 03:20:00 UTC`, as `time` shows them."""
    between = _TIME_IN_TEXT.split(text)
    for position in range(1, len(between), 2):
        try:
            at = datetime.fromisoformat(between[position].replace(" UTC", "Z"))
        except ValueError:
            continue
        between[position] = time(at, "clock")
    return Markup().join(between)


def prompt(inputs: list[dict[str, Any]] | None) -> str:
    """What a run was asked for, in short: its first text, or else its first input."""
    values = [(one.get("type"), str(one.get("value", ""))) for one in inputs or ()]
    texts = [value for kind, value in values if kind == "text"] or [value for _, value in values]
    return textwrap.shorten(texts[0][: 4 * PROMPT], PROMPT, placeholder="…") if texts else ""


def indented_json(body: bytes) -> str | None:
    """A JSON body, indented; `None` where it is no JSON, too large or nested too deeply."""
    if len(body) > MAX_FORMATTED:
        return None
    try:
        value = json.loads(body)
        if _is_deeper(value, MAX_DEPTH):
            return None
        return clean(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return None


def indented(value: Any) -> str:
    """A value as JSON: indented, or on one line where it is too large or nested too deeply."""
    line = json.dumps(value, ensure_ascii=False, default=str)
    if len(line) > MAX_FORMATTED or _is_deeper(value, MAX_DEPTH):
        return line
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether more than `depth` lists and objects are nested."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(one, depth - 1) for one in inner)


def _content_security_policy(media_origin: str | None) -> str:
    """Everything comes from here; media from any https address, or from a local FLORA."""
    media = f" {media_origin}" if media_origin else ""
    return "; ".join(
        (
            "default-src 'self'",
            f"img-src 'self' https: data:{media}",
            f"media-src https:{media}",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )
