"""How much of a client's bytes and time is taken: every bound of the HTTP side in one place."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracker.web.http.errors import unavailable
from tracker.web.http.origin import SAFE


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes are bytes, times are seconds.

    FLORA waits 10 s for the answer to a callback, so 8 s bound all of it: a body that has not come
    by then is a 408, a commit a 503.
    """

    connections: int = 4000
    """So many may be open; fewer where the process may not open as many files."""
    idle_seconds: float = 75.0
    """How long an idle connection stays: longer than a proxy in front keeps one for reuse."""
    head_seconds: float = 10.0
    head_bytes: int = 32 * 1024
    headers: int = 100
    """In one request."""
    requests_ahead: int = 8
    """So many may be sent without waiting for an answer."""
    received_bytes: int = 16 * 1024 * 1024
    """For all that is being received or waits to be answered, heads and bodies of all connections
    together. A few kilobytes are always taken, which is more than FLORA's own callbacks have."""
    callback_bytes: int = 256 * 1024
    callback_seconds: float = 8.0
    answer_seconds: float = 6.5
    """For what is only looked at, until the answer begins. Where the database has fallen silent it
    takes two more to let go of the connection."""
    api_bytes: int = 1024 * 1024
    api_read_seconds: float = 10.0
    ready_seconds: float = 5.0
    linger_bytes: int = 4 * 1024 * 1024
    linger_seconds: float = 2.0
    """What is still read, and thrown away, of a body that is refused: a connection that is closed
    on a client which is still sending loses the answer."""
    stream_readers: int = 100
    """Most readers of `/api/stream` in one process."""
    stream_queue: int = 1000
    """Changes queued for one reader; beyond that it is disconnected."""
    stream_poll_seconds: float = 2.0
    """Between two reads of new events, where other processes' signals are not heard."""
    stream_heartbeat: float = 15.0
    stream_seconds: float = 3600.0
    """After this long a reader has to reconnect, and to authenticate again."""


# Bounds in time that cost next to nothing, for what comes by the thousand and is seldom late.


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


# What is only looked at is there in time, or the client is told that it is not.
#
# A page asks the database several things, one after the other, and a database in trouble takes
# its time for each. What changes something has waits of its own; a stream goes on for as long as
# it goes.


_STREAM: Final = "/api/stream"


class Deadline:
    """Raises `Fault` 503 where an answer has not begun within `seconds`."""

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] not in SAFE or scope["path"] == _STREAM:
            await self._app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            timer.reschedule(None)  # how long the client takes to read is its own affair
            await send(message)

        try:
            async with asyncio.timeout(self._seconds) as timer:
                await self._app(scope, receive, send_in_time)
        except TimeoutError:
            if not timer.expired():
                raise
            raise unavailable("The database does not answer in time.") from None


# How often something may be tried: one bucket of tries for each key, filled again with time.


MOST_KEYS: Final = 10_000
"""So many keys are remembered; whoever would fill them up only makes room for others."""


class Throttle:
    """`burst` tries at once, and then one every `refill` seconds, for each key."""

    def __init__(
        self, *, burst: int, refill: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._refill = refill
        self._monotonic = monotonic
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when the bucket is full again

    def take(self, key: str) -> float:
        """Take a try: 0 where there was one, else the seconds until there is."""
        now = self._monotonic()
        full_at = max(self._full_at.get(key, now), now) + self._refill
        wait = full_at - now - self._burst * self._refill
        if wait > 1e-9:
            return wait
        self._keep(key, full_at)
        return 0.0

    def give_back(self, key: str) -> None:
        """The last try of this key does not count."""
        if key in self._full_at:
            self._full_at[key] -= self._refill

    def _keep(self, key: str, full_at: float) -> None:
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        if len(self._full_at) > MOST_KEYS:
            self._full_at.popitem(last=False)
