"""The whole simulator as one ASGI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.core.clock import Clock, utc_now
from tracker.simulator.api import Api
from tracker.simulator.callbacks import Courier
from tracker.simulator.control import Control
from tracker.simulator.destination import may_ask
from tracker.simulator.faults import Connections
from tracker.simulator.options import Options
from tracker.simulator.problems import Problem
from tracker.simulator.world import World


def build_app(options: Options | None = None, *, clock: Clock = utc_now) -> Starlette:
    """A simulator as an application of its own, for any ASGI server or transport.

    Its world is `app.state.world`, its courier `app.state.courier`. Behind a foreign server a cut
    connection shows as an error of the application; `running` and `serve` cut for real.
    """
    world = World(options or Options(), clock=clock)
    return assemble(world, Courier(world), Connections())


def assemble(world: World, courier: Courier, connections: Connections) -> Starlette:
    """The application of a world whose callbacks and connections somebody else holds as well."""
    api, control = Api(world, courier, connections), Control(world)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await courier.close()
        control.close()

    app = Starlette(
        routes=[Mount("/api/v1", routes=api.routes()), *control.routes()],
        exception_handlers={HTTPException: _no_route, ClientDisconnect: _nobody_there},
        middleware=[Middleware(_OwnHost)],
        lifespan=lifespan,
    )
    app.state.world = world
    app.state.courier = courier
    app.router.redirect_slashes = False
    return app


class _OwnHost:
    """Refuses what a page of another site asks, also one whose name now points here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            asked = [headers.get("host", ""), *headers.getlist("origin")]
            if not all(map(may_ask, asked)):
                problem = Problem(
                    403,
                    "forbidden",
                    "Ask this simulator by its address, or by a name without dots.",
                )
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _no_route(request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 404
    if status == 405:
        return Problem(405, "method_not_allowed", "This route has no such method.").response()
    return Problem(404, "not_found", "There is no such route.").response()


async def _nobody_there(request: Request, exc: Exception) -> Response:
    return Response(status_code=400)  # who asked has gone in the middle of the request
