"""Opening and closing a `Tracker`, what its calls use while it is open, and its handlers."""

import asyncio
import inspect
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from tracker.core.errors import SettingsError
from tracker.core.log import get_logger
from tracker.errors import TrackerNotOpen
from tracker.library.run import RunEvent

if TYPE_CHECKING:
    from tracker.delivering.endpoints import Handler
    from tracker.services import Services
    from tracker.settings import Loaded, Settings
    from tracker.store.writing.messages import Claim
    from tracker.web.app import Mounted

WATCH_EVERY: Final = 0.25
"""Seconds between two checks of whether the server of the application stops."""

HandlerFunction = TypeVar("HandlerFunction", bound=Callable[[RunEvent], object])

log = get_logger(__name__)


class OpenedTracker:
    """The part of `Tracker` that opens and closes it."""

    def __init__(self, settings: "Settings | None" = None, *, worker: bool | None = None) -> None:
        """A tracker with these settings, by default those of `from_env`; opens nothing."""
        from tracker.settings import Rotation, read_settings

        # As they are now: another tracker may be made with other ones in this process.
        read = partial(read_settings, dict(os.environ))
        self._loaded: Loaded | None = read() if settings is None else None
        self.settings: Settings = settings or cast("Loaded", self._loaded).settings
        self._rotation = partial(Rotation, self.settings, self._loaded, self._loaded and read)
        # Of its own, since callbacks are verified in any thread, whether or not this is open.
        self._verifying = self._rotation()
        self._worker = worker
        self._works = False
        self._application: Mounted | None = None
        self._handlers: dict[str, Handler] = {}
        self._stack: AsyncExitStack | None = None
        self._opened: tuple[Services, asyncio.AbstractEventLoop] | None = None

    @classmethod
    def from_env(cls, *, worker: bool | None = None) -> Self:
        """A tracker with the settings of the environment and of the file in TRACKER_CONFIG.

        Opens nothing. Raises `SettingsError`, which names each wrong setting.
        """
        return cls(worker=worker)

    async def __aenter__(self) -> Self:
        from tracker.services import open_services

        if self._stack is not None:
            raise TrackerNotOpen(
                "this tracker is open already: open it once, and share it between tasks"
            )
        self._stack = stack = AsyncExitStack()
        stopping = asyncio.Event()
        handlers = list(self._handlers.values())
        mounted = self._application is not None
        works = mounted or bool(handlers)
        self._works = works if self._worker is None else self._worker
        background = self._works or mounted
        # With the files of the environment's settings, so that secrets can be rotated.
        rotation = self._rotation()
        for unknown in rotation.unknown:
            log.warning("settings.unknown", error=unknown)
        try:
            await stack.enter_async_context(rotation.watched())
            services = await stack.enter_async_context(
                open_services(rotation, background=background, traces=False, handlers=handlers)
            )
            if not background:  # changes by other processes are still noticed at once
                await stack.enter_async_context(services.signals)
            # Before the worker starts and until it has stopped: handlers use the tracker.
            self._opened = services, asyncio.get_running_loop()
            stack.callback(self._end_calls)
            if self._works:
                from tracker.worker import Worker

                await stack.enter_async_context(Worker(services).running(stopping))
            if self._application is not None:
                await stack.enter_async_context(self._application.serving(services))
            server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            if hasattr(server, "should_exit"):
                watching = asyncio.create_task(self._stop_with(server), name="server-watcher")
                stack.callback(watching.cancel)
            stack.callback(stopping.set)  # the worker stops while requests are answered
        except BaseException:
            self._stack = None
            await stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._stack is not None:
                await self._stack.aclose()
        finally:
            self._stack = None

    async def _stop_with(self, server: Any) -> None:
        """End streams, and the loops of `events`, when the server begins to stop.

        uvicorn waits for open responses before it ends the lifespan, and notifies no application.
        It handles signals with a method of the server, which knows. Other servers are not
        recognized: their own time-outs end the streams.
        """
        while not server.should_exit:  # noqa: ASYNC110 - nothing else reports it
            await asyncio.sleep(WATCH_EVERY)
        if self._application is not None:
            self._application.stop()
        await self._services().changes.aclose()

    def _end_calls(self) -> None:
        self._opened = None

    def asgi(self) -> "Mounted":
        """The web application, with callbacks, API and dashboard, to mount in another one.

        ::

            tracker = Tracker.from_env()
            app = Starlette(routes=[Mount("/flora", tracker.asgi())], lifespan=tracker.lifespan)

        It works under any path, which TRACKER_PUBLIC_URL includes. While the tracker is not open,
        it answers 503. Raises `TrackerNotOpen` if the tracker is open already: what runs in it is
        decided then.
        """
        if self._application is None:
            if self._stack is not None:
                raise TrackerNotOpen(
                    "this tracker is open already: call asgi() before it is opened"
                )
            from tracker.web.app import Mounted

            self._application = Mounted(self.lifespan)
        return self._application

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncGenerator[None]:
        """Opens the tracker with an application and closes it: `Starlette(lifespan=…)`.

        An application with a lifespan of its own uses `async with tracker:` there.
        """
        async with self:
            yield

    def _closed_copy(self) -> Self:
        """The same tracker for a child process, whose parent may have opened this one."""
        closed = copy(self)
        closed._opened = closed._stack = None
        return closed

    def _services(self) -> "Services":
        """What the tracker opened. Raises `TrackerNotOpen`."""
        if self._opened is None:
            raise TrackerNotOpen(
                "the tracker is not open: use it within `async with tracker:`, "
                "or with the lifespan of the application that it is mounted in"
            )
        services, loop = self._opened
        if asyncio.get_running_loop() is not loop:
            raise TrackerNotOpen(
                "the tracker was opened in another event loop: open one in this loop, "
                "or use tracker.sync.Tracker"
            )
        return services

    def _launching_batches(self) -> "Services":
        """As `_services`; stored batches are launched from here too until the tracker is closed."""
        services = self._services()
        if not self._works and self._stack is not None and services.batch_worker.start():
            self._stack.push_async_callback(services.batch_worker.stop)
        return services

    def _register(
        self, event_of: "Callable[[Claim], object]", *, name: str, **given: object
    ) -> Callable[[HandlerFunction], HandlerFunction]:
        """A decorator that registers a handler, which gets the event that `event_of` makes.

        Raises `SettingsError`.
        """
        from pydantic import ValidationError

        from tracker.core.formatting import requirement
        from tracker.delivering.endpoints import Handler
        from tracker.settings.model import HandlerSettings
        from tracker.store.queries.endpoints import HANDLER_URL, EndpointConfig

        if self._stack is not None:
            raise SettingsError(
                f"handler {name!r}: the tracker is open; register handlers before it is opened"
            )
        try:
            settings = HandlerSettings.model_validate({"id": name, **given})
        except ValidationError as error:
            faults = "; ".join(
                f"{_argument_of(one['loc'])} {requirement(one['type'], one['msg'])}"
                for one in error.errors()
            )
            raise SettingsError(f"handler {name!r}: {faults}") from None

        def decorate(function: HandlerFunction) -> HandlerFunction:
            url = f"{HANDLER_URL}{_checked_name(name, function)}"
            known = self._handlers.get(name)
            if known is not None and known.config.url != url:  # else a cell or module is run again
                other = known.config.url.removeprefix(HANDLER_URL)
                raise SettingsError(
                    f"handler {name!r}: {other} has this name already; names must differ"
                )
            # Its kind is asked for, not whether it has one.
            call = getattr(function, "__call__", None)  # noqa: B004
            self._handlers[name] = Handler(
                config=EndpointConfig(
                    endpoint_id=name, url=url, events=settings.events, filter=settings.filter
                ),
                call=lambda claim: cast("Callable[[object], object]", function)(event_of(claim)),
                is_async=any(map(inspect.iscoroutinefunction, (function, call))),
                concurrency=settings.concurrency,
                timeout=settings.timeout,
            )
            return function

        return decorate


def _argument_of(loc: tuple[int | str, ...]) -> str:
    first = str(loc[0]) if loc else ""
    return {"id": "name", "events": "event"}.get(first, first)


def _checked_name(name: str, function: Callable[[Any], object]) -> str:
    """The function's name, to show. Raises `SettingsError` if it cannot be a handler."""
    if not callable(function):
        raise SettingsError(f"handler {name!r}: {function!r} is not a function")
    inner: Any = inspect.unwrap(getattr(function, "func", function))  # of a `partial` too
    shown = f"{inner.__module__}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise SettingsError(f"handler {name!r}: {shown} must not yield: its code would never run")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise SettingsError(
            f"handler {name!r}: {shown} must take one argument, the event"
        ) from None
    except ValueError:  # a function in C does not tell
        pass
    return shown
