"""JSON responses, responses that are always the same, and the response for each error; and the id
of a request, which each response bears.

Errors have FLORA's own shape, `{"error": {"code", "message", "fields"?}}`, so that FLORA's error to
a start can be passed on unchanged.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import ceil
from random import Random
from typing import Any, Final

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from tracker.core import errors
from tracker.core.formatting import iso_time

DEFAULT_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # For everything but pages: a browser that opens it runs and frames nothing.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),  # all but our own files is about runs, or true for a moment
)
"""The headers of every response, unless it sets its own."""
REQUEST_ID: Final = "tracker.request_id"
"""The key of a request's id in its scope."""
_REQUEST_ID_FORM: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
Answer = Callable[[bytes | None], None]
"""Completes a request with a 200 response, from its first header after the server's own on; `None`
lets the application serve the request."""
Take = Callable[[Scope, bytes, Answer], bool]
"""Takes a request whose body has arrived, without the task of an ASGI application, which would cost
a callback more than its signature; `Answer` is called later. False: the application serves it."""
RETRY_AFTER: Final = 5
"""Seconds to wait where no time is known; FLORA's documentation recommends the same."""


@cache
def _random() -> Random:
    """Created when a process first needs it; unlike `secrets` it asks the kernel only once."""
    return Random()


def assign_request_id(scope: Scope) -> str:
    """The request's id from now on: its `X-Request-Id` if that is fit for a log, else a new one."""
    request_id = None
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID_FORM.fullmatch(value):
            request_id = str(value, "ascii")
            break
    if request_id is None:
        request_id = f"{_random().getrandbits(64):016x}"
    scope[REQUEST_ID] = request_id
    return request_id


def request_id_of(scope: Scope) -> str | None:
    """A request's id, once it has one."""
    return scope.get(REQUEST_ID)


class Json(Response):
    """A JSON response."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    """`content` in one line. A lone surrogate, which UTF-8 cannot hold, becomes its escape."""
    try:
        return orjson.dumps(content)
    except TypeError:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class PrebuiltResponse:
    """A JSON response of status 200 that is encoded once, for `Answer`; `send` is the same as an
    ASGI application."""

    def __init__(self, content: Any) -> None:
        self.send = Json(content)
        headers = [*self.send.raw_headers, *DEFAULT_HEADERS]
        self._head = b"".join(b"%b: %b\r\n" % header for header in headers) + b"x-request-id: "
        self._end = b"\r\n\r\n" + self.send.body

    def encode(self, request_id: str) -> bytes:
        """The response to the request of that id, with the headers of every response."""
        return self._head + request_id.encode() + self._end


class Fault(Exception):
    """An error response, raised where the error is found and sent by `ResponseMiddleware`.

    With `linger` false the connection is closed at once, without reading the rest of a body.
    `more` are further fields beside code and message.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fields: Sequence[errors.FieldFault] = (),
        headers: Mapping[str, str] | None = None,
        linger: bool = True,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.headers = dict(headers or {})
        self.linger = linger
        self.more = dict(more or {})

    def body(self) -> dict[str, Any]:
        error: dict[str, Any] = {"code": self.code, "message": self.message, **self.more}
        if self.fields:
            error["fields"] = [one.to_json() for one in self.fields]
        return {"error": error}


def invalid(*fields: errors.FieldFault, message: str = "The request is not valid.") -> Fault:
    """400 with the invalid fields."""
    return Fault(400, "input_validation_error", message, fields=fields)


def forbidden(message: str) -> Fault:
    """403."""
    return Fault(403, "forbidden", message)


def not_found(message: str) -> Fault:
    """404."""
    return Fault(404, "not_found", message)


def unavailable(message: str, *, retry_after: float | None = None) -> Fault:
    """503 with the seconds after which a retry makes sense."""
    return Fault(503, "service_unavailable", message, headers=_retry_after(retry_after))


def to_fault(error: Exception) -> Fault | None:
    """The response for an error; `None` for an unexpected one."""
    text = str(error)
    match error:
        case Fault():
            return error
        case HTTPException():
            return _router_fault(error)
        case errors.InvalidRequest():
            return invalid(*error.fields, message=text)
        case errors.IdempotencyConflict():
            return Fault(422, "idempotency_conflict", text)
        case errors.BudgetExceeded(budget=budget, left=left, renews_at=at):
            more = {"budget": budget, "left": float(left), "renews_at": at and iso_time(at)}
            return Fault(402, "budget_exceeded", text, more=more)
        case errors.StartPending(retry_after=seconds):
            return Fault(504, "start_pending", text, headers=_retry_after(seconds))
        case errors.StartNotStored(run_id=run_id):
            headers = _retry_after(None)
            return Fault(503, "not_stored", text, headers=headers, more={"run_id": run_id})
        case errors.StartUnresolved():
            return Fault(409, "start_unresolved", text)
        case errors.StoreUnavailable() | errors.SchemaOutdated():
            return unavailable(text)
        case errors.SettingsError():
            return Fault(503, "not_configured", text)
        case errors.KeyRefused() | errors.Forbidden():
            return Fault(502, "flora_key_refused", text)
        case errors.PlanRequired():
            return Fault(402, error.code, error.message, fields=error.fields)
        case errors.RateLimited() | errors.FloraRefusal(status=503):
            return unavailable(text, retry_after=error.retry_after)
        case errors.FloraRefusal(status=400 | 402 | 404 | 422 as status):  # what was asked
            return Fault(status, error.code, error.message, fields=error.fields)
        case errors.FloraRefusal(status=504) | errors.FloraUnreachable(timed_out=True):
            return Fault(504, "flora_timeout", text)
        case errors.FloraUnreachable():
            return Fault(502, "flora_unreachable", text)
        case errors.FloraError():
            return Fault(502, "flora_error", text)
    return None


def _retry_after(seconds: float | None) -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER if seconds is None else max(1, ceil(seconds)))}


def _router_fault(error: HTTPException) -> Fault:
    """The router's own errors: no such route, or not with this method."""
    if error.status_code == 405:
        methods = (error.headers or {})["Allow"].split(",")
        allowed = ", ".join(sorted(method.strip() for method in methods))
        message = f"This route takes {allowed}."
        return Fault(405, "method_not_allowed", message, headers={"Allow": allowed})
    if error.status_code == 404:
        return not_found("There is no such route.")
    return Fault(error.status_code, "http_error", error.detail, headers=error.headers)
