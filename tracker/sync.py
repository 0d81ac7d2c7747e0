"""`Tracker` for code without an event loop: scripts, Django, Flask, notebooks.

::

    from tracker.sync import Tracker

    with Tracker.from_env() as tracker:
        run = tracker.start("icon-pack", {"prompt": "beach toys"}, idempotency_key="order-17")
        done = run.wait(timeout=600)
        print(done.charged_cost, [output.url for output in done.outputs])
"""

import asyncio
import inspect
import os
import threading
import weakref
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial, update_wrapper
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Concatenate,
    Final,
    ParamSpec,
    Self,
    TypeVar,
    cast,
    overload,
)

from tracker.core.events import HANDLER_SECONDS, MOST_OPEN
from tracker.core.run import Output
from tracker.errors import SettingsError, TrackerNotOpen
from tracker.library.batches import Batch as AsyncBatch
from tracker.library.batches import BatchFields, BatchResult
from tracker.library.client import Technique, VerifiedCallback
from tracker.library.client import Tracker as AsyncTracker
from tracker.library.loop_thread import CLOSED, LoopThread
from tracker.library.reading import ids_of, raise_failures
from tracker.library.run import (
    Event,
    EventName,
    Owned,
    RunChange,
    RunEventFields,
    RunFields,
    RunList,
)
from tracker.library.run import Run as AsyncRun

if TYPE_CHECKING:
    from tracker.settings import Settings
    from tracker.store.writing.messages import Claim

__all__ = ["Batch", "BatchResult", "Event", "Output", "Run", "RunChange", "RunEvent", "Tracker"]

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
B = TypeVar("B", "Run", "Batch", AsyncBatch)
HandlerFunction = TypeVar("HandlerFunction", bound="Callable[[RunEvent], object]")


def _copied(kind: type[B], value: RunFields | BatchFields, owner: Any) -> B:
    """The same value as a `kind`, which belongs to `owner`."""
    copied = kind(**{one.name: getattr(value, one.name) for one in fields(kind)})
    return copied._given_to(owner)


def _run_of(owner: "Tracker", run: RunFields) -> "Run":
    return _copied(Run, run, owner)


def _batch_of(owner: "Tracker", batch: BatchFields) -> "Batch":
    return _copied(Batch, batch, owner)


def _change_of(owner: "Tracker", change: RunChange[AsyncRun]) -> "RunChange[Run]":
    changed: RunChange[Run] = cast("Any", replace)(change, run=_run_of(owner, change.run))
    return changed


def _results_of(owner: "Tracker", rows: "list[BatchResult[AsyncRun]]") -> "list[BatchResult[Run]]":
    def copied(row: "BatchResult[AsyncRun]") -> "BatchResult[Run]":
        runs = tuple(_run_of(owner, run) for run in row.runs)
        found: BatchResult[Run] = cast("Any", replace)(row, run=next(iter(runs), None), runs=runs)
        return found

    return [*map(copied, rows)]


def _technique_of(owner: "Tracker", technique: Technique) -> "Technique":
    return technique


def _same(owner: "Tracker", value: T) -> "T":
    return value


def _document(call: Callable[..., Any], method: Callable[..., Any], returns: str) -> None:
    """Show the name, documentation and parameters of `method` for `call`, and what that returns."""
    update_wrapper(call, method)
    signature = inspect.signature(method)
    if returns != "T":  # else the same
        signature = signature.replace(return_annotation=returns)
    vars(call)["__signature__"] = signature


def _blocking(
    method: Callable[Concatenate[AsyncTracker, P], Coroutine[Any, Any, T]],
    shown: "Callable[[Tracker, T], S]",
) -> "Callable[Concatenate[Tracker, P], S]":
    """`method` with the same parameters and documentation, blocking; `shown` makes its result."""

    def call(self: "Tracker", /, *args: P.args, **options: P.kwargs) -> S:
        return shown(self, self._call(method(self._tracker, *args, **options)))

    _document(call, method, shown.__annotations__["return"])
    return call


def _stepwise(
    method: Callable[Concatenate[AsyncTracker, P], AsyncGenerator[T, None]],
    shown: "Callable[[Tracker, T], S]",
) -> "Callable[Concatenate[Tracker, P], Iterator[S]]":
    """As `_blocking`, for a method that yields its results."""

    def call(self: "Tracker", /, *args: P.args, **options: P.kwargs) -> Iterator[S]:
        items = self._iterate(method(self._tracker, *args, **options))
        return map(partial(shown, self), items)

    _document(call, method, f"Iterator[{shown.__annotations__['return']}]")
    return call


