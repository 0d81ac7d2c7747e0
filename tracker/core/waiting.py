"""Waiting for events, for tasks that end, and for blocking calls in threads of their own."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def wait_for(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait for an event, at most so many seconds; whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


async def cancel(*tasks: asyncio.Task[Any] | None, seconds: float | None = None) -> None:
    """Cancel tasks and wait, at most so many seconds, until they have ended, however they do."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running, timeout=seconds)


def in_thread(name: str, work: Callable[[], T]) -> asyncio.Future[T]:
    """Call `work` in a new thread; the future has its result, or what it raised.

    The threads of the event loop are few and shared, and a process that ends waits for them. These
    block neither another call nor the end of the process. A thread cannot be interrupted: it goes
    on when the future is cancelled.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    context = contextvars.copy_context()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = context.run(work)
        except StopIteration as stopped:  # a future refuses it
            error = RuntimeError(f"StopIteration was raised: {stopped}")
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
