"""`Tracker`: start, follow and list runs from Python, over the same services as the commands."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from copy import copy
from types import TracebackType
from typing import Any, Final, Self, overload
from uuid import uuid4

from tracker.core.errors import (
    FieldFault,
    FloraUnreachable,
    InvalidRequest,
    RateLimited,
    SettingsError,
    StartNotStored,
    StartPending,
    StoreUnavailable,
)
from tracker.core.record import Record
from tracker.core.retry import RetryAdvice
from tracker.core.run import Tracking
from tracker.core.tags import check_tags
from tracker.delivering.handlers import TIMEOUT
from tracker.errors import RunUnknown, TrackerNotOpen
from tracker.library import following
from tracker.library.handlers import EventName, HandlerFunction, Handlers, RunEvent
from tracker.library.inputs import InputValues, given_inputs
from tracker.library.run import Event, Run
from tracker.services import START_SECONDS, Services, open_services
from tracker.settings import Loaded, Rotation, Settings, read_settings
from tracker.starting.start import StartRequest
from tracker.store.queries import runs as read
from tracker.store.queries.audit import Principal, acting
from tracker.store.writing.messages import MOST_OPEN
from tracker.worker.scheduler import Worker

ACTOR: Final = "python"
"""Who starts runs from Python, in the start log and the audit log."""
RETRY_EVERY: Final = 1.0
"""Seconds between two attempts of a start while FLORA or the database does not answer."""
PAGE_SIZE: Final = 100


class Tracker:
    """A tracker on the database and the FLORA workspaces that the settings name.

    ::

        async with Tracker.from_env() as tracker:
            run = await tracker.start("icon-pack", {"prompt": "garden tools"})

    `worker` decides whether polling, sweeps and deliveries run in this process. By default they do
    where the tracker is mounted (`asgi`) or has handlers (`on`). Without them another process may
    run them, or none: `wait` polls by itself what no process polls.

    Settings are those of the commands. Nothing is opened before `async with`; a tracker belongs to
    the event loop in which it was opened, and may be opened again after it was closed.
    """

    def __init__(self, settings: Settings | None = None, *, worker: bool | None = None) -> None:
        self.settings: Settings = Settings() if settings is None else settings
        self._loaded: Loaded | None = None
        self._worker = worker
        self._mounted = False
        self._handlers = Handlers(lambda claim: RunEvent.of(claim, self._run))
        self._open: tuple[Services, asyncio.AbstractEventLoop] | None = None
        self._stack: AsyncExitStack | None = None

    @classmethod
    def from_env(cls, *, worker: bool | None = None) -> Self:
        """A tracker with the settings of the environment and of the file in TRACKER_CONFIG.

        Opens nothing. Raises `SettingsError`, which names each wrong setting.
        """
        loaded = read_settings()
        tracker = cls(loaded.settings, worker=worker)
        tracker._loaded = loaded
        return tracker

    async def __aenter__(self) -> Self:
        if self._stack is not None:
            raise TrackerNotOpen(
                "this tracker is open already: open it once, and share it between tasks"
            )
        self._stack = stack = AsyncExitStack()
        handlers = self._handlers.all
        works = (self._mounted or bool(handlers)) if self._worker is None else self._worker
        background = works or self._mounted
        # With the files of `from_env`, so that secrets can be rotated.
        rotation = Rotation(self.settings, self._loaded, self._loaded and read_settings)
        try:
            services = await stack.enter_async_context(
                open_services(rotation, background=background, handlers=handlers)
            )
            if not background:  # other processes' news still arrives at once
                await stack.enter_async_context(services.signals)
            if works:
                worker = Worker(services)
                await worker.start()
                stack.push_async_callback(worker.stop)
            self._open = services, asyncio.get_running_loop()
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
        stack, self._open = self._stack, None
        try:
            if stack is not None:
                await stack.aclose()
        finally:
            self._stack = None

    def _closed_copy(self) -> Self:
        """The same tracker for a child process, whose parent may have opened this one."""
        closed = copy(self)
        closed._open = closed._stack = None
        return closed

    def _services(self) -> Services:
        """What the tracker opened. Raises `TrackerNotOpen`."""
        if self._open is None:
            raise TrackerNotOpen(
                "the tracker is not open: use it within `async with tracker:`, "
                "or with the lifespan of the application that it is mounted in"
            )
        services, loop = self._open
        if asyncio.get_running_loop() is not loop:
            raise TrackerNotOpen(
                "the tracker was opened in another event loop: open one in this loop, "
                "or use tracker.sync.Tracker"
            )
        return services

    async def start(
        self,
        technique: str,
        inputs: InputValues = (),
        *,
        idempotency_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        workspace_id: str | None = None,
        timeout: float | None = None,
    ) -> Run:
        """Start a run of a technique (its id or slug), once per `idempotency_key`.

        `inputs` has a value for each input, by its id: text, a number or a boolean, several in a
        list; `None` leaves an input out. Types come from the technique's definition. Inputs as the
        API takes them, `{"id", "type", "value"}` each, are possible too.

        The same key again returns the run that it started, and never pays twice. `timeout` is for
        how many seconds (by default 24) to try while FLORA or the database does not answer, and to
        wait where it is in doubt what became of the start.

        Raises `InvalidRequest` with every wrong field, `BudgetExceeded`, `IdempotencyConflict`,
        `StartPending` (ask again with the same key), `StartUnresolved`, `FloraError`,
        `SettingsError` without an API key, and `StoreUnavailable`.
        """
        services = self._services()
        key = f"trk-{uuid4()}" if idempotency_key is None else idempotency_key
        checked = _checked_tags(tags)
        give_up = time.monotonic() + (START_SECONDS if timeout is None else timeout)
        with acting(Principal(name=ACTOR)):
            while True:
                left = max(give_up - time.monotonic(), 0.0)
                try:
                    request = StartRequest(
                        technique=technique,
                        inputs=await given_inputs(services, technique, inputs, workspace_id),
                        workspace_id=workspace_id,
                        idempotency_key=key,
                        started_by=ACTOR,
                        tags=checked,
                    )
                    started = await services.starter.start(request, wait=left)
                    return self._run(started.record)
                except (
                    FloraUnreachable,
                    RateLimited,
                    StartNotStored,
                    StartPending,
                    StoreUnavailable,
                ) as error:
                    left = give_up - time.monotonic()
                    if left <= 0:
                        error.add_note(f"The start's idempotency key is {key!r}.")
                        raise
                    await asyncio.sleep(min(RETRY_EVERY, left))

    async def get(self, run_id: str) -> Run:
        """The run as it is stored. Raises `RunUnknown` and `StoreUnavailable`."""
        record = None
        if "\0" not in run_id:
            record = await read.get_run(self._services().database, run_id)
        if record is None:
            raise RunUnknown([run_id])
        return self._run(record)

    async def runs(
        self,
        *,
        status: str | None = None,
        technique_id: str | None = None,
        workspace_id: str | None = None,
        project_id: str | None = None,
        tag: str | None = None,
        tracking: Tracking | str | None = None,
        retry_advice: RetryAdvice | str | None = None,
    ) -> AsyncGenerator[Run, None]:
        """All stored runs that match every filter, newest first; `tag` is `key=value`.

        They are read in pages as the loop goes on, so that it can be left at any time. Raises
        `InvalidRequest` for a filter that no run can match, and `StoreUnavailable`.
        """
        cursor: str | None = None
        while True:
            records, cursor = await read.list_runs(
                self._services().database,
                status=status,
                technique_id=technique_id,
                workspace_id=workspace_id,
                project_id=project_id,
                tag=tag,
                tracking=tracking,
                retry_advice=retry_advice,
                cursor=cursor,
                limit=PAGE_SIZE,
            )
            for record in records:
                yield self._run(record)
            if cursor is None:
                return

    @overload
    async def wait(  # type: ignore[overload-overlap]  # an id is a sequence of letters
        self, runs: Run | str, timeout: float | None = None, *, raise_on_failure: bool = True
    ) -> Run: ...

    @overload
    async def wait(
        self,
        runs: Iterable[Run | str],
        timeout: float | None = None,
        *,
        raise_on_failure: bool = True,
    ) -> list[Run]: ...

    async def wait(
        self,
        runs: Run | str | Iterable[Run | str],
        timeout: float | None = None,
        *,
        raise_on_failure: bool = True,
    ) -> Run | list[Run]:
        """Wait until one run, or each of several, has ended; return them as they are then.

        The database is followed: it does not matter which process or callback brings the news, and
        a run that no process polls is polled from here. Cancelling it, or a `timeout` (seconds),
        ends the wait alone.

        Raises `RunFailed` if a run did not complete, and `RunLost` if FLORA has no such run; of
        several, when all have ended. Without `raise_on_failure` such runs are returned like the
        others. Raises `WaitTimeout`, `RunUnknown`, and `StoreUnavailable` if the database does not
        answer for a minute.
        """
        wanted = [runs] if isinstance(runs, Run | str) else list(runs)
        ended = {run.run_id: run async for run in self.as_settled(wanted, timeout=timeout)}
        result = [ended[following.id_of(run)] for run in wanted]
        if raise_on_failure:
            following.raise_failures(result)
        return result[0] if isinstance(runs, Run | str) else result

    async def as_settled(
        self, runs: Iterable[Run | str], *, timeout: float | None = None
    ) -> AsyncGenerator[Run, None]:
        """Each of the runs as it ends, also one that failed or is lost.

        Raises `WaitTimeout`, `RunUnknown`, and `StoreUnavailable` as `wait` does.
        """
        records = following.as_settled(self._services(), map(following.id_of, runs), timeout)
        async for record in records:
            yield self._run(record)

    async def events_of(self, run: Run | str) -> list[Event]:
        """The timeline of a run, oldest event first. Raises `RunUnknown`, `StoreUnavailable`."""
        run_id = following.id_of(run)
        events = await read.events(self._services().database, run_id)
        if not events:
            await self.get(run_id)
        return [Event.of(event) for event in events]

    def on(
        self,
        *events: EventName,
        name: str,
        workspace_id: str | None = None,
        technique_id: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        concurrency: int = MOST_OPEN,
        timeout: float = TIMEOUT,
    ) -> Callable[[HandlerFunction], HandlerFunction]:
        """Call the decorated function with a `RunEvent` for each event of the runs that match.

        The function is a `def` or an `async def`; it gets `run.settled` if no event is given, of
        the runs that match all filters::

            @tracker.on("run.settled", name="store-image", status="completed")
            async def store_image(event: RunEvent) -> None: ...

        The handler is an endpoint of the database under its `name`: an event is delivered at least
        once, also after a crash or a restart, and repeated by the schedule of endpoints until the
        function returns. An exception is a failed attempt; `tracker.errors.DoNotRetry` gives the
        message up. `tag` is `key=value`.

        At most `concurrency` calls run at a time, over all processes. After `timeout` seconds an
        attempt counts as failed: a coroutine is cancelled, a plain function goes on in its thread.
        Handlers are called where a worker runs; register them before the tracker is opened.

        Raises `SettingsError` for a wrong argument, a name that is taken, and an open tracker.
        """
        if self._stack is not None:
            raise SettingsError(
                f"handler {name!r}: the tracker is open; register handlers before it is opened"
            )
        return self._handlers.register(
            events=events or ("run.settled",),
            name=name,
            workspace_id=workspace_id,
            technique_id=technique_id,
            status=status,
            tag=tag,
            concurrency=concurrency,
            timeout=timeout,
        )

    def _run(self, record: Record | Mapping[str, Any]) -> Run:
        return Run.bound(record, self)


def _checked_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    try:
        return check_tags(tags or {})
    except ValueError as error:
        raise InvalidRequest(str(error), [FieldFault("tags", str(error))]) from error
