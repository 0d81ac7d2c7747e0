"""Wait on conditions with a deadline, never for a fixed time."""

import asyncio
import inspect
import itertools
import math
import os
import random
import socket
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from tracker.services import Services

T = TypeVar("T")

NO_SWEEPS: Final = "0 0 29 2 *"
"""`TRACKER_RECONCILE_CRON` for the workers of tests that are not about sweeps: it does not come due
while they run. A sweep at a fifth minute would find runs that a test expects to be polled."""
START_SECONDS: Final = 40.0
"""How long a new process is waited for: to start takes it a second where the machine is idle, and
all of that is work of the processor, which others may want too."""
STANDSTILL_SECONDS: Final = 10.0
"""How long a busy machine may leave a process alone, in all, while something is measured."""
_TICK, _STILL = 0.01, 0.05
FIRST_PORT, RANGES, PORTS = 16_000, 16, 1_000
_numbers = itertools.count(random.randrange(PORTS))


async def eventually(
    condition: Callable[[], T | Awaitable[T]], timeout: float = 30.0, interval: float = 0.02
) -> T:
    """Ask `condition` every `interval` seconds until its answer is true, and return that answer.

    `condition` may be a plain or an async function. Raises AssertionError with the last answer
    when `timeout` seconds have passed; what `condition` itself raises comes through.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() >= deadline:
            name = getattr(condition, "__name__", repr(condition))
            raise AssertionError(f"{name} was not true within {timeout:g} s; last: {answer!r}")
        await asyncio.sleep(interval)


class SteadyClock:
    """A monotonic clock, in seconds, that stops while this process stands still.

    A machine that has too much to do can leave a process alone for seconds, in one piece or in many
    small ones; what is measured by this clock does not count them. Seconds in which this thread
    computes count: what blocks the event loop is slow.
    """

    def __init__(self) -> None:
        self._stood_still = 0.0
        now, self._queued = _now_and_queued()
        self._next, self._computed = now + _TICK, time.thread_time()

    def __call__(self) -> float:
        now, queued = _now_and_queued()
        return now - self._stood_still - self._still(now, queued)

    async def tick(self) -> None:
        """Notice when the process stands still, until this is cancelled."""
        while True:
            now, queued = _now_and_queued()
            self._stood_still += self._still(now, queued)
            self._next, self._queued = now + _TICK, queued
            self._computed = time.thread_time()
            await asyncio.sleep(_TICK)

    def _still(self, now: float, queued: float) -> float:
        """How long the thread stood still since the last tick."""
        queued -= self._queued
        late = now - self._next - (time.thread_time() - self._computed) - queued
        return queued + (late if late > _STILL else 0.0)


def _now_and_queued() -> tuple[float, float]:
    """The monotonic time, and how long this thread has waited for a processor until then."""
    while True:
        queued, now = _queued(), time.monotonic()
        if _queued() == queued:  # else it has waited between the two
            return now, queued


def _queued() -> float:
    """How many seconds this thread has waited for a processor, as Linux counts them; 0 where it
    does not."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


@asynccontextmanager
async def steady_clock() -> AsyncIterator[SteadyClock]:
    """A clock that goes on within the block, as far as the process does."""
    clock = SteadyClock()
    ticking = asyncio.create_task(clock.tick())
    try:
        yield clock
    finally:
        ticking.cancel()
        await asyncio.wait([ticking])


async def assert_takes_less(seconds: float, work: Callable[[], Awaitable[object]]) -> None:
    """Do `work`, which has to take less than `seconds`; what it raises comes through.

    Time in which the process stands still does not count, up to `STANDSTILL_SECONDS`: more of it
    would be the wait of what blocks the event loop.
    """
    async with steady_clock() as clock:
        began, really = clock(), time.monotonic()
        await work()
        assert clock() - began < seconds
        assert time.monotonic() - really < seconds + STANDSTILL_SECONDS


def never(attempt: int) -> float:
    """The wait before the next attempt: longer than any deadline, so that there is none."""
    return math.inf


def send_once(services: "Services") -> None:
    """Let requests to FLORA be sent once."""
    for workspace in services.workspaces.keyed:
        workspace.require_client().backoff = never


def let_pass(seconds: float) -> None:
    """Advance the running event loop's clock by `seconds`, for the rest of the test. Every timer of
    the loop up to then fires: those of httpx and of the database too. `time.monotonic` does not
    change."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds  # type: ignore[method-assign]


async def close_server(server: asyncio.Server) -> None:
    """Close a server to which others may be connecting.

    asyncio leaves the sockets of connections that it has accepted just now to the garbage
    collector, whose warnings would fail some later test: they are passed on first.
    """
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
    await asyncio.sleep(0)
    server.close()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on, for a server that starts later.

    It is below the ports that the kernel gives out, and each test process has its own range, so
    that nothing takes it until then.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = FIRST_PORT + worker % RANGES * PORTS + next(_numbers) % PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@types.coroutine
def cancelled_at(number: int, work: Coroutine[Any, Any, object]) -> Iterator[Any]:
    """`work`, in a task that is cancelled while it waits for the n-th time."""
    task, loop, count = asyncio.current_task(), asyncio.get_running_loop(), 0
    assert task is not None
    step: Callable[[], Any] = partial(work.send, None)
    while True:
        try:
            waiting = step()
        except StopIteration:
            return
        count += 1
        if count == number:
            loop.call_soon(task.cancel)
        try:
            yield waiting
            step = partial(work.send, None)
        except BaseException as error:
            step = partial(work.throw, error)
