"""The ASGI applications: their routes, and what all responses have in common.

That is a request id, default headers, and one shape of errors. Errors become responses in
`ResponseMiddleware` and nowhere else, wherever on the HTTP side they are raised. An unexpected one
is logged under an error id, which is all that the client sees.

Each request has an id: the `X-Request-Id` of the proxy in front, or a new one. The response has it
as a header, and every log line of the request as `request_id`.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Final

from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracker.core.errors import FloraRefusal, StoreError
from tracker.core.log import LogRateLimit, get_logger, log_context
from tracker.core.net import hide_callback_token
from tracker.operations.telemetry import untraced
from tracker.services import Services
from tracker.web.api.routes import Api
from tracker.web.auth import AccessControl, AuthMiddleware, ScopedRoute
from tracker.web.callbacks import Callbacks, is_callback
from tracker.web.dashboard.site import Dashboard
from tracker.web.health import Health
from tracker.web.http import Limits
from tracker.web.http.request import (
    SAFE_METHODS,
    ClientGone,
    discard_body,
    has_unread_body,
)
from tracker.web.http.responses import (
    DEFAULT_HEADERS,
    REQUEST_ID,
    Fault,
    Json,
    Take,
    assign_request_id,
    to_fault,
    unavailable,
)
from tracker.web.sessions import Sessions
from tracker.web.stream import Stream

ErrorPage = Callable[[Scope, Fault], Response | None]
"""An error as an HTML page; `None` if the request does not come from a person."""

_STREAM: Final = "/api/stream"

log = get_logger(__name__)


class Application:
    """An ASGI application. `stop` ends what would hold up the end of the process: event streams,
    and requests that wait for evidence of a start in doubt."""

    def __init__(
        self,
        services: Services,
        limits: Limits,
        routes: Sequence[ScopedRoute],
        *,
        access: AccessControl | None = None,
        callbacks: bool = False,
        error_page: ErrorPage = lambda *_: None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.stop = stop
        self.routes = routes
        # A redirect would lose a callback, and FLORA follows none.
        self._router = Router(routes, redirect_slashes=False)
        app: ASGIApp = self._router
        if access is not None:
            app = AuthMiddleware(app, access=access, routes=routes)
        self._app = DeadlineMiddleware(app, seconds=limits.answer_seconds)
        self._callbacks = Callbacks(services, limits=limits) if callbacks else None
        self.take: Take | None = None
        if self._callbacks is not None and services.traced is untraced:  # a trace sees the response
            self.take = self._callbacks.take
        self._http = services.traced(
            ResponseMiddleware(self._dispatch, limits=limits, error_page=error_page)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._http if scope["type"] == "http" else self._router)(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Authentication and routing would take half as long as all else before a callback is
        # committed, and anyone may send one.
        if self._callbacks is not None and is_callback(scope["path"]):
            await self._callbacks(scope, receive, send)
        else:
            scope["app"] = self  # makes the router raise its errors
            await self._app(scope, receive, send)


def build_app(
    services: Services, *, limits: Limits | None = None, callbacks: bool = True
) -> Application:
    """Callbacks, health, API, dashboard and metrics; without `callbacks` all but these, which then
    have a port of their own.

    The caller opens `services` before, and closes them afterwards.
    """
    limits = limits or Limits()
    access = _access(services, limits)
    dashboard = Dashboard(services, access, limits)
    stream = Stream(services, access, limits=limits)

    def stop() -> None:
        stream.stop()
        services.starter.stop_waiting()

    routes = [
        *Health(services, access, limits=limits).routes(),
        *Api(services, stream, limits=limits).routes(),
        *dashboard.routes(),
    ]
    return Application(
        services,
        limits,
        routes,
        access=access,
        callbacks=callbacks,
        error_page=dashboard.show_fault,
        stop=stop,
    )


def build_callbacks_app(services: Services) -> Application:
    """Callbacks and health alone, which are open to everyone and know no token."""
    limits = Limits()
    routes = Health(services, None, limits=limits).routes()
    return Application(services, limits, routes, callbacks=True)


def build_health_app(services: Services) -> Application:
    """Health and metrics, for a process with the worker alone."""
    limits = Limits()
    access = _access(services, limits)
    routes = Health(services, access, limits=limits).routes()
    return Application(services, limits, routes, access=access)


def _access(services: Services, limits: Limits) -> AccessControl:
    settings, rotation = services.settings, services.rotation
    return AccessControl(
        tokens=lambda: rotation.tokens,
        refresh=rotation.check,
        is_public=settings.is_public,
        sessions=Sessions(
            services.database,
            tokens=lambda: rotation.tokens,
            public_url=settings.tracker_public_url,
            clock=services.clock,
        ),
        refusals=services.refusals,
        metrics=services.metrics,
        clock=services.clock,
        limits=limits,
    )


class ResponseMiddleware:
    """The outermost middleware. `error_page` renders errors for people."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, error_page: ErrorPage = lambda *_: None
    ) -> None:
        self._app = app
        self._limits = limits
        self._error_page = error_page
        self._store_errors = LogRateLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = list(message.get("headers", ()))
                own = {name for name, _ in headers}
                defaults = (*DEFAULT_HEADERS, (b"x-request-id", scope[REQUEST_ID].encode()))
                headers += [header for header in defaults if header[0] not in own]
                message = {**message, "headers": headers}
            await send(message)

        with log_context(request_id=assign_request_id(scope)):
            try:
                await self._app(scope, receive, send_with_headers)
            except ClientGone:
                return
            except asyncio.CancelledError:  # the process stops, and has waited as long as it may
                if started:
                    raise
                fault = unavailable("The tracker is stopping: retry, another process may answer.")
                await self._respond(fault, scope, receive, send_with_headers)
            except Exception as error:
                fault = self._explain(error, scope)
                if started:
                    raise  # half a response is sent: all that is left is to cut the connection
                # The traceback holds what was read of a body, and the client may take its time.
                await self._respond(fault.with_traceback(None), scope, receive, send_with_headers)

    async def _respond(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        response = self._as_page(scope, fault) or Json(
            fault.body(), status_code=fault.status, headers=fault.headers
        )
        if not has_unread_body(scope):
            await response(scope, receive, send)
            return
        response.headers["Connection"] = "close"

        async def hold_open(message: Message) -> None:
            # The whole response is sent, but not its end, which would close the connection.
            if message["type"] == "http.response.body":
                message = {**message, "more_body": True}
            await send(message)

        await response(scope, receive, hold_open)
        if fault.linger:
            limits = self._limits
            await discard_body(receive, limit=limits.linger_bytes, seconds=limits.linger_seconds)
        await send({"type": "http.response.body", "body": b""})

    def _as_page(self, scope: Scope, fault: Fault) -> Response | None:
        """The error as a page; a page that fails does not hide the error itself."""
        try:
            return self._error_page(scope, fault)
        except Exception as error:
            self._explain(error, scope)
            return None

    def _explain(self, error: Exception, scope: Scope) -> Fault:
        """The response for an error, which is logged if someone should know of it."""
        fault = to_fault(error)
        where = {"method": scope["method"], "path": hide_callback_token(scope["path"])}
        if fault is None:
            error_id = secrets.token_hex(6)
            log.exception("request.broken", error_id=error_id, exc_info=error, **where)
            message = f"An internal error occurred; the log has it as {error_id}."
            return Fault(500, "internal_error", message)
        if fault.status >= 500 and fault is not error:  # who raises a `Fault` logs it
            count = 1
            if isinstance(error, StoreError):  # each request would say the same
                now = asyncio.get_running_loop().time()
                count = self._store_errors.count(fault.code, now=now)
            if count:
                log.warning(
                    "request.failed",
                    status=fault.status,
                    code=fault.code,
                    reason=str(error),
                    count=count,
                    flora_request_id=error.request_id if isinstance(error, FloraRefusal) else None,
                    **where,
                )
        return fault


class DeadlineMiddleware:
    """Raises `Fault` 503 if the response to a read has not started within `seconds`.

    A page needs several queries, one after the other, and a database in trouble is slow for each.
    Requests that change something have time limits of their own; a stream has no end.
    """

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in SAFE_METHODS or scope["path"] == _STREAM:
            await self._app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            timer.reschedule(None)  # the time that the client takes to read does not count
            await send(message)

        try:
            async with asyncio.timeout(self._seconds) as timer:
                await self._app(scope, receive, send_in_time)
        except TimeoutError:
            if not timer.expired():
                raise
            raise unavailable("The database does not answer in time.") from None
