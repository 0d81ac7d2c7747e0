"""The ASGI applications: routes, and the middleware around them."""

from collections.abc import Callable, Sequence

from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.operations.tracing import untraced
from tracker.services import Services
from tracker.web.api.routes import Api
from tracker.web.auth import AccessControl, AuthMiddleware, ScopedRoute
from tracker.web.callbacks import Callbacks, is_callback
from tracker.web.dashboard.site import Dashboard
from tracker.web.health import Health
from tracker.web.http.limits import Limits
from tracker.web.http.middleware import DeadlineMiddleware, ErrorPage, ResponseMiddleware
from tracker.web.http.responses import Take
from tracker.web.sessions import Sessions
from tracker.web.stream import Stream


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
