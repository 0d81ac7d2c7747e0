"""Group commit: whatever waits is committed together, and answered after its commit.

Nothing waits for company: an item that comes alone is committed alone, and while that commit is
under way the next ones queue. So the cost of a commit is shared exactly where there is load. The
queue is bounded in number and in bytes: what cannot be kept while the database is down is refused
while there is memory left to refuse it with.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Self, TypeVar

import structlog

from tracker.core.errors import SchemaOutdated, StoreError, StoreUnavailable
from tracker.core.rate_limited_log import Seldom
from tracker.store.errors import StoreBusy

T = TypeVar("T")
R = TypeVar("R")

MAX_GROUP: Final = 500
"""The most items in one transaction."""
MAX_GROUP_BYTES: Final = 8 * 1024 * 1024
"""The most bytes of callback bodies in one transaction; the last one may go beyond it."""
MAX_WAITING: Final = 20_000
MAX_WAITING_BYTES: Final = 64 * 1024 * 1024
"""How many items, and bytes of callback bodies, wait at most."""
DEADLINE: Final = 7.0
"""Seconds that an item waits for its commit: FLORA gives a callback ten."""
PAUSE_SECONDS: Final = (0.05, 1.0)
"""The first and the longest wait before a database that is down is tried again."""

OnWrite = Callable[[int, float, Exception | None], None]
"""Called after each attempt to commit: how many items, in how many seconds, and what stopped it,
if anything did."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T, R]):
    """An item, and who waits for it until `expires`, by the event loop's clock."""

    item: T
    answer: asyncio.Future[R]
    expires: float


