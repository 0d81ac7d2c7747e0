"""The application: the routes, and the layers around them."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.web.auth import Gate
from tracker.web.callbacks import Callbacks
from tracker.web.edge import Edge
from tracker.web.health import Health
from tracker.web.limits import Limits
from tracker.web.runs import Runs
from tracker.web.services import Services


def build_app(services: Services, *, limits: Limits | None = None) -> Starlette:
    """The HTTP side over `services`, which whoever calls opens before and closes after it."""
    limits = limits or Limits()
    return _within_the_edge(
        services,
        limits,
        [
            # First, because the routes are tried in order and this one takes the load.
            Route("/callbacks/flora", Callbacks(services.receiver, limits=limits)),
            *Health(services, limits=limits).routes(),
            *Runs(services, limits=limits).routes(),
        ],
    )


def build_health_app(services: Services, *, limits: Limits | None = None) -> Starlette:
    """What a process that only works shows of itself: its health."""
    limits = limits or Limits()
    return _within_the_edge(services, limits, Health(services, limits=limits).routes())


def _within_the_edge(services: Services, limits: Limits, routes: list[Route]) -> Starlette:
    token = services.settings.tracker_api_token
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Edge, limits=limits),
            Middleware(Gate, token=token.get_secret_value() if token else None),
        ],
        exception_handlers={HTTPException: _to_the_edge},
    )
    # A redirect would lose a callback, and FLORA follows none.
    app.router.redirect_slashes = False
    return app


async def _to_the_edge(request: Request, error: Exception) -> Response:
    """What the router raises (no such route or method) is answered where all errors are."""
    raise error
