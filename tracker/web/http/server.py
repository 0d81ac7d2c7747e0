"""Binds sockets, opens the services, serves, and stops in order.

Sockets are bound first, so that a port in use is reported before anything is opened; connections
are accepted only when the services are open. At SIGTERM or SIGINT nothing new is accepted, open
requests are answered while the worker stops, and then the services close: each step has a time
limit, so that a process ends within 20 s whatever does not answer. A second SIGINT does not wait
for clients.
"""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from errno import EADDRINUSE, EADDRNOTAVAIL
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tracker.core.errors import SettingsError, TrackerError
from tracker.core.log import get_logger
from tracker.core.net import is_loopback
from tracker.core.waiting import wait_for
from tracker.services import Services
from tracker.settings import Settings
from tracker.web.http import Limits
from tracker.web.http.connection import Connection, ConnectionPool
from tracker.web.http.responses import Answer, Take
from tracker.worker import Worker

if TYPE_CHECKING:
    from tracker.web.app import Application

GRACE_SECONDS: Final = 10
"""How long open requests may take once the process stops: no callback takes longer."""
CANCEL_SECONDS: Final = 2
"""How long cancelled requests may then take to respond and to release what they hold."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Where to listen, and the application to serve there.

    `is_open` is true if nothing of it needs a token, so that it may be reached from anywhere.
    """

    host: str
    port: int
    build: Callable[[Services], "Application"]
    is_open: bool = False


def serve(
    settings: Settings,
    open_services: Callable[[], AbstractAsyncContextManager[Services]],
    *listeners: Listener,
    worker: Callable[[Services], Worker] | None = None,
) -> int:
    """Serve the listeners' applications, or without any run the worker alone, until SIGTERM or
    SIGINT; then return 0.

    Raises `SettingsError` if an address may not be served without a token, `TrackerError` if one
    cannot be bound, and what `open_services` raises.
    """
    without_token = len(settings.access_tokens) == 0
    with ExitStack() as stack:
        bound = [
            stack.enter_context(
                listen(one.host, one.port, local_only=without_token and not one.is_open)
            )
            for one in listeners
        ]
        sockets = [one for group in bound for one in group]
        ports = [group[0].getsockname()[1] for group in bound]
        if len({one.getsockname()[1] for one in sockets}) < len(listeners):
            raise TrackerError("callbacks and everything else need different ports")

        @asynccontextmanager
        async def application(stopping: asyncio.Event) -> AsyncIterator[_Served]:
            async with open_services() as services:
                apps = [one.build(services) for one in listeners]
                app = apps[0] if len(apps) == 1 else _AppsByPort(zip(ports, apps, strict=True))
                async with worker(services).running(stopping) if worker else nullcontext():
                    yield app

        def log_ready() -> None:
            if not sockets:
                log.info("working")
                return
            log.info(
                "serving",
                address=" ".join(map(_url, sockets)),
                callback_url=settings.callback_url,
                worker=worker is not None,
            )
            if without_token and not all(one.is_open for one in listeners):
                _log_closed(is_public=settings.is_public)

        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_run(application, sockets, log_ready))
    return 0


def _log_closed(*, is_public: bool) -> None:
    if is_public:
        log.warning(
            "serving.without_token",
            meaning="TRACKER_PUBLIC_URL is set but no token, so only callbacks and health are "
            "served: set TRACKER_API_TOKEN to open dashboard, API and metrics",
        )
    else:
        log.info(
            "serving.without_token",
            meaning="no token is set, so dashboard, API and metrics are for this machine alone: "
            "behind a proxy set TRACKER_API_TOKEN",
        )


class _AppsByPort:
    """Passes each request to the application of the port on which it arrived."""

    def __init__(self, apps: Iterable[tuple[int, "Application"]]) -> None:
        self._apps = dict(apps)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._apps[scope["server"][1]](scope, receive, send)

    def take(self, scope: Scope, body: bytes, answer: Answer) -> bool:
        take = self._apps[scope["server"][1]].take
        return take is not None and take(scope, body, answer)

    def stop(self) -> None:
        for app in self._apps.values():
            app.stop()


_Served: TypeAlias = "Application | _AppsByPort"


