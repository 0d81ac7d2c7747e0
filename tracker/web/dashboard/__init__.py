"""The pages for people: what runs do now, what needs attention, and why.

    render.py     templates to answers, and the files below /static
    site.py       all routes, errors as pages, sign-in, the audit log and the runbook
    overview.py, runs.py, batch.py, webhooks.py, techniques.py and health.py
                  the pages, each with the actions on what it shows

Pages read the database and render it; an action calls a use case. A page works without its scripts:
they keep it up to date, show times in the viewer's time zone and draw the charts.

Here is what all of them have in common: how pages and actions are declared with their paths, and
how what browsers send is read: ids in paths, fields of queries and forms, and the CSRF token.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, Literal, TypeVar
from urllib.parse import parse_qsl, quote

from starlette.convertors import PathConvertor, register_url_convertor
from starlette.datastructures import ImmutableMultiDict
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tracker.core.errors import FieldFault
from tracker.services import Services
from tracker.settings.tokens import Scope
from tracker.store.engine import Database
from tracker.views import output_views
from tracker.web.auth import ScopedRoute, session_of
from tracker.web.dashboard.render import Renderer, query
from tracker.web.http import Limits
from tracker.web.http.request import read_body
from tracker.web.http.responses import Fault, forbidden, invalid, not_found
from tracker.web.sessions import CSRF_FIELD, CSRF_HEADER

T = TypeVar("T")
Handler = Callable[..., Awaitable[Response]]
Act = TypeVar("Act", bound="Callable[..., Awaitable[Response | FlashMessage]]")

_ROUTE: Final = "page_route"
"""The attribute of a handler that holds its path, the scope that each method needs, and, of an
action, the page that shows its result."""
PAGE_SIZE: Final = 50
"""Entries on one page of a list."""
MAX_FORM_BYTES: Final = 64 * 1024
MAX_FIELDS: Final = 100
READ_SECONDS: Final = 10.0
_FORM: Final = "tracker.form"
PERIODS: Final = {
    "1h": timedelta(hours=1),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
}
"""How far back lists go."""
PERIOD_NAMES: Final = {
    "1h": "Last hour",
    "24h": "Last 24 hours",
    "7d": "Last 7 days",
    "30d": "Last 30 days",
}


@dataclass(frozen=True, slots=True)
class FlashMessage:
    """The result of an action, shown above the page."""

    kind: Literal["good", "warn", "bad"]
    text: str


class _AnyId(PathConvertor):
    """`{run_id:any}`: an id may hold any character, slashes and line ends too, which Starlette's
    own `path` does not match."""

    regex = "(?s:.*)"


register_url_convertor("any", _AnyId())


def page(path: str, *, scope: Scope = Scope.READ, post: Scope | None = None) -> Callable[[T], T]:
    """Decorates what answers requests to `path`: `GET`, and `POST` if there is a scope for it."""
    return _routed(path, {"GET": scope} | ({} if post is None else {"POST": post}))


def action(
    path: str, shows: Handler | None = None, *, scope: Scope | None = Scope.ADMIN
) -> Callable[[Act], Act]:
    """Decorates what a form of a page does, by `POST`, once the CSRF token is checked.

    It returns a response, or the message with which the page `shows` is shown. Where `path` is
    below that page, `GET` leads there: so the answer can be reloaded.
    """
    is_below = shows is not None and getattr(shows, _ROUTE)[0] != path
    get: dict[str, Scope | None] = {"GET": Scope.READ} if is_below else {}
    return _routed(path, get | {"POST": scope}, shows)


def _routed(
    path: str, scopes: Mapping[str, Scope | None], *action: Handler | None
) -> Callable[[T], T]:
    def decorate(handler: T) -> T:
        setattr(handler, _ROUTE, (path, scopes, action))
        return handler

    return decorate


class PageGroup:
    """Base of the pages about one thing: what they read from, and how they are rendered. Its
    methods with `page` and `action` answer requests."""

    def __init__(self, services: Services, renderer: Renderer, limits: Limits) -> None:
        self._services = services
        self._limits = limits
        self._database = services.database
        self._render = renderer.page
        self._views = partial(output_views, media_origin=renderer.media_origin)

    def routes(self) -> list[ScopedRoute]:
        found = []
        for handler in vars(type(self)).values():
            if (route := getattr(handler, _ROUTE, None)) is not None:
                path, scopes, act = route
                endpoint = partial(self._act, handler, *act) if act else partial(handler, self)
                found.append(ScopedRoute(path, endpoint, scopes))
        return found

    async def _act(self, act: Handler, shows: Handler, request: Request) -> Response:
        if request.method != "POST":
            ids = {name: quote(value, safe="") for name, value in request.path_params.items()}
            path: str = getattr(shows, _ROUTE)[0]
            return RedirectResponse(path.replace(":any}", "}").format(**ids), status_code=303)
        await check_csrf(request)
        done: Any = await act(self, request)
        answer: Response = await shows(self, request, done) if type(done) is FlashMessage else done
        return answer

    def _list(
        self,
        request: Request,
        template: str,
        next_cursor: str | None,
        filters: Mapping[str, str | None] | None = None,
        **values: Any,
    ) -> Response:
        """A page of a list, with links to the next page, and from any other page to the first."""
        path, filters = request.url.path, filters or {}
        return self._render(
            request,
            template,
            filters=filters,
            older=query(path, **filters, cursor=next_cursor) if next_cursor else None,
            newest=query(path, **filters) if query_field(request, "cursor") else None,
            **values,
        )

    @property
    def _workspace_ids(self) -> list[str]:
        return [one.workspace_id for one in self._services.workspaces if one.workspace_id]

    async def _stored(
        self, request: Request, find: Callable[[Database, str], Awaitable[T | None]], missing: str
    ) -> T:
        """What `find` has for the id in the path. Raises `Fault` 404 with the text `missing`, in
        which `{}` stands for the id."""
        (key,) = request.path_params.values()
        found = await find(self._database, key)
        if found is None:
            raise not_found(missing.format(key[:255]))
        return found

    @property
    def _has_key(self) -> bool:
        return bool(self._services.workspaces.keyed)


def query_field(request: Request, name: str, choices: Iterable[str] | None = None) -> str | None:
    """A field of the query, stripped; `None` where it is empty or missing. Raises `Fault` 400 for
    a value that is not one of `choices`."""
    value = request.query_params.get(name, "").replace("\0", "").strip()[:512] or None
    if value is not None and choices is not None and value not in (allowed := list(choices)):
        raise invalid(FieldFault(name, f"must be one of {', '.join(allowed)}"))
    return value


def read_filters(
    request: Request, fields: Mapping[str, Iterable[str] | None]
) -> dict[str, str | None]:
    """The fields of the query by name, with the values that one may have where they are given."""
    return {name: query_field(request, name, choices) for name, choices in fields.items()}


def query_position(request: Request, name: str) -> int | None:
    """A field of the query that is a whole number. Raises `Fault` 400."""
    value = query_field(request, name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise invalid(FieldFault(name, "must be a whole number"))
    return int(value)


async def read_form(request: Request) -> ImmutableMultiDict[str, str]:
    """The fields of a form, read once. Raises `Fault` 400, 408 and 413."""
    if _FORM not in request.scope:
        body = await read_body(
            request.scope, request.receive, limit=MAX_FORM_BYTES, seconds=READ_SECONDS
        )
        try:
            fields = parse_qsl(
                body.decode("ascii"),
                keep_blank_values=True,
                errors="strict",
                max_num_fields=MAX_FIELDS,
            )
        except ValueError:
            raise Fault(400, "invalid_form", "The form could not be read.") from None
        request.scope[_FORM] = ImmutableMultiDict(fields)
    form: ImmutableMultiDict[str, str] = request.scope[_FORM]
    return form


async def check_csrf(request: Request) -> None:
    """Raise `Fault` 403 where a page of the dashboard did not send this request.

    `AuthMiddleware` has checked the origin. Within a session its token is required as well, in a
    header or a form field; a bearer token, or a local request where no token is set, needs none.
    """
    session = session_of(request.scope)
    if session is None:
        return
    shown = request.headers.get(CSRF_HEADER)
    if shown is None:
        shown = (await read_form(request)).get(CSRF_FIELD)
    if not session.matches(shown):
        raise forbidden(
            "This page is outdated, or another site sent the request. Go back, reload the page and "
            "try again."
        )


def attachment(name: str) -> dict[str, str]:
    """The header that saves a response as a file of that name."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    text = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
    return {"Content-Disposition": text}
