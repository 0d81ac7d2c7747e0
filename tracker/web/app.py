"""The application: the routes, and the layers around them."""

from collections.abc import Sequence
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tracker.web.auth import Gate, Pass
from tracker.web.callbacks import Callbacks
from tracker.web.dashboard.site import Dashboard
from tracker.web.deadline import Deadline
from tracker.web.edge import Edge, Page
from tracker.web.health import Health
from tracker.web.limits import Limits
from tracker.web.metrics import MetricsText
from tracker.web.openapi import Description
from tracker.web.runs import Runs
from tracker.web.services import Services
from tracker.web.shortcut import Shortcut
from tracker.web.stream.endpoint import Stream
from tracker.web.techniques import Techniques

_CALLBACKS: Final = "/callbacks/flora"


def build_app(services: Services, *, limits: Limits | None = None) -> Starlette:
    """The HTTP side over `services`, which whoever calls opens before and closes after it."""
    limits = limits or Limits()
    callbacks = Callbacks(
        services.receiver,
        services.metrics,
        limits=limits,
        is_watched=services.traced(_nothing) is not _nothing,
    )
    dashboard = Dashboard(services, token=_token(services))
    stream = Stream(services, limits=limits)
    app = _within_the_edge(
        services,
        limits,
        [
            Route(_CALLBACKS, callbacks),
            *Health(services, limits=limits).routes(),
            *MetricsText(services.metrics).routes(),
            *Runs(services, limits=limits).routes(),
            *Techniques(services).routes(),
            *Description(services).routes(),
            *stream.routes(),
            *dashboard.routes(),
        ],
        shortcuts=[Middleware(Shortcut, path=_CALLBACKS, endpoint=callbacks)],
        passes=dashboard.passes,
        page=dashboard.show_fault,
    )
    app.state.on_stop = stream.stop
    return app


def build_health_app(services: Services, *, limits: Limits | None = None) -> Starlette:
    """What a process that only works shows of itself: its health and its metrics."""
    limits = limits or Limits()
    return _within_the_edge(
        services,
        limits,
        [*Health(services, limits=limits).routes(), *MetricsText(services.metrics).routes()],
    )


def _token(services: Services) -> str | None:
    token = services.settings.tracker_api_token
    return token.get_secret_value() if token else None


def _within_the_edge(
    services: Services,
    limits: Limits,
    routes: list[Route],
    *,
    shortcuts: Sequence[Middleware] = (),
    passes: Sequence[Pass] = (),
    page: Page = lambda *_: None,
) -> Starlette:
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(services.traced),
            Middleware(Edge, limits=limits, page=page),
            *shortcuts,
            Middleware(Gate, token=_token(services), passes=passes),
            Middleware(Deadline, seconds=limits.answer_seconds),
        ],
        exception_handlers={HTTPException: _to_the_edge},
    )
    # A redirect would lose a callback, and FLORA follows none.
    app.router.redirect_slashes = False
    return app


async def _to_the_edge(request: Request, error: Exception) -> Response:
    """What the router raises (no such route or method) is answered where all errors are."""
    raise error


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that no layer has any business with."""
