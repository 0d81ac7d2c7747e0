"""The process around the application: binds, opens what is behind it, serves, and stops in order.

The listening socket is bound first, so that a port that is taken is told before anything is opened;
connections are accepted only when everything behind them is there. At SIGTERM or SIGINT it goes the
other way: nothing new is accepted, what is in flight is answered, the worker stops, the services
close. A second SIGINT does not wait for clients.
"""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from errno import EADDRINUSE, EADDRNOTAVAIL
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.core.errors import SettingsError, TrackerError
from tracker.core.net import is_loopback
from tracker.services import Services
from tracker.settings import Settings
from tracker.web.http.connection import ConnectionLimit
from tracker.web.http.limits import Limits
from tracker.worker.scheduler import Worker

log = structlog.get_logger(__name__)

UNREAD: Final = 15
"""Seconds that a client may take nothing of what it is sent, before its connection is closed."""
GRACE: Final = 10
"""Seconds that what is in flight has, once the process was told to stop: no callback takes longer,
and with the worker's end a container's usual 30 s suffice."""
LAST_WORDS: Final = 2
"""Seconds in which it then says that it was broken off, and gives back what it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where to listen, and what to serve there.

    `is_open` is true where nothing of it needs a token, so that it may be reached from anywhere.
    """

    host: str
    port: int
    build: Callable[[Services], ASGIApp]
    is_open: bool = False


def serve(
    settings: Settings,
    open_services: Callable[[], AbstractAsyncContextManager[Services]],
    *places: Place,
    worker: Callable[[Services], Worker] | None = None,
) -> int:
    """Serves what each place builds of the services until SIGTERM or SIGINT, then returns 0.

    Raises `SettingsError` where an address may not be served without a token, `TrackerError` where
    one cannot be bound, and what `open_services` raises.
    """
    without_token = len(settings.access_tokens) == 0
    with ExitStack() as stack:
        bound = [
            stack.enter_context(
                listen(place.host, place.port, local_only=without_token and not place.is_open)
            )
            for place in places
        ]
        sockets = [one for listeners in bound for one in listeners]
        if len({one.getsockname()[1] for one in sockets}) < len(places):
            raise TrackerError("callbacks and everything else need ports that differ")

        @asynccontextmanager
        async def application() -> AsyncIterator[ASGIApp]:
            async with open_services() as services:
                app = _by_port(
                    {
                        listeners[0].getsockname()[1]: place.build(services)
                        for place, listeners in zip(places, bound, strict=True)
                    }
                )
                if worker is None:
                    yield app
                    return
                background = worker(services)
                await background.start()
                try:
                    yield app
                finally:
                    await background.stop()

        def say_ready() -> None:
            log.info(
                "serving",
                address=" ".join(map(_url, sockets)),
                callback_url=settings.callback_url,
                worker=worker is not None,
            )
            if without_token and not all(one.is_open for one in places):
                _say_what_is_closed(is_public=settings.is_public)

        run(application, sockets, on_ready=say_ready)
    return 0


def _say_what_is_closed(*, is_public: bool) -> None:
    if is_public:
        log.warning(
            "serving.without_token",
            meaning="TRACKER_PUBLIC_URL is set and no token is, so only callbacks and health are "
            "served: set TRACKER_API_TOKEN to open dashboard, API and metrics",
        )
    else:
        log.info(
            "serving.without_token",
            meaning="no token is set, so dashboard, API and metrics are for this machine alone: "
            "behind a proxy set TRACKER_API_TOKEN",
        )


class _ByPort:
    """Hands each request to the application of the port that it came to."""

    def __init__(self, apps: Mapping[int, ASGIApp]) -> None:
        self._apps = apps
        stops = [getattr(getattr(app, "state", None), "on_stop", None) for app in apps.values()]
        self.state = _State(on_stop=lambda: [stop() for stop in stops if stop is not None])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        await self._apps[scope["server"][1]](scope, receive, send)


@dataclass(frozen=True, slots=True)
class _State:
    on_stop: Callable[[], object]


def _by_port(apps: Mapping[int, ASGIApp]) -> ASGIApp:
    return next(iter(apps.values())) if len(apps) == 1 else _ByPort(apps)


