"""What browsers send: ids in paths, fields of queries and forms, and the CSRF token."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Final
from urllib.parse import parse_qsl

from starlette.convertors import PathConvertor, register_url_convertor
from starlette.datastructures import ImmutableMultiDict
from starlette.requests import Request

from tracker.core.errors import FieldFault
from tracker.web.auth import session_of
from tracker.web.http.request import read_body
from tracker.web.http.responses import Fault, forbidden, invalid
from tracker.web.sessions import CSRF_FIELD, CSRF_HEADER

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


class _AnyId(PathConvertor):
    """`{run_id:any}`: an id may hold any character, slashes and line ends too, which Starlette's
    own `path` does not match."""

    regex = "(?s:.*)"


register_url_convertor("any", _AnyId())


def query_field(request: Request, name: str) -> str | None:
    """A field of the query, stripped; `None` where it is empty or missing."""
    return request.query_params.get(name, "").replace("\0", "").strip()[:512] or None


def query_choice(request: Request, name: str, choices: Iterable[str]) -> str | None:
    """As `query_field`. Raises `Fault` 400 for a value that is not one of `choices`."""
    value, allowed = query_field(request, name), list(choices)
    if value is not None and value not in allowed:
        raise invalid(FieldFault(name, f"must be one of {', '.join(allowed)}"))
    return value


def read_filters(
    request: Request, fields: Mapping[str, Iterable[str] | None]
) -> dict[str, str | None]:
    """The fields of the query by name, as `query_choice` where the values that one may have are
    given."""
    return {
        name: query_field(request, name)
        if choices is None
        else query_choice(request, name, choices)
        for name, choices in fields.items()
    }


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

    The origin was checked at the gate. Within a session its token is required as well, in a header
    or a form field; a bearer token, or a local request where no token is set, needs none.
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
