"""`tracker.asgi()`: the web application as a part of another application.

The connection layer of `tracker serve` is absent here: the host's server accepts connections, and
limits them. What a request may cost is still limited: size and time of bodies, time of reads, wrong
tokens. Nothing of the host is used, and no error reaches it.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from tracker.core.waiting import wait_for
from tracker.services import Services
from tracker.web.app import Application, ResponseMiddleware, build_app
from tracker.web.http import Limits
from tracker.web.http.request import without_prefix
from tracker.web.http.responses import unavailable

GRACE_SECONDS: Final = 10.0
"""How long open requests may take once the tracker closes."""


class Mounted:
    """An ASGI application for HTTP that is there before the tracker is open, and after it closed.

    `lifespan` opens the tracker where this is the whole application of a server.
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
                await wait_for(idle, GRACE_SECONDS)
                self._idle = None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    raise unavailable(
        "The tracker is not open: the application that it is mounted in opens it, with "
        "`lifespan=tracker.lifespan` or `async with tracker:` in its own lifespan."
    )