def run(
    application: Callable[[], AbstractAsyncContextManager[ASGIApp]],
    sockets: list[socket.socket],
    *,
    on_ready: Callable[[], None],
) -> None:
    """Opens an application, serves it on `sockets` until told to stop, and closes it again."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(application, sockets, on_ready))


@contextmanager
def listen(host: str, port: int, *, local_only: bool) -> Iterator[list[socket.socket]]:
    """Binds every address of `host` (none is accepted from yet) and closes them afterwards.

    Port 0 takes a free one. Raises `SettingsError` where `local_only` and an address is not
    loopback, and `TrackerError` where one cannot be bound.
    """
    sockets: list[socket.socket] = []
    try:
        for family, address in _addresses(host, port):
            if local_only and not is_loopback(address):
                raise SettingsError(
                    f"TRACKER_API_TOKEN is not set, so only this machine may be served, and "
                    f"{host or 'every address'} is reached from others: set TRACKER_API_TOKEN, or "
                    "serve on 127.0.0.1 (callbacks alone may be served anywhere: see "
                    "--callbacks-only and --callbacks-port)"
                )
            chosen = sockets[0].getsockname()[1] if sockets else port
            if (listener := _bind(family, address, chosen)) is not None:
                sockets.append(listener)
        if not sockets:
            raise TrackerError(f"cannot serve on {host}: this machine has no such address")
        yield sockets
    finally:
        for listener in sockets:
            listener.close()


async def _run(
    application: Callable[[], AbstractAsyncContextManager[ASGIApp]],
    sockets: list[socket.socket],
    on_ready: Callable[[], None],
) -> None:
    def ready() -> None:
        # What lives now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        on_ready()

    # A signal that comes while things are still being opened ends the opening.
    with suppress(asyncio.CancelledError), _Signals() as signals:
        async with application() as app:
            server = Server(app, on_ready=ready)
            signals.tell = server.stop
            await server.serve(sockets=sockets)


class Server(uvicorn.Server):
    """A uvicorn server that says when it is ready, stops when told, and leaves signals alone."""

    def __init__(
        self, app: ASGIApp, *, on_ready: Callable[[], None], limits: Limits | None = None
    ) -> None:
        limits = limits or Limits()
        self._connections = ConnectionLimit(limits)
        super().__init__(_config(app, self._connections))
        self._on_ready = on_ready
        # What an application has that would not end by itself, as a stream of events.
        self._on_stop: Callable[[], None] | None = getattr(
            getattr(app, "state", None), "on_stop", None
        )
        self._told = asyncio.Event()

    def stop(self, *, force: bool = False) -> None:
        """Begins to stop; with `force`, without waiting for what is in flight."""
        self.force_exit = force
        self.should_exit = True
        self._told.set()
        if self._on_stop is not None:
            self._on_stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept."""
        await super().startup(sockets=sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting and waits for what is in flight, which is broken off after `GRACE`."""
        await super().shutdown(sockets=sockets)
        # Uvicorn cancels and does not wait; what is behind the application is closed next.
        left = set(self.server_state.tasks)
        if self.force_exit:
            for task in left:
                task.cancel()
        if left:
            await asyncio.wait(left, timeout=LAST_WORDS)

    async def main_loop(self) -> None:
        """Waits to be told; once a second the `Date` is made anew, and clients are looked after."""
        loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            self._connections.look_round(self.server_state.connections, loop.time())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), 1)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing: uvicorn would send itself the signal again, and the exit status be its."""
        yield


class _Signals:
    """SIGTERM and SIGINT for as long as the process serves, opening and closing included."""

    def __init__(self) -> None:
        self.tell: Callable[..., None] | None = None
        self._task = asyncio.current_task()
        self._count = 0

    def __enter__(self) -> "_Signals":
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(self, *error: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        self._count += 1
        log.info("stopping", signal=number.name)
        if self.tell is not None:
            self.tell(force=self._count > 1 and number is signal.SIGINT)
        elif self._task is not None:
            self._task.cancel()


def _config(app: ASGIApp, connections: ConnectionLimit) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connections.connection,  # type: ignore[arg-type]  # it is only called
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # it warns of every request that is not HTTP, and anybody can send one
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where there is one; `None` is the standard library's."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    return uvloop.new_event_loop


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise TrackerError(f"cannot serve on {host}: {error}") from error
    return list(dict.fromkeys((family, str(where[0])) for family, _, _, _, where in found))


def _bind(family: socket.AddressFamily, address: str, port: int) -> socket.socket | None:
    """A bound socket; `None` where this machine has no such address, as `::1` without IPv6."""
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. asyncio itself does this only for sockets that it makes: an answer
        # that leaves as head and body would wait 40 ms for the client's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # the connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD)
        if family is socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
    except (OSError, OverflowError) as error:
        listener.close()
        number = error.errno if isinstance(error, OSError) else None
        if number == EADDRNOTAVAIL:
            return None
        if number == EADDRINUSE:
            raise TrackerError(
                f"port {port} on {address} is taken by another process: stop that one, or choose "
                "another port"
            ) from error
        reason = os.strerror(number) if number else error
        raise TrackerError(f"cannot serve on {address}, port {port}: {reason}") from error
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