@contextmanager
def listen(
    host: str, port: int, *, local_only: bool, limits: Limits | None = None
) -> Iterator[list[socket.socket]]:
    """Binds every address of `host`, without accepting yet, and closes the sockets afterwards.

    Port 0 takes a free one. Raises `SettingsError` with `local_only` if an address is not loopback,
    and `TrackerError` if one cannot be bound.
    """
    unread_seconds = (limits or Limits()).unread_seconds
    sockets: list[socket.socket] = []
    try:
        for family, address in _addresses(host, port):
            if local_only and not is_loopback(address):
                raise SettingsError(
                    "TRACKER_API_TOKEN is not set, but other machines can reach "
                    f"{host or 'every address'}: set TRACKER_API_TOKEN, or serve on 127.0.0.1 "
                    "(callbacks alone need no token: see --callbacks-only and --callbacks-port)"
                )
            chosen = sockets[0].getsockname()[1] if sockets else port
            if (listener := _bind(family, address, chosen, unread_seconds)) is not None:
                sockets.append(listener)
        if not sockets:
            raise TrackerError(f"cannot serve on {host}: this machine has no such address")
        yield sockets
    finally:
        for listener in sockets:
            listener.close()


async def _run(
    application: Callable[[asyncio.Event], AbstractAsyncContextManager[_Served]],
    sockets: list[socket.socket],
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, which also end the opening of the application.

    The event that the application gets is set at the signal, so that a worker stops at once.
    """
    loop, opening = asyncio.get_running_loop(), asyncio.current_task()
    server: Server | None = None
    stopping = asyncio.Event()
    signals = 0

    def ready() -> None:
        # Everything alive now lives as long as the process: the collector need not scan it again.
        gc.collect()
        gc.freeze()
        on_ready()

    def on_signal(number: signal.Signals) -> None:
        nonlocal signals
        signals += 1
        log.info("stopping", signal=number.name)
        stopping.set()
        if server is not None:
            server.stop(force=signals > 1 and number is signal.SIGINT)
        elif opening is not None:
            opening.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        with suppress(asyncio.CancelledError):
            async with application(stopping) as app:
                server = Server(app, on_ready=ready, on_stop=app.stop, take=app.take)
                await server.serve(sockets=sockets)
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


class Server(uvicorn.Server):
    """A uvicorn server that calls `on_ready`, stops when told, and leaves signals alone.

    `on_stop` is called when it begins to stop, and ends what does not end by itself, such as event
    streams. `take` is what the application offers to take requests directly.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        on_ready: Callable[[], None],
        on_stop: Callable[[], None] = lambda: None,
        take: Take | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._pool = ConnectionPool(limits or Limits(), take)
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, pool=self._pool),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # anyone can cause its warnings, by a request that is not HTTP
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self._on_ready = on_ready
        self._on_stop = on_stop
        self._stopping = asyncio.Event()

    def stop(self, *, force: bool = False) -> None:
        """Begin to stop; with `force`, without waiting for open requests."""
        self.force_exit = force
        self.should_exit = self._pool.is_stopping = True
        self._stopping.set()
        self._on_stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, and waits `GRACE_SECONDS` for open requests before cancelling them."""
        await super().shutdown(sockets=sockets)
        # uvicorn cancels and does not wait, but the services are closed next.
        left = set(self.server_state.tasks)
        if self.force_exit:
            for task in left:
                task.cancel()
        if left:
            await asyncio.wait(left, timeout=CANCEL_SECONDS)

    async def main_loop(self) -> None:
        """Waits until told to stop; renews `Date` and checks all connections once a second."""
        loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            self._pool.check(self.server_state.connections, loop.time())
            await wait_for(self._stopping, 1)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing: uvicorn would raise the signal again, which decides the exit status."""
        yield


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's if it is installed; `None` is the standard library's."""
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


def _bind(
    family: socket.AddressFamily, address: str, port: int, unread_seconds: int
) -> socket.socket | None:
    """A bound socket; `None` if this machine has no such address, as `::1` without IPv6."""
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit the options. asyncio sets TCP_NODELAY only on sockets that it creates:
        # a response sent as head and body would wait 40 ms for the client's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * unread_seconds)
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
                f"port {port} on {address} is taken by another process: stop it, or choose another"
            ) from error
        reason = os.strerror(number) if number else error
        raise TrackerError(f"cannot serve on {address}, port {port}: {reason}") from error
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
