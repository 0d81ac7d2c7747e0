"""Group commit: items that wait are committed together, and answered after their commit.

Nothing waits for a group to fill: an item that comes alone is committed alone, and items that come
during a commit share the next one. So the cost of a commit is shared exactly under load. The queue
is bounded in items and in bytes: while the database is down, what does not fit is refused.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

from tracker.core.errors import SchemaOutdated, StoreError, StoreUnavailable
from tracker.core.log import LogRateLimit, get_logger
from tracker.core.waiting import repeat
from tracker.store.errors import StoreBusy

T = TypeVar("T")
R = TypeVar("R")

MAX_GROUP: Final = 500
"""The most items in one transaction."""
MAX_GROUP_BYTES: Final = 8 * 1024 * 1024
"""The most bytes in one transaction; the last item may exceed it."""
MAX_WAITING: Final = 20_000
MAX_WAITING_BYTES: Final = 64 * 1024 * 1024
DEADLINE: Final = 7.0
"""Seconds that an item waits for its commit: FLORA waits ten for the answer to a callback."""
RETRY_SECONDS: Final = (0.05, 1.0)
"""The first and the longest wait before an unavailable database is tried again."""

OnWrite = Callable[[int, float, Exception | None], None]
"""Called after each attempt to commit: number of items, seconds, and the error if it failed."""

log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T, R]):
    """A queued item; `expires` is in the event loop's time."""

    item: T
    size: int
    answer: asyncio.Future[R]
    expires: float


