"""The application: the routes, and the layers around them."""

import re
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tracker.core.net import CALLBACK_PATH
from tracker.services import Services
from tracker.web.api.routes import Api
from tracker.web.auth import Access, Gate
from tracker.web.callbacks import Callbacks
from tracker.web.dashboard.site import Dashboard
from tracker.web.health import Health, MetricsText
from tracker.web.http.edge import Edge, Page, Shortcut
from tracker.web.http.limits import Deadline, Limits
from tracker.web.sessions import Sessions
from tracker.web.stream.endpoint import Stream


def build_app(services: Services, *, limits: Limits | None = None) -> Starlette:
    """Everything on one port: callbacks, health, API, dashboard and metrics.

    Whoever calls opens `services` before, and closes them afterwards.
    """
    limits = limits or Limits()
    access = _access(services)
    return _private(services, access, limits, callbacks=_callbacks(services, limits))


def build_private_app(services: Services, *, limits: Limits | None = None) -> Starlette:
    """Everything but callbacks, which another port takes."""
    limits = limits or Limits()
    return _private(services, _access(services), limits)


def build_callbacks_app(services: Services, *, limits: Limits | None = None) -> Starlette:
    """Callbacks and health alone, which are for everybody, and know no token."""
    limits = limits or Limits()
    return _within_the_edge(services, limits, callbacks=_callbacks(services, limits))


def build_health_app(services: Services, *, limits: Limits | None = None) -> Starlette:
    """What a process that only works shows of itself: its health and its metrics."""
    limits = limits or Limits()
    access = _access(services)
    return _within_the_edge(
        services,
        limits,
        MetricsText(services.metrics).routes(),
        access=access,
        middleware=[Middleware(Gate, access=access)],
    )


def _private(
    services: Services, access: Access, limits: Limits, *, callbacks: Callbacks | None = None
) -> Starlette:
    dashboard = Dashboard(services, access)
    stream = Stream(services, access, limits=limits)
    app = _within_the_edge(
        services,
        limits,
        [
            *MetricsText(services.metrics).routes(),
            *Api(services, stream, limits=limits).routes(),
            *dashboard.routes(),
        ],
        callbacks=callbacks,
        access=access,
        middleware=[
            Middleware(Deadline, seconds=limits.answer_seconds),
            Middleware(Gate, access=access),
        ],
        page=dashboard.show_fault,
    )
    app.state.on_stop = stream.stop
    return app


def _callbacks(services: Services, limits: Limits) -> Callbacks:
    return Callbacks(
        services.receiver,
        services.metrics,
        limits=limits,
        is_watched=services.traced(_nothing) is not _nothing,
    )


def _access(services: Services) -> Access:
    settings, rotation = services.settings, services.rotation
    return Access(
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
        counts=services.metrics,
        clock=services.clock,
    )


def _within_the_edge(
    services: Services,
    limits: Limits,
    routes: Sequence[Route] = (),
    *,
    access: Access | None = None,
    callbacks: Callbacks | None = None,
    middleware: Sequence[Middleware] = (),
    page: Page = lambda *_: None,
) -> Starlette:
    health = Health(services, access, limits=limits)
    shortcut, receiving = [], []
    if callbacks is not None:
        shortcut = [Middleware(Shortcut, path=CALLBACK_PATH, endpoint=callbacks)]
        receiving = [Route(path, callbacks) for path in (CALLBACK_PATH, CALLBACK_PATH + "/{token}")]
    app = Starlette(
        routes=[*receiving, *health.routes(), *routes],
        middleware=[
            Middleware(services.traced),
            Middleware(Edge, limits=limits, page=page),
            *shortcut,
            *middleware,
        ],
        exception_handlers={HTTPException: _to_the_edge},
    )
    # A redirect would lose a callback, and FLORA follows none.
    app.router.redirect_slashes = False
    for route in app.routes:
        if isinstance(route, Route):  # Starlette's `$` matches before a line end, too
            exact = route.path_regex.pattern.removesuffix("$") + r"\Z"
            route.path_regex = re.compile(exact)
    return app


async def _to_the_edge(request: Request, error: Exception) -> Response:
    """What the router raises (no such route or method) is answered where all errors are."""
    raise error


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that no layer has any business with."""
