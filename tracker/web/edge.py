"""What every answer has in common: the security headers, and errors in one shape.

This is the outermost layer that is ours, so an error is turned into an answer here and nowhere
else, wherever in the HTTP side it was raised. One that nobody foresaw is logged under a number, and
the number is all that the client is told.
"""

import secrets
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracker.core.errors import FloraRefusal
from tracker.web.answers import Json
from tracker.web.body import ClientGone, discard, has_unread_body
from tracker.web.faults import Fault, fault_of
from tracker.web.limits import Limits

log = structlog.get_logger(__name__)

_EVERYWHERE: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
_NO_STORE: Final = (b"cache-control", b"no-store")


class Edge:
    """The layer around the application."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; what is not HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        extra = list(_EVERYWHERE)
        if scope["path"].startswith("/api"):
            extra.append(_NO_STORE)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = list(message.get("headers", ()))
                given = {name for name, _ in headers}
                headers += [header for header in extra if header[0] not in given]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientGone:
            return
        except Exception as error:
            fault = _explain(error, scope)
            if started:
                raise  # half an answer is out: all that is left is to cut the connection
            await self._answer(fault, scope, receive, send_with_headers)

    async def _answer(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        response = Json(fault.body(), status_code=fault.status, headers=fault.headers)
        if not has_unread_body(scope):
            await response(scope, receive, send)
            return
        response.headers["Connection"] = "close"

        async def hold_open(message: Message) -> None:
            # The whole answer is sent, but not its end, which would close the connection.
            if message["type"] == "http.response.body":
                message = {**message, "more_body": True}
            await send(message)

        await response(scope, receive, hold_open)
        if fault.linger:
            await discard(
                receive, limit=self._limits.linger_bytes, seconds=self._limits.linger_seconds
            )
        await send({"type": "http.response.body", "body": b""})


def _explain(error: Exception, scope: Scope) -> Fault:
    """The answer for an error, which is logged where somebody should know of it."""
    fault = fault_of(error)
    if fault is None:
        number = secrets.token_hex(6)
        log.error(
            "request.broken",
            error_id=number,
            method=scope["method"],
            path=scope["path"],
            exc_info=error,
        )
        return Fault(500, "internal_error", f"Something went wrong; the log has it as {number}.")
    if fault.status >= 500 and fault is not error:  # a Fault is told by who raised it
        log.warning(
            "request.failed",
            status=fault.status,
            code=fault.code,
            reason=str(error),
            method=scope["method"],
            path=scope["path"],
            flora_request_id=error.request_id if isinstance(error, FloraRefusal) else None,
        )
    return fault