@dataclass(kw_only=True, eq=False)
class GroupCommit(ABC, Generic[T, R]):
    """Commits items in groups; a subclass says how. Used as `async with` block.

    Leaving the block commits what waits; later items are refused with `StoreUnavailable`, and so is
    what still waits if that is cancelled. `deadline` is how many seconds an item waits until its
    caller gets an error. `on_write` is called after each attempt to commit. `trouble` is why the
    last one failed.
    """

    name: ClassVar[str]
    """The name of task and loop in the log."""
    max_group: int = MAX_GROUP
    max_waiting: int = MAX_WAITING
    max_waiting_bytes: int = MAX_WAITING_BYTES
    deadline: float = DEADLINE
    on_write: OnWrite = lambda *_: None

    def __post_init__(self) -> None:
        self._queue: deque[_Waiting[T, R]] = deque()
        self._bytes = 0
        self._writing: list[_Waiting[T, R]] = []
        self._arrived = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._log_limit = LogRateLimit()
        self._is_reported = False
        self.trouble: Exception | None = None

    @abstractmethod
    async def _commit(self, items: list[T]) -> Sequence[R]:
        """Commit a group; the result of each item, in order."""

    def _size(self, item: T) -> int:
        """The bytes of an item, as they count in a group and in the queue."""
        return 0

    async def __aenter__(self) -> Self:
        committing = repeat(
            self.name, self._commit_next, is_over=lambda: self._closing and not self._queue
        )
        self._task = asyncio.create_task(committing, name=self.name)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._arrived.set()
        try:
            if self._task is not None:
                await asyncio.wait([self._task])
        finally:
            if self._task is not None:
                self._task.cancel()
            if self._timer is not None:
                self._timer.cancel()
            for waiting in (*self._writing, *self._queue):
                self._give_up(waiting)

    @property
    def waiting(self) -> int:
        """How many items are not committed yet."""
        return len(self._queue) + sum(not one.answer.done() for one in self._writing)

    def enqueue(self, item: T) -> asyncio.Future[R]:
        """Queue an item; the future holds its result once it is committed.

        The future raises `StoreUnavailable` if the item was not committed in time (it still may
        be), and `StoreError` if the database refuses this very item. Raises `StoreUnavailable` if
        the queue is full or closed.
        """
        size = self._size(item)
        self._check_space(1, size)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(item, size, loop.create_future(), loop.time() + self.deadline)
        self._queue.append(waiting)
        self._bytes += size
        self._arrived.set()
        if self._timer is None:
            self._timer = loop.call_at(waiting.expires, self._expire)
        return waiting.answer

    def enqueue_all(self, items: Sequence[T]) -> list[asyncio.Future[R]]:
        """Queue all of the items or none; else as `enqueue`."""
        self._check_space(len(items), sum(map(self._size, items)))
        return [self.enqueue(item) for item in items]

    def _check_space(self, count: int, size: int) -> None:
        if self._closing or self._task is None or self._task.done():
            raise StoreUnavailable("the tracker is not running, or is shutting down")
        count, size = count + len(self._queue), size + self._bytes
        if count > self.max_waiting or size > self.max_waiting_bytes:
            raise StoreUnavailable("too many writes wait for the database") from self.trouble

    def _pop(self) -> _Waiting[T, R]:
        waiting = self._queue.popleft()
        self._bytes -= waiting.size
        return waiting

    def _expire(self) -> None:
        """Give up on items past their deadline. One timer serves all: all wait equally long."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._queue and self._queue[0].expires <= now:
            self._give_up(self._pop())
        for waiting in self._writing:
            if waiting.expires <= now:
                self._give_up(waiting)
        left = [waiting.expires for waiting in self._writing if waiting.expires > now]
        if self._queue:
            left.append(self._queue[0].expires)
        self._timer = loop.call_at(min(left), self._expire) if left else None

    def _give_up(self, waiting: _Waiting[T, R]) -> None:
        if not waiting.answer.done():
            why = f" ({self.trouble})" if self.trouble else ""
            error = StoreUnavailable(f"the database did not commit this in time{why}")
            error.__cause__ = self.trouble
            waiting.answer.set_exception(error)

    async def _commit_next(self) -> None:
        """Commit a group of what waits, or wait until something does."""
        group: list[_Waiting[T, R]] = []
        size = 0
        while self._queue and len(group) < self.max_group and size < MAX_GROUP_BYTES:
            group.append(self._pop())
            size += group[-1].size
        if not group:
            self._arrived.clear()
            await self._arrived.wait()
            return
        self._writing = group
        try:
            await self._commit_group(group)
        finally:
            for waiting in group:
                self._give_up(waiting)
            self._writing = []

    async def _commit_group(self, group: list[_Waiting[T, R]]) -> None:
        """Commit a group: whole or, where one of its items is refused, in ever smaller parts.

        An unavailable database is tried again until all items of the group have expired.
        """
        loop = asyncio.get_running_loop()
        parts = deque([group])
        pause, longest_pause = RETRY_SECONDS
        while parts:
            now = loop.time()
            part = [waiting for waiting in parts.popleft() if waiting.expires > now]
            if not part:
                continue
            items = [waiting.item for waiting in part]
            try:
                with reported(self.on_write, items, loop.time):
                    results = await self._commit(items)
            except Exception as exc:
                is_down = isinstance(exc, StoreUnavailable | SchemaOutdated)
                if not is_down or isinstance(exc, StoreBusy):
                    # Only the item that causes it may fail, such as one whose row is locked.
                    self._refuse_or_split(part, exc, parts)
                    continue
                self._note(exc)
                parts.appendleft(part)
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest_pause)
            else:
                if self.trouble is not None:
                    self._note(None)
                pause = RETRY_SECONDS[0]
                for waiting, result in zip(part, results, strict=True):
                    if not waiting.answer.done():
                        waiting.answer.set_result(result)

    def _note(self, trouble: Exception | None) -> None:
        """Log the first failure, at intervals, and the recovery from one that was logged."""
        if trouble is not None and self.trouble is None:
            now = asyncio.get_running_loop().time()
            self._is_reported = bool(self._log_limit.count("unavailable", now=now))
            if self._is_reported:
                log.warning("writer.unavailable", writer=self.name, error=str(trouble))
        elif trouble is None and self._is_reported:
            log.info("writer.recovered", writer=self.name)
            self._is_reported = False
        self.trouble = trouble

    def _refuse_or_split(
        self, part: list[_Waiting[T, R]], error: Exception, parts: deque[list[_Waiting[T, R]]]
    ) -> None:
        if len(part) > 1:
            # After the parts that wait: they may be free of errors.
            middle = len(part) // 2
            parts.extend([part[:middle], part[middle:]])
            return
        (waiting,) = part
        refused = error
        if not isinstance(error, StoreError):
            refused = StoreError(f"this cannot be stored: {type(error).__name__}: {error}")
            refused.__cause__ = error
        kind = type(waiting.item).__name__
        log.error("writer.refused", writer=self.name, error=str(refused), item=kind)
        if not waiting.answer.done():
            waiting.answer.set_exception(refused)


@contextmanager
def reported(on_write: OnWrite, items: Sized, monotonic: Callable[[], float]) -> Iterator[None]:
    """Call the hook after an attempt to commit these items, which failed or found any."""
    began = monotonic()
    error: Exception | None = None
    try:
        yield
    except Exception as exc:
        error = exc
        raise
    finally:
        if items or error is not None:
            call_hook(on_write, len(items), monotonic() - began, error)


def call_hook(hook: Callable[..., None], *args: Any) -> None:
    """Call a hook; its errors are logged and do not reach the writer."""
    try:
        hook(*args)
    except Exception:
        log.exception("writer.hook_failed")
