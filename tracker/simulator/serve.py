"""The simulator as an ASGI application, and over HTTP: inside a test, or until it is stopped."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.core.clock import Clock, utc_now
from tracker.simulator.api import ControlRoutes, SimulatedApi
from tracker.simulator.callbacks import INTERNAL_SUFFIXES, CallbackSender, literal_address
from tracker.simulator.faults import CuttableProtocol, ErrorAnswer
from tracker.simulator.options import Options, SimulatedWorkspace
from tracker.simulator.runs import RunRequest, SimulatedRun
from tracker.simulator.world import World

_RESERVED_SUFFIXES: Final = (".test", ".example", ".invalid")
_HOST: Final = "127.0.0.1"
_SHUTDOWN_SECONDS: Final = 1.0
"""How long requests in progress may take when the simulator stops."""


def build_app(world: World) -> Starlette:
    """The simulator of a world, for any ASGI server or transport.

    Its callback sender is `app.state.sender`. Behind a foreign server a cut connection shows as an
    error of the application; `running` and `serve` cut for real.
    """
    sender = CallbackSender(world)
    api, control = SimulatedApi(world, sender), ControlRoutes(world)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await sender.close()
        control.close()

    app = Starlette(
        routes=[Mount("/api/v1", routes=api.routes()), *control.routes()],
        exception_handlers=dict.fromkeys(
            (ErrorAnswer, HTTPException, ClientDisconnect), _answer_error
        ),
        middleware=[Middleware(_OwnHostOnly)],
        lifespan=lifespan,
    )
    app.state.sender = sender
    app.router.redirect_slashes = False
    return app


class _OwnHostOnly:
    """Refuses requests from a page of another site, also from one whose name now points here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            hosts = [headers.get("host", ""), *headers.getlist("origin")]
            if not all(map(is_own_host, hosts)):
                text = "Use the address of this simulator, or a name without dots."
                await ErrorAnswer(403, "forbidden", text).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_own_host(host: str) -> bool:
    """Whether a request with this `Host` or `Origin` is meant for a simulator: an address, or a
    name that cannot be registered and made to point here."""
    name = (urlsplit(host if "//" in host else f"//{host}").hostname or "").rstrip(".")
    if literal_address(name) is not None:
        return True
    return name not in ("", "null") and (
        "." not in name or name.endswith((*INTERNAL_SUFFIXES, *_RESERVED_SUFFIXES))
    )


async def _answer_error(request: Request, exc: Exception) -> Response:
    if isinstance(exc, HTTPException):
        if exc.status_code == 405:
            exc = ErrorAnswer(405, "method_not_allowed", "This route has no such method.")
        else:
            exc = ErrorAnswer.not_found("route")
    return exc.response() if isinstance(exc, ErrorAnswer) else Response(status_code=400)


@dataclass(frozen=True, slots=True)
class Simulator:
    """A simulator that is being served. All of it lives in the loop that serves it."""

    world: World
    sender: CallbackSender

    @property
    def root(self) -> str:
        """Where it is reached, without a path."""
        return self.world.root

    @property
    def base_url(self) -> str:
        """The API's root, as `FLORA_BASE_URL` takes it."""
        return f"{self.root}/api/v1"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a tracker, or FLORA's own SDK, uses this simulator."""
        options = self.world.options
        return {
            "FLORA_BASE_URL": self.base_url,
            "FLORA_API_KEY": options.api_key,
            "FLORA_WORKSPACE_ID": options.workspace_id,
            "FLORA_WEBHOOK_SECRET": options.webhook_secret,
        }

    def start(
        self,
        technique: str = "icon-pack",
        *,
        callback_url: str | None = None,
        workspace: SimulatedWorkspace | None = None,
    ) -> SimulatedRun:
        """Starts a run past the API and so untouched by its faults.

        Raises `LookupError` for a technique that is not in the catalogue.
        """
        return self._start(self.world.sample_request(technique), callback_url, workspace)

    def start_generation(
        self, kind: str = "image", *, callback_url: str | None = None
    ) -> SimulatedRun:
        """Starts a generation in the same way."""
        return self._start(RunRequest(generation=kind, model=f"{kind}-standard"), callback_url)

    async def quiet(self) -> None:
        """Waits until all runs have ended and every callback was accepted or given up."""
        ends = [run.completed_ms for run in self.world.runs.values()]
        await asyncio.sleep(max(0, max(ends, default=0) - self.world.now_ms()) / 1000)
        await self.sender.idle()

    def _start(
        self,
        request: RunRequest,
        callback_url: str | None,
        workspace: SimulatedWorkspace | None = None,
    ) -> SimulatedRun:
        run = self.world.start(request, callback_url=callback_url, workspace=workspace)
        self.sender.schedule(run)
        return run


@contextlib.asynccontextmanager
async def running(
    options: Options | None = None, *, port: int = 0, clock: Clock = utc_now
) -> AsyncIterator[Simulator]:
    """Serves a simulator on 127.0.0.1 in this loop; port 0 takes a free one.

    Raises `OSError` where the port cannot be bound.
    """
    listener = socket.create_server((_HOST, port), backlog=2048)
    # asyncio does this only for sockets that it makes itself; without it each answer, which leaves
    # as head and body, waits 40 ms for the client's acknowledgement. Connections inherit it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    world = World(
        options or Options(), clock=clock, root=f"http://{_HOST}:{listener.getsockname()[1]}"
    )
    app = build_app(world)
    config = uvicorn.Config(
        app,
        http=CuttableProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=60,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    try:
        # As `uvicorn.Server.serve`, but signals are left to the caller.
        await server.startup(sockets=[listener])
        try:
            yield Simulator(world, app.state.sender)
        finally:
            await _stop(server)
    finally:
        listener.close()


async def _stop(server: uvicorn.Server) -> None:
    """As uvicorn's `shutdown`, without its pause of 0.1 s, which adds up in tests."""
    for listening in server.servers:
        listening.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    if server.server_state.tasks:
        _, late = await asyncio.wait(server.server_state.tasks, timeout=_SHUTDOWN_SECONDS)
        for task in late:
            task.cancel()
    await server.lifespan.shutdown()


def serve(options: Options, port: int, *, on_ready: Callable[[Simulator], None]) -> None:
    """Serves a simulator until SIGINT or SIGTERM. `on_ready` is called once it answers.

    Raises `OSError` where the port cannot be bound.
    """

    async def serve_until_signal() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with running(options, port=port) as simulator:
            on_ready(simulator)
            await stop.wait()

    asyncio.run(serve_until_signal())
