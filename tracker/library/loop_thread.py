"""An open tracker on an event loop in a daemon thread of its own, for callers without a loop."""

import asyncio
import os
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from concurrent.futures.thread import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar

from tracker.core.log import get_logger
from tracker.errors import TrackerNotOpen

T = TypeVar("T")
Work = Coroutine[Any, Any, T]

log = get_logger(__name__)

CLOSED: Final = "the tracker is closed: open it again with `with tracker:`"


class LoopThread:
    """Opens `tracker` in a new thread, and runs coroutines there for any number of threads.

    The constructor returns when it is open, and raises what opening raised.
    """

    def __init__(self, tracker: AbstractAsyncContextManager[object]) -> None:
        self._lock = threading.Lock()
        self._closing = False
        self._stop = asyncio.Event()
        self._calls: set[asyncio.Task[Any]] = set()
        self._opened = Future[None]()
        self._ended = Future[None]()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix="tracker"))
        self._main = self._loop.create_task(self._serve(tracker))
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()
        _running.add(self)
        try:
            self._opened.result()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(self._main.cancel)
            raise
        except BaseException:
            _running.discard(self)  # nothing was opened, and its loop is closed
            raise

    def call(self, work: Work[T]) -> T:
        """The result of `work`. Ctrl-C ends the call at once, and cancels nothing but `work`.

        Raises `TrackerNotOpen` after `close`, also in calls that are under way.
        """
        with self._lock:
            if self._closing or threading.current_thread() is self._thread:
                work.close()
                raise TrackerNotOpen(
                    CLOSED
                    if self._closing
                    else "a blocking tracker cannot be used in its own event loop"
                )
            future = asyncio.run_coroutine_threadsafe(self._counted(work), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise TrackerNotOpen("the tracker was closed during this call") from None
        finally:
            future.cancel()  # does nothing unless Ctrl-C interrupted the wait

    def stop(self) -> None:
        """End the calls that are under way, and close the tracker, without waiting for it."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        """As `stop`, and wait until all is closed; raises what closing raised."""
        self.stop()
        self._ended.result()

    async def _serve(self, tracker: AbstractAsyncContextManager[object]) -> None:
        async with tracker:
            self._opened.set_result(None)
            await self._stop.wait()
            await _end(self._calls)

    async def _counted(self, work: Work[T]) -> T:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # it runs in one
        self._calls.add(task)
        try:
            return await work
        finally:
            self._calls.discard(task)

    def _run(self) -> None:
        try:
            try:
                self._loop.run_until_complete(self._main)
            finally:
                self._loop.run_until_complete(_end(asyncio.all_tasks(self._loop)))
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
                # Does not wait for the loop's worker threads, as `asyncio.run` does: one may be
                # waiting for this.
                self._loop.close()
        except BaseException as error:
            for future in (self._opened, self._ended):
                if not future.done():
                    future.set_exception(error)
        else:
            self._ended.set_result(None)


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in (ending := tasks - {asyncio.current_task()}):
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


def _close_all() -> None:
    for one in list(_running):
        try:
            one.close()
        except Exception:
            log.exception("tracker.close_failed")


_running: Final = weakref.WeakSet[LoopThread]()
# `atexit` is too late: by then `concurrent.futures` has ended the threads that write to SQLite. It
# registered that here, when it was imported above, and what is registered last is called first.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_running.clear)  # the parent closes its own
