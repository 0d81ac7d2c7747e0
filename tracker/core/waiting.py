"""Waiting for events, for tasks that end, and for blocking calls in threads of their own; loops
that go on whatever happens."""

import asyncio
import contextvars
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final, TypeVar

from tracker.core.errors import StoreError
from tracker.core.log import LogRateLimit, get_logger

T = TypeVar("T")

REPEAT_AFTER: Final = (0.1, 1.0)
"""The first and the longest pause of a loop after failures in a row, in seconds."""

log = get_logger(__name__)


async def wait_for(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait for an event, at most so many seconds; whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


async def repeat(
    name: str,
    step: Callable[[], Awaitable[object]],
    *,
    pauses: tuple[float, float] = REPEAT_AFTER,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Call `step` again and again, until the task is cancelled or `is_over` is true between two
    calls. `step` itself waits until there is something to do.

    Whatever it raises is logged at intervals, under the loop's `name`, and it is called again after
    a pause: of `pauses[0]` seconds, doubling up to `pauses[1]` with each failure in a row. Errors
    of the database are expected; all others are faults of the tracker, and logged with a traceback.
    """
    limit, (pause, longest) = LogRateLimit(), pauses
    task = asyncio.current_task()
    while not is_over():
        failure: BaseException | None = None
        try:
            await step()
        except (Exception, asyncio.CancelledError) as error:
            failure = error
        if task is not None and task.cancelling():
            # The step may have made another error of it: one of the database, or a fault.
            if not isinstance(failure, StoreError | asyncio.CancelledError | None):
                log.exception("loop.failed", exc_info=failure, loop=name, count=1)
            raise asyncio.CancelledError
        if failure is None:
            pause = pauses[0]
            continue
        # A cancellation was one of something that the step waited for.
        if isinstance(failure, StoreError):
            if count := limit.count("down", now=time.monotonic()):
                log.warning("loop.database_down", loop=name, error=str(failure), count=count)
        elif count := limit.count("failed", now=time.monotonic()):
            log.exception("loop.failed", exc_info=failure, loop=name, count=count)
        await asyncio.sleep(pause)
        pause = min(2 * pause, longest)


async def cancel(*tasks: asyncio.Task[Any] | None, seconds: float | None = None) -> None:
    """Cancel tasks and wait, at most so many seconds, until they have ended, however they do."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running, timeout=seconds)


async def to_its_end(work: Coroutine[Any, Any, T], *, seconds: float) -> T:
    """The result of `work`, such as a write about a lease, which goes on though the caller is
    cancelled: one that were committed later would take again what was released, or not release it.

    The cancellation is raised when it has ended, or after so many seconds.
    """
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=seconds)
        raise


async def run_all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, run concurrently. If one fails, the others are cancelled and its error
    raised.

    A `TaskGroup` would leave its caller in a state of being cancelled on Python 3.11 and 3.12,
    which ends `repeat`.
    """
    tasks = [asyncio.create_task(one) for one in work]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await cancel(*tasks)
        errors = [task.exception() for task in tasks if not task.cancelled()]
    for error in errors:
        if error is not None:
            raise error
    return [task.result() for task in tasks]


class ClosingStack(AsyncExitStack):
    """An exit stack whose parts have `seconds` to close, all of them together.

    A part that is not done by then is cancelled, and so is each later one that waits for anything.
    That, and a database that does not answer, is logged and not raised; nor is it logged with
    `quiet`, as for a command, which reports a database that is gone itself.
    """

    def __init__(self, seconds: float, *, quiet: bool = False) -> None:
        super().__init__()
        self._seconds = seconds
        self._quiet = quiet
        self._until: float | None = None

    async def open(self, name: str, part: AbstractAsyncContextManager[T]) -> T:
        """Enter a block, which is left when the stack closes."""
        opened = await part.__aenter__()
        self.on_close(name, lambda: part.__aexit__(None, None, None))
        return opened

    def on_close(self, name: str, close: Callable[[], Awaitable[object]]) -> None:
        """Call `close` when the stack closes."""
        self.push_async_callback(self._close, name, close)

    async def _close(self, name: str, close: Callable[[], Awaitable[object]]) -> None:
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._until):
                await close()
        except (StoreError, TimeoutError) as error:
            if self._quiet:
                return
            log.info("close.unfinished", part=name, error=str(error) or "no time was left")


def in_thread(name: str, work: Callable[[], T]) -> asyncio.Future[T]:
    """Call `work` in a new thread; the future has its result, or what it raised.

    The threads of the event loop are few and shared, and a process that ends waits for them. These
    block neither another call nor the end of the process. A thread cannot be interrupted: it goes
    on when the future is cancelled.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # nothing cancels it from here on
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome.set_result(context.run(work))
        except (StopIteration, CancelledError) as odd:  # asyncio would misunderstand them
            outcome.set_exception(RuntimeError(f"{type(odd).__name__} was raised: {odd}"))
        except BaseException as raised:
            outcome.set_exception(raised)

    result = asyncio.wrap_future(outcome)
    result.add_done_callback(lambda done: done.cancelled() or done.exception())
    threading.Thread(target=run, name=name, daemon=True).start()
    return result