def _of_batch(
    method: Callable[Concatenate[AsyncBatch, P], Coroutine[Any, Any, T]],
    shown: "Callable[[Tracker, T], S]",
) -> "Callable[Concatenate[Batch, P], S]":
    """As `_blocking`, for a method of a batch."""

    def call(self: "Batch", /, *args: P.args, **options: P.kwargs) -> S:
        asynchronous = _copied(AsyncBatch, self, self._tracker._tracker)
        called = self._tracker._call(method(asynchronous, *args, **options))
        return shown(self._tracker, called)

    _document(call, method, shown.__annotations__["return"])
    return call


class Tracker:
    """A tracker on the database and the FLORA workspaces that the settings name.

    The methods are those of `tracker.Tracker`, with the same parameters and errors; they block.
    Any number of threads may call them. Ctrl-C ends a call at once: a run that is waited for stays
    tracked.

    A tracker opens at the first call and closes at exit, so that a web application keeps one in a
    module; each process that is forked opens its own (on SQLite only where the parent had not yet
    opened it). `with` opens it at once and closes it at the
    end of the block. A closed tracker ends the calls of other threads with `TrackerNotOpen`.

    `worker` decides whether polling, sweeps and deliveries run in this process; see
    `tracker.Tracker`. An event loop runs in a daemon thread of its own, so that these methods work
    in a notebook too.
    """

    _inherits_sqlite: ClassVar[bool] = False

    def __init__(self, settings: "Settings | None" = None, *, worker: bool | None = None) -> None:
        """A tracker with these settings, by default those of `from_env`; opens nothing."""
        self._tracker = AsyncTracker(settings, worker=worker)
        self.settings: Settings = self._tracker.settings
        self._lock = threading.Lock()
        self._running: LoopThread | None = None
        self._entered = self._closed = False
        _trackers.add(self)

    @classmethod
    def from_env(cls, *, worker: bool | None = None) -> Self:
        """A tracker with the settings of the environment and of the file in TRACKER_CONFIG.

        Opens nothing. Raises `SettingsError`, which names each wrong setting.
        """
        return cls(worker=worker)

    def __enter__(self) -> Self:
        with self._lock:
            if self._entered:
                raise TrackerNotOpen("this tracker is open already: open it once, and share it")
            if self._running is None:
                self._open()
            self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the tracker before the process exits; `with` opens it again."""
        with self._lock:
            running, self._running = self._running, None
            self._closed, self._entered = True, False
            if running is not None:
                self._finalizer.detach()
        if running is not None:
            running.close()

    start = _blocking(AsyncTracker.start, _run_of)
    track = _blocking(AsyncTracker.track, _run_of)
    get = _blocking(AsyncTracker.get, _run_of)
    runs = _stepwise(AsyncTracker.runs, _run_of)
    as_settled = _stepwise(AsyncTracker.as_settled, _run_of)
    events_of = _blocking(AsyncTracker.events_of, _same)
    events = _stepwise(AsyncTracker.events, _change_of)
    spending = _blocking(AsyncTracker.spending, _same)
    receive_callback = _blocking(AsyncTracker.receive_callback, _same)
    start_batch = _blocking(AsyncTracker.start_batch, _batch_of)
    batch = _blocking(AsyncTracker.batch, _batch_of)
    batches = _stepwise(AsyncTracker.batches, _batch_of)
    download = _blocking(AsyncTracker.download, _same)
    techniques = _stepwise(AsyncTracker.techniques, _technique_of)
    technique = _blocking(AsyncTracker.technique, _same)

    @overload
    def wait(  # type: ignore[overload-overlap]  # an id is a sequence of letters
        self, runs: "Run | str", timeout: float | None = None, *, raise_on_failure: bool = True
    ) -> "Run": ...

    @overload
    def wait(
        self,
        runs: "Iterable[Run | str]",
        timeout: float | None = None,
        *,
        raise_on_failure: bool = True,
    ) -> "list[Run]": ...

    def wait(
        self,
        runs: "Run | str | Iterable[Run | str]",
        timeout: float | None = None,
        *,
        raise_on_failure: bool = True,
    ) -> "Run | list[Run]":
        """Wait until one run, or each of several, has ended; return them as they are then.

        See `tracker.Tracker.wait`. Raises `RunFailed` and `RunLost` unless `raise_on_failure` is
        false, `WaitTimeout` after `timeout` seconds, `RunUnknown` and `StoreUnavailable`.
        """
        ending = self._tracker.wait(ids_of(runs), timeout, raise_on_failure=False)
        ended = RunList(map(partial(_run_of, self), self._call(ending)))
        if raise_on_failure:  # here: the error's runs are of this tracker
            raise_failures(ended)
        return ended[0] if isinstance(runs, RunFields | str) else ended

    def on(
        self,
        *events: EventName,
        name: str,
        workspace_id: str | None = None,
        technique_id: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        concurrency: int = MOST_OPEN,
        timeout: float = HANDLER_SECONDS,
    ) -> Callable[[HandlerFunction], HandlerFunction]:
        """Call the decorated function with a `RunEvent` for each event of the runs that match.

        See `tracker.Tracker.on`. Each call has a thread of its own, and may use the tracker; a
        coroutine function is refused with `SettingsError`. Events arrive from when the tracker is
        opened, by `with` or the first call.
        """
        register = self._tracker._register(
            self._event,
            events=events or ("run.settled",),
            name=name,
            workspace_id=workspace_id,
            technique_id=technique_id,
            status=status,
            tag=tag,
            concurrency=concurrency,
            timeout=timeout,
        )

        def decorate(function: HandlerFunction) -> HandlerFunction:
            if inspect.iscoroutinefunction(function):
                raise SettingsError(
                    f"handler {name!r}: a coroutine would block this tracker: use def, "
                    "or tracker.Tracker"
                )
            return cast("HandlerFunction", register(cast("Any", function)))

        return decorate

    def _event(self, claim: "Claim") -> "RunEvent":
        return RunEvent._of(claim, lambda shown: _copied(Run, RunFields.from_json(shown), self))

    def verify_callback(self, body: bytes, headers: Mapping[str, str]) -> VerifiedCallback:
        """The callback in a request that an application received itself; stores nothing."""
        return self._tracker.verify_callback(body, headers)

    def _open(self) -> LoopThread:
        if self._inherits_sqlite and self._on_sqlite:
            raise TrackerNotOpen(
                "this process was forked while the tracker was open, and SQLite cannot be used "
                "after that: open the tracker after the fork, start processes with "
                'multiprocessing.get_context("spawn"), or use PostgreSQL'
            )
        self._running = LoopThread(self._tracker)
        self._finalizer = weakref.finalize(self, self._running.stop)
        self._closed = False
        return self._running

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        running = self._running
        try:
            if running is None:
                with self._lock:
                    if self._closed:
                        raise TrackerNotOpen(CLOSED)
                    running = self._running or self._open()
        except BaseException:
            work.close()
            raise
        return running.call(work)

    def _iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        lock = asyncio.Lock()  # a step that Ctrl-C interrupted may still be ending

        async def locked(step: Callable[[], Awaitable[S]]) -> S:
            async with lock:
                return await step()

        try:
            while (item := self._call(locked(lambda: anext(items, _END)))) is not _END:
                yield cast("T", item)
        finally:
            with suppress(TrackerNotOpen):  # closing ended it
                self._call(locked(items.aclose))

    def _forked(self) -> None:
        """In a child process: leave what the parent opened as it is, and open anew when needed."""
        # Kept, because their destructors would disturb the parent's connections.
        _of_parent.append((self._running, self._tracker))
        if self._running is not None:
            self._finalizer.detach()
        self._running = None
        self._lock = threading.Lock()
        self._tracker = self._tracker._closed_copy()

    @property
    def _on_sqlite(self) -> bool:
        return self.settings.tracker_database_url.startswith("sqlite")


class Run(RunFields, Owned[Tracker]):
    """A run, as it was when it was read, and what can be done with it."""

    __slots__ = ("_owner",)

    def wait(self, timeout: float | None = None, *, raise_on_failure: bool = True) -> "Run":
        """The run when it has ended; see `Tracker.wait`."""
        return self._tracker.wait(self, timeout=timeout, raise_on_failure=raise_on_failure)

    def refresh(self) -> "Run":
        """The run as it is stored now. Raises `RunUnknown` and `StoreUnavailable`."""
        return self._tracker.get(self.run_id)

    def events(self) -> list[Event]:
        """The timeline of the run, oldest event first. Raises `StoreUnavailable`."""
        return self._tracker.events_of(self)


class Batch(BatchFields, Owned[Tracker]):
    """A batch, as it was when it was read, and what can be done with it."""

    __slots__ = ("_owner",)

    wait = _of_batch(AsyncBatch.wait, _batch_of)
    refresh = _of_batch(AsyncBatch.refresh, _batch_of)
    results = _of_batch(AsyncBatch.results, _results_of)
    stop = _of_batch(AsyncBatch.stop, _batch_of)
    retry = _of_batch(AsyncBatch.retry, _batch_of)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent(RunEventFields):
    """An event of a run, as a handler gets it; see `tracker.RunEvent`."""

    run: Run


def __dir__() -> list[str]:
    return [name for name in globals() if name.startswith("__") or name in __all__]


def _after_fork() -> None:
    # The library keeps the parent's locks in the memory of the child, which would take them for its
    # own: it could neither write nor keep others from writing (sqlite.org/howtocorrupt.html, 2.6).
    if any(one._on_sqlite and one._tracker._stack is not None for one in _trackers):
        Tracker._inherits_sqlite = True
    for tracker in list(_trackers):
        tracker._forked()


_END: Final = object()
_trackers: Final = weakref.WeakSet[Tracker]()
_of_parent: Final[list[object]] = []
os.register_at_fork(after_in_child=_after_fork)