class GroupCommit(Generic[T, R]):
    """Takes items and commits them in groups. Used as `async with GroupCommit(…) as group`.

    `commit` writes a group and returns what came of each item, in order. `deadline` is how long, in
    seconds, an item waits before its caller is told that it was not committed in time.
    """

    def __init__(
        self,
        commit: Callable[[list[T]], Awaitable[Sequence[R]]],
        *,
        name: str,
        size: Callable[[T], int] = lambda _: 0,
        max_group: int = MAX_GROUP,
        max_waiting: int = MAX_WAITING,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        deadline: float = DEADLINE,
        on_write: Sequence[OnWrite] = (),
    ) -> None:
        self._commit = commit
        self._name = name
        self._size = size
        self._max_group = max_group
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._deadline = deadline
        self._on_write = tuple(on_write)
        self._queue: deque[_Waiting[T, R]] = deque()
        self._bytes = 0
        self._writing: list[_Waiting[T, R]] = []
        self._arrived = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._trouble: StoreError | None = None
        self._seldom = Seldom()
        self._is_reported = False

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def start(self) -> None:
        """Begin to commit what comes, in the running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=self._name)

    async def aclose(self) -> None:
        """Commit what waits, then stop. What comes later is refused with `StoreUnavailable`."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._timer is not None:
            self._timer.cancel()

    @property
    def waiting(self) -> int:
        """How many items are not committed yet."""
        return len(self._queue) + len(self._writing)

    @property
    def trouble(self) -> StoreError | None:
        """Why the last attempt to commit failed; `None` where it did not."""
        return self._trouble

    def enqueue(self, item: T) -> asyncio.Future[R]:
        """Queue an item; the future holds what came of it once it is committed.

        It raises `StoreUnavailable` where the item was not committed in time (it still may be), and
        `StoreError` where the database refuses this very item. Raises `StoreUnavailable` where
        there is no room for it, or nothing is committed any more.
        """
        size = self._size(item)
        self._refuse_if_full(1, size)
        return self._queue_one(item, size)

    def enqueue_all(self, items: Sequence[T]) -> list[asyncio.Future[R]]:
        """Queue items, all of them or none; else as `enqueue`."""
        sizes = [self._size(item) for item in items]
        self._refuse_if_full(len(items), sum(sizes))
        return [self._queue_one(item, size) for item, size in zip(items, sizes, strict=True)]

    def _refuse_if_full(self, count: int, size: int) -> None:
        if self._closing or self._task is None or self._task.done():
            raise StoreUnavailable("the tracker is not running, or is shutting down")
        if (
            len(self._queue) + count > self._max_waiting
            or self._bytes + size > self._max_waiting_bytes
        ):
            raise StoreUnavailable(
                "too much waits to be written to the database"
            ) from self._trouble

    def _queue_one(self, item: T, size: int) -> asyncio.Future[R]:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(item, loop.create_future(), loop.time() + self._deadline)
        self._queue.append(waiting)
        self._bytes += size
        if not self._arrived.is_set():
            self._arrived.set()
        if self._timer is None:
            self._timer = loop.call_at(waiting.expires, self._expire)
        return waiting.answer

    def _pop(self) -> _Waiting[T, R]:
        waiting = self._queue.popleft()
        self._bytes -= self._size(waiting.item)
        return waiting

    def _take(self) -> list[_Waiting[T, R]]:
        """Take the first ones off the queue, as many as go into one transaction."""
        taken: list[_Waiting[T, R]] = []
        size = 0
        while self._queue and len(taken) < self._max_group and size < MAX_GROUP_BYTES:
            waiting = self._pop()
            size += self._size(waiting.item)
            taken.append(waiting)
        return taken

    def _expire(self) -> None:
        """Give up on what has waited too long. One timer serves all: all wait equally long."""
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
            why = f" ({self._trouble})" if self._trouble else ""
            error = StoreUnavailable(f"the database did not commit this in time{why}")
            error.__cause__ = self._trouble
            waiting.answer.set_exception(error)

    async def _run(self) -> None:
        while True:
            if self._queue:
                await self._commit_all(deque([self._take()]))
                self._writing = []
            elif self._closing:
                return
            else:
                self._arrived.clear()
                await self._arrived.wait()

    async def _commit_all(self, parts: deque[list[_Waiting[T, R]]]) -> None:
        """Commit a group, whole or, where one of its items is refused, in ever smaller parts.

        A database that is down is tried again until all who wait for this group have given up.
        """
        loop = asyncio.get_running_loop()
        pause = PAUSE_SECONDS[0]
        while parts:
            self._writing = [waiting for part in parts for waiting in part]
            part = self._still_waiting(parts.popleft(), loop.time())
            if not part:
                continue
            try:
                results = await self._write([waiting.item for waiting in part])
            except StoreBusy as exc:
                # A row that someone else has locked holds up its own item, and no other.
                self._refuse_or_split(part, exc, parts)
            except (StoreUnavailable, SchemaOutdated) as exc:
                self._in_trouble(exc)
                parts.appendleft(part)
                await asyncio.sleep(pause)
                pause = min(pause * 2, PAUSE_SECONDS[1])
            except Exception as exc:
                # Whatever it is, only the item that causes it may fail.
                self._refuse_or_split(part, exc, parts)
            else:
                self._out_of_trouble()
                pause = PAUSE_SECONDS[0]
                for waiting, result in zip(part, results, strict=True):
                    if not waiting.answer.done():
                        waiting.answer.set_result(result)

    def _still_waiting(self, part: list[_Waiting[T, R]], now: float) -> list[_Waiting[T, R]]:
        """Those whose time is not up; the others are answered here, as nothing else sees them."""
        for waiting in part:
            if waiting.expires <= now:
                self._give_up(waiting)
        return [waiting for waiting in part if waiting.expires > now]

    async def _write(self, items: list[T]) -> Sequence[R]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        stopped_by: Exception | None = None
        try:
            return await self._commit(items)
        except Exception as exc:
            stopped_by = exc
            raise
        finally:
            for hook in self._on_write:
                call_hook(hook, len(items), loop.time() - began, stopped_by)

    def _in_trouble(self, error: StoreError) -> None:
        if self._trouble is None:
            now = asyncio.get_running_loop().time()
            self._is_reported = bool(self._seldom.count("unavailable", now=now))
            if self._is_reported:
                log.warning("writer.unavailable", writer=self._name, error=str(error))
        self._trouble = error

    def _out_of_trouble(self) -> None:
        if self._trouble is not None and self._is_reported:
            log.info("writer.recovered", writer=self._name)
        self._trouble = None

    def _refuse_or_split(
        self,
        part: list[_Waiting[T, R]],
        error: Exception,
        parts: deque[list[_Waiting[T, R]]],
    ) -> None:
        if len(part) > 1:
            # Behind the parts that wait: theirs may be the good half.
            middle = len(part) // 2
            parts.extend([part[:middle], part[middle:]])
            return
        (waiting,) = part
        if isinstance(error, StoreError):
            refused = error
        else:
            refused = StoreError(f"this cannot be stored: {type(error).__name__}: {error}")
            refused.__cause__ = error
        kind = type(waiting.item).__name__
        log.error("writer.refused", writer=self._name, error=str(refused), item=kind)
        if not waiting.answer.done():
            waiting.answer.set_exception(refused)


def call_hook(hook: Callable[..., None], *what: Any) -> None:
    """Call a hook, whose own errors are no fault of the writer."""
    try:
        hook(*what)
    except Exception:
        log.exception("writer.hook_failed")
