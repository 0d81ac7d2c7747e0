"""What every answer has in common: its number, the security headers, and errors in one shape.

This is the outermost layer that is ours, so an error is turned into an answer here and nowhere
else, wherever in the HTTP side it was raised. One that nobody foresaw is logged under a number, and
the number is all that the client is told.

Each request has a number too, the `X-Request-Id` of the proxy in front where it gives one. It goes
out with the answer, and every line of the log that the request causes has it as `request_id`.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable
from typing import Final

import structlog
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, unbind_contextvars

from tracker.core.errors import FloraRefusal, StoreError
from tracker.core.net import hide_callback_token
from tracker.core.rate_limited_log import Seldom
from tracker.web.http.answers import EVERYWHERE, WRITE, Json, number, request_id_header
from tracker.web.http.body import ClientGone, discard, has_unread_body
from tracker.web.http.errors import Fault, fault_of, unavailable
from tracker.web.http.limits import Limits

log = structlog.get_logger(__name__)

Page = Callable[[Scope, Fault], Response | None]
"""An error as a page for people; `None` where it is not a person who asked."""

_BOUND: Final = ("request_id", "delivery_id", "run_id")
"""What a request makes known of itself to the log, for as long as it lasts."""
_NO_STORE: Final = (b"cache-control", b"no-store")


class Edge:
    """The layer around the application. `page` shows errors to people."""

    def __init__(self, app: ASGIApp, *, limits: Limits, page: Page = lambda *_: None) -> None:
        self._app = app
        self._limits = limits
        self._page = page
        self._down = Seldom()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; what is not HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = number(scope)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": _with_ours(message.get("headers", ()), scope)}
            await send(message)

        bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, send_with_headers)
        except ClientGone:
            return
        except asyncio.CancelledError:
            # The process ends, and has waited for as long as it may.
            if started:
                raise
            fault = unavailable(
                "The tracker is stopping: ask again, it may be another that answers."
            )
            await self._answer(fault, scope, receive, send_with_headers)
        except Exception as error:
            fault = self._explain(error, scope)
            if started:
                raise  # half an answer is out: all that is left is to cut the connection
            # The traceback holds what was read of a body, and the client may take its time.
            await self._answer(fault.with_traceback(None), scope, receive, send_with_headers)
        finally:
            unbind_contextvars(*_BOUND)
            scope.pop(WRITE, None)  # it leads back to the scope, a circle that nothing else breaks

    async def _answer(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        response = self._as_page(scope, fault) or Json(
            fault.body(), status_code=fault.status, headers=fault.headers
        )
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

    def _as_page(self, scope: Scope, fault: Fault) -> Response | None:
        """The error as a page; one that cannot be made does not hide the error itself."""
        try:
            return self._page(scope, fault)
        except Exception as error:
            self._explain(error, scope)
            return None

    def _explain(self, error: Exception, scope: Scope) -> Fault:
        """The answer for an error, which is logged where somebody should know of it."""
        fault = fault_of(error)
        if fault is None:
            error_id = secrets.token_hex(6)
            log.error(
                "request.broken",
                error_id=error_id,
                method=scope["method"],
                path=hide_callback_token(scope["path"]),
                exc_info=error,
            )
            message = f"Something went wrong; the log has it as {error_id}."
            return Fault(500, "internal_error", message)
        if fault.status >= 500 and fault is not error:  # a Fault is told by who raised it
            count = 1
            if isinstance(error, StoreError):  # each request would say the same
                count = self._down.count(fault.code, now=asyncio.get_running_loop().time())
            if count:
                log.warning(
                    "request.failed",
                    status=fault.status,
                    code=fault.code,
                    reason=str(error),
                    count=count,
                    method=scope["method"],
                    path=hide_callback_token(scope["path"]),
                    flora_request_id=error.request_id if isinstance(error, FloraRefusal) else None,
                )
        return fault


def _with_ours(headers: Iterable[tuple[bytes, bytes]], scope: Scope) -> list[tuple[bytes, bytes]]:
    """An answer's headers, and those that every answer has, as far as they are not among them."""
    every = list(headers)
    given = {name for name, _ in every}
    ours = [*EVERYWHERE, request_id_header(scope)]
    if scope["path"].startswith("/api"):
        ours.append(_NO_STORE)
    return every + [header for header in ours if header[0] not in given]


# The way past the gate and the router, for the paths that take the load.


class Shortcut:
    """Hands the requests for `path`, and for one part below it, to `endpoint`, and all others on.

    What lies between costs a callback half as much again as all that is done with it before it is
    written, and has no say in it: anybody may send one, and no route but its own fits.
    """

    def __init__(self, app: ASGIApp, *, path: str, endpoint: ASGIApp) -> None:
        self._app = app
        self._path = path
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        straight = False
        if scope["type"] == "http":
            path, _, last = scope["path"].rpartition("/")
            straight = scope["path"] == self._path or (path == self._path and last != "")
        await (self._endpoint if straight else self._app)(scope, receive, send)
