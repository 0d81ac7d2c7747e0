"""What browsers send: form fields within bounds, and whether a page of ours sent them."""

import asyncio
from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import Request

from tracker.web.auth import session_of
from tracker.web.http.body import read_body
from tracker.web.http.errors import Fault
from tracker.web.sessions import CSRF_FIELD, CSRF_HEADER

LONGEST_FORM: Final = 16 * 1024
"""Bytes of a form: all of ours have a field or two."""
READ_SECONDS: Final = 10.0


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form, the last of each name. Raises `Fault` 400, 408 and 413."""
    deadline = asyncio.get_running_loop().time() + READ_SECONDS
    body = await read_body(request.scope, request.receive, limit=LONGEST_FORM, deadline=deadline)
    try:
        return dict(
            parse_qsl(
                body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=20
            )
        )
    except ValueError:
        raise Fault(400, "invalid_form", "The form could not be read.") from None


async def check_action(request: Request) -> None:
    """Raise `Fault` 403 for what changes something and does not come from a page of ours.

    The gate has looked where it comes from. A session's token has to be shown besides, in a header
    or in a field; a request that came in by the bearer token, or on this machine where there is no
    token at all, has none to show.
    """
    session = session_of(request.scope)
    if session is None:
        return
    shown = request.headers.get(CSRF_HEADER)
    if shown is None:
        shown = (await read_form(request)).get(CSRF_FIELD)
    if not session.shown(shown):
        raise Fault(
            403,
            "forbidden",
            "This page was open for too long, or another page sent this. Go back, load the page "
            "again, and try once more.",
        )


def given(request: Request, name: str) -> str | None:
    """A field of the query without spaces around it; `None` where it is empty or not given."""
    return request.query_params.get(name, "").replace("\0", "").strip()[:512] or None
