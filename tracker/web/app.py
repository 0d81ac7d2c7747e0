"""The ASGI applications: their routes, and what all of them have in common.

That is health and metrics (`/healthz`: the process serves; `/readyz`: it can do its work;
`/metrics`), a request id, default headers, and one shape of errors. Errors become responses in
`ResponseMiddleware` and nowhere else, wherever on the HTTP side they are raised. An unexpected one
is logged under an error id, which is all that the client sees.

Each request has an id: the `X-Request-Id` of the proxy in front, or a new one. The response has it
as a header, and every log line of the request as `request_id`.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracker.core.contact import ContactState
from tracker.core.errors import FloraRefusal, SchemaOutdated, StoreError
from tracker.core.formatting import iso_time
from tracker.core.log import LogRateLimit, get_logger, log_context
from tracker.core.net import hide_callback_token
from tracker.core.waiting import wait_for
from tracker.operations.telemetry import untraced
from tracker.services import Services
from tracker.settings.tokens import Scope as TokenScope
from tracker.store import coordination, migrate
from tracker.web.api.routes import Api
from tracker.web.auth import AccessControl, AuthMiddleware, ScopedRoute
from tracker.web.callbacks import Callbacks, is_callback
from tracker.web.dashboard.site import Dashboard
from tracker.web.http import Limits
from tracker.web.http.request import (
    SAFE_METHODS,
    ClientGone,
    discard_body,
    has_unread_body,
    without_prefix,
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

MOUNTED_GRACE_SECONDS: Final = 10.0
"""How long the open requests of a mounted application may take once the tracker closes."""
_STREAM: Final = "/api/stream"

log = get_logger(__name__)


class Application:
    """An ASGI application: `routes`, after those of `Health`.

    `stop` ends what would hold up the end of the process: event streams, and requests that wait for
    evidence of a start in doubt.
    """

    def __init__(
        self,
        services: Services,
        limits: Limits,
        routes: Sequence[ScopedRoute] = (),
        *,
        access: AccessControl | None = None,
        callbacks: bool = False,
        error_page: ErrorPage = lambda *_: None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.stop = stop
        self.routes = [*Health(services, access, limits=limits).routes(), *routes]
        # A redirect would lose a callback, and FLORA follows none.
        self._router = Router(self.routes, redirect_slashes=False)
        app: ASGIApp = self._router
        if access is not None:
            app = AuthMiddleware(app, access=access, routes=self.routes)
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

    return Application(
        services,
        limits,
        [*Api(services, stream, limits=limits).routes(), *dashboard.routes()],
        access=access,
        callbacks=callbacks,
        error_page=dashboard.show_fault,
        stop=stop,
    )


def build_callbacks_app(services: Services) -> Application:
    """Callbacks and health alone, which are open to everyone and know no token."""
    return Application(services, Limits(), callbacks=True)


def build_health_app(services: Services) -> Application:
    """Health and metrics, for a process with the worker alone."""
    limits = Limits()
    return Application(services, limits, access=_access(services, limits))


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


class Mounted:
    """`tracker.asgi()`: the application as a part of another one, where it answers HTTP before the
    tracker is open too, and after it closed.

    The connection layer of `tracker serve` is absent here: the host's server accepts connections,
    and limits them. What a request may cost is still limited: size and time of bodies, time of
    reads, wrong tokens. Nothing of the host is used, and no error reaches it. `lifespan` opens the
    tracker where this is the whole application of a server.
    """

    def __init__(self, lifespan: Callable[[object], AbstractAsyncContextManager[None]]) -> None:
        self._app: Application | None = None
        self._requests = 0
        self._idle: asyncio.Event | None = None  # set when none is left, while the tracker closes
        self._closed = ResponseMiddleware(_refuse, limits=Limits())
        self._others = Router(lifespan=lifespan)  # lifespan events; WebSockets, which it refuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        scope, send = without_prefix(scope, send)
        if self._app is None:
            await self._closed(scope, receive, send)
            return
        self._requests += 1
        try:
            await self._app(scope, receive, send)
        except Exception:  # noqa: S110 - logged, and the host can do no more than its server, which
            pass  # cuts a connection whose response is not complete
        finally:
            self._requests -= 1
            if self._requests == 0 and self._idle is not None:
                self._idle.set()

    def stop(self) -> None:
        """End what would hold up the end of the host's server: event streams, waits for starts."""
        if self._app is not None:
            self._app.stop()

    @asynccontextmanager
    async def serving(
        self, services: Services, *, limits: Limits | None = None
    ) -> AsyncGenerator[None]:
        """Serve requests in the block. At its end streams end, and other requests are answered."""
        self._app = app = build_app(services, limits=limits)
        try:
            yield
        finally:
            self._app = None
            app.stop()
            if self._requests:
                self._idle = idle = asyncio.Event()
                await wait_for(idle, MOUNTED_GRACE_SECONDS)
                self._idle = None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    raise unavailable(
        "The tracker is not open: the application that it is mounted in opens it, with "
        "`lifespan=tracker.lifespan` or `async with tracker:` in its own lifespan."
    )


