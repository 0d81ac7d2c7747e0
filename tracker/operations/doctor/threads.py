"""Threads that hang hold nothing up.

The look-up of a name, or a file on a disk that is gone, can hang for minutes in a call that nobody
can break off. An event loop waits for such threads when it is closed, and the process for them when
it ends. These are left behind instead.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Forsaking(ThreadPoolExecutor):
    """A thread for each call, for which nobody waits at the end."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call it in a thread of its own."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=call, daemon=True, name="forsaking").start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave behind what still runs."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, with such threads."""
    with asyncio.Runner() as runner:
        runner.get_loop().set_default_executor(Forsaking())
        return runner.run(work)
