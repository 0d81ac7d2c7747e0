"""Bounds in time that cost next to nothing, for what comes by the thousand and is seldom late."""

import asyncio
from collections import deque
from types import TracebackType
from typing import Self


class Bounds:
    """Gives everything the same `seconds`. Used as `with bounds.begin(loop.time()):`.

    It does what `asyncio.timeout` does, but for a timer each: whoever began first is late first, so
    that one timer will do for all.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: deque[_Bound] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, now: float) -> "_Bound":
        """A bound on the block that begins `now`, by the running loop's clock; it raises
        `TimeoutError` where the block takes longer."""
        return _Bound(self, now + self._seconds)

    def add(self, bound: "_Bound") -> None:
        """Watch over a bound whose block has begun."""
        running = self._running
        while running and running[0].task is None:  # over in time
            running.popleft()
        running.append(bound)
        if self._timer is None:
            self._set(bound)

    def _set(self, first: "_Bound") -> None:
        self._timer = asyncio.get_running_loop().call_at(first.at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        running = self._running
        while running:
            first = running[0]
            if first.task is not None:
                if first.at > now:
                    self._set(first)
                    return
                first.is_late = True
                first.task.cancel()
            running.popleft()


class _Bound:
    """One block's bound. `task` is who is in the block; `None` once the block is over."""

    __slots__ = ("_bounds", "_cancelling", "at", "is_late", "task")

    def __init__(self, bounds: Bounds, at: float) -> None:
        self._bounds = bounds
        self.at = at
        self.is_late = False
        self.task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker
        self.task = task
        self._cancelling = task.cancelling()
        self._bounds.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task, self.task = self.task, None
        if not self.is_late or task is None:
            return
        # As in asyncio.timeout: one who was cancelled by somebody else as well stays cancelled.
        if task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error
