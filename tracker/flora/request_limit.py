"""One request budget for each workspace: how many requests are under way, and how often one starts.

FLORA's limits are for the whole workspace, are not published and are shared with whatever else uses
it, so they are felt for. At most `concurrency` requests are under way at a time. Until FLORA first
refuses one as too many (429), nothing else holds them back. From then on they are spaced to a rate,
which grows a little with every answer and is halved with every refusal (additive increase,
multiplicative decrease). However long others wait, every other request is one that brings home a
run that has just ended, where there is such a one.

The wait that FLORA asks for holds for everybody, other processes with the same key included: they
tell each other. The rate does not. It is what each makes of its own refusals, so that several
processes come to share FLORA's limit without counting each other.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from tracker.core.errors import RateLimited

# So many may be at something at a time; whoever wants to waits in one of two lines.


class Seats:
    """Some seats, and before them two lines: one for what is fresh, one for everything else.

    Each line is served in its order. Where somebody waits in both, they take turns, so that
    neither keeps the other from going on.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._lines: dict[bool, deque[asyncio.Future[None]]] = {True: deque(), False: deque()}
        self._last_was_fresh = False

    async def take(self, *, fresh: bool) -> None:
        """Wait for a seat, and have it."""
        if self._free > 0:
            self._free -= 1
            return
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines[fresh].append(ticket)
        try:
            await ticket
        except asyncio.CancelledError:
            if not ticket.cancelled():  # the seat was given in the same moment
                self.give_back()
            raise

    def give_back(self) -> None:
        """Leave a seat: whoever is next has it."""
        for each in self._lines.values():
            while each and each[0].cancelled():  # by one who left, and may not have noticed yet
                each.popleft()
        line = self._lines[not self._last_was_fresh] or self._lines[self._last_was_fresh]
        if not line:
            self._free += 1
            return
        self._last_was_fresh = line is self._lines[True]
        line.popleft().set_result(None)


SLOWEST: Final = 0.2
"""Requests a second; halving stops here, at FLORA's own advice of one every five seconds."""
FASTEST: Final = 50.0
"""Requests a second; once the rate has grown past this, the limit that was met counts as gone."""
GROWTH: Final = 0.05
"""What each answer adds to the rate, in requests a second."""
MEMORY: Final = 10.0
"""How many seconds of starts tell the rate at which a limit was met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetState:
    """The budget at one moment, for people who watch it.

    `rate` is in requests a second, `None` while no limit was met; `paused` is how many seconds the
    wait that FLORA asked for still lasts; `limited` counts its refusals, and `waited` is how many
    seconds all requests together have waited for leave.
    """

    concurrency: int
    in_flight: int
    waiting: int
    rate: float | None
    paused: float
    limited: int
    waited: float


class SharedWaits(Protocol):
    """What the processes with one key tell each other. Neither method raises."""

    async def left(self) -> float:
        """How many seconds the longest wait still lasts that any of them was asked for."""

    async def tell(self, seconds: float) -> None:
        """FLORA has asked this process to wait for so long."""


class Budget:
    """Lets requests start, in the order in which they asked.

    Times are in seconds of `monotonic`; tests pass their own, and a `sleep` to go with it. Without
    `shared` nobody else is told of a wait, or heard.
    """

    def __init__(
        self,
        concurrency: int,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        shared: SharedWaits | None = None,
    ) -> None:
        self._concurrency = concurrency
        self._monotonic = monotonic
        self._sleep = sleep
        self._shared = shared
        self._seats = Seats(concurrency)
        self._turn = asyncio.Lock()
        self._asked = 0
        self._in_flight = 0
        self._limited = 0
        self._waited = 0.0
        self._rate: float | None = None
        self._next_start = -math.inf
        self._paused_until = -math.inf
        self._slowed_at = -math.inf
        self._starts: deque[float] = deque(maxlen=math.ceil(FASTEST * MEMORY))

    @asynccontextmanager
    async def slot(self, *, until: float = math.inf, fresh: bool = False) -> AsyncIterator[float]:
        """Wait for leave to send one request, and hold its seat; gives the time of the start.

        `fresh` says that it is about a run that has just ended. Raises `RateLimited` at once where
        the wait is known to go on beyond `until`.
        """
        self._refuse_beyond(until)
        self._asked += 1
        asked_at = self._monotonic()
        try:
            await self._seats.take(fresh=fresh)
            try:
                async with self._turn:  # one caller watches the clock, the others stand behind it
                    await self._wait_for_leave(until)
                    started = self._start()
                self._waited += started - asked_at
                self._in_flight += 1
                try:
                    yield started
                finally:
                    self._in_flight -= 1
            finally:
                self._seats.give_back()
        finally:
            self._asked -= 1

    def pause(self, seconds: float) -> None:
        """Nobody in this process starts anything for so long."""
        self._paused_until = max(self._paused_until, self._monotonic() + seconds)

    async def tell_others(self, seconds: float) -> None:
        """Nobody in any other process starts anything for so long."""
        if self._shared is not None:
            await self._shared.tell(seconds)

    def answered(self) -> None:
        """FLORA took a request: the next may come a little sooner."""
        if self._rate is not None:
            self._rate += GROWTH
            if self._rate > FASTEST:
                self._rate = None

    def limited(self, started: float) -> None:
        """FLORA refused the request that started then as one too many: from now on, half as often.

        Requests that were under way together are refused together: one verdict, not several.
        """
        self._limited += 1
        if started < self._slowed_at:
            return
        now = self._monotonic()
        lately = sum(start > now - MEMORY for start in self._starts) / MEMORY
        self._rate = max(SLOWEST, min(lately, self._rate or math.inf) / 2)
        self._slowed_at = now

    def state(self) -> BudgetState:
        """The budget as it is now."""
        return BudgetState(
            concurrency=self._concurrency,
            in_flight=self._in_flight,
            waiting=self._asked - self._in_flight,
            rate=self._rate,
            paused=max(0.0, self._paused_until - self._monotonic()),
            limited=self._limited,
            waited=self._waited,
        )

    async def _wait_for_leave(self, until: float) -> None:
        while True:
            while (wait := self._wait()) > 0:
                self._refuse_beyond(until)
                await self._sleep(wait)
            # Asked last of all: another process may have been told to wait a moment ago.
            left = 0.0 if self._shared is None else await self._shared.left()
            if left <= 0:
                return
            self.pause(left)

    def _wait(self) -> float:
        return max(self._next_start, self._paused_until) - self._monotonic()

    def _start(self) -> float:
        now = self._monotonic()
        self._starts.append(now)
        self._next_start = now if self._rate is None else now + 1 / self._rate
        return now

    def _refuse_beyond(self, until: float) -> None:
        wait = self._wait()
        if wait > 0 and self._monotonic() + wait > until:
            raise RateLimited(
                status=429,
                code="rate_limited",
                message="FLORA's limit leaves no room for another request in time",
                retry_after=wait,
            )