class Health:
    """`/healthz`, `/readyz` and `/metrics`; without `access` no metrics, and no details."""

    def __init__(self, services: Services, access: AccessControl | None, *, limits: Limits) -> None:
        self._services = services
        self._access = access
        self._limits = limits
        self._checking: asyncio.Task[None] | None = None

    def routes(self) -> list[ScopedRoute]:
        routes = [
            ScopedRoute("/healthz", self._healthz, {"GET": None}),
            ScopedRoute("/readyz", self._readyz, {"GET": None}),
        ]
        if self._access is None:
            return routes
        return [*routes, ScopedRoute("/metrics", self._metrics, {"GET": TokenScope.METRICS})]

    async def _healthz(self, request: Request) -> Response:
        return Json({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        """200 if the database answers, takes writes, and has a current schema; else 503 and why.

        A refused API key or an unreachable FLORA does not make the service unready, because
        callbacks are still received. With a valid token, or locally if no token is set, the
        response names them beside the status.
        """
        # Anyone may ask, as often as they like: one query serves all who wait.
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        try:
            await asyncio.shield(self._checking)
        except TimeoutError:
            raise unavailable("The database does not answer.") from None
        except SchemaOutdated as error:
            raise unavailable(str(error)) from error
        except StoreError as error:
            # Without the driver's message, which names the server and its user: anyone may ask.
            raise unavailable(f"{str(error).partition(':')[0]}.") from error
        if self._access is None or await self._access.identify(request.scope) is None:
            return Json({"status": "ready"})
        details = {"status": "ready", "flora": self._flora()}
        if (stale := self._services.rotation.stale) is not None:
            details["settings"] = f"not in force: {stale}"
        return Json(details)

    async def _metrics(self, request: Request) -> Response:
        """Prometheus's text format. Always 200: a metric shows a database that does not answer."""
        accept = request.headers.get("accept", "")
        text, content_type = await self._services.metrics.exposition(accept)
        return Response(text, media_type=content_type)

    async def _check(self) -> None:
        async with asyncio.timeout(self._limits.ready_seconds):
            await migrate.check(self._services.database)
            await coordination.check_writes(self._services.database)
            await self._services.contacts.read()

    def _flora(self) -> str:
        services = self._services
        now = services.clock()
        keyed = services.workspaces.keyed
        if not keyed:
            return "no key is set"
        states = [(one, _in_words(services.contacts.of(one), now)) for one in keyed]
        troubles = [
            text if one.workspace_id is None else f"{text} ({one.workspace_id})"
            for one, text in states
            if text is not None
        ]
        return "; ".join(troubles) or "ok"


def _in_words(state: ContactState | None, now: datetime) -> str | None:
    """`None` if FLORA answers."""
    if state is None:
        return "not asked yet"
    if not state.is_current(now):
        return f"not asked since {iso_time(state.asked_at)}"
    found = state.trouble
    if found is None:
        return "no answer yet" if state.answered_at is None else None
    return f"{found.trouble} since {iso_time(found.since)}: {found.reason}"


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
