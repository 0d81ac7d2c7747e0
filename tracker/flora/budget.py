"""One request budget for each workspace: how many requests are under way, and how often one starts.

FLORA's limits are for the whole workspace, are not published and are shared with whatever else uses
it, so they are felt for. At most `concurrency` requests are under way at a time. Until FLORA first
refuses one as too many (429), nothing else holds them back. From then on they are spaced to a rate,
which grows a little with every answer and is halved with every refusal (additive increase,
multiplicative decrease). The wait that FLORA asks for holds for everybody.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tracker.core.errors import RateLimited

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


class Budget:
    """Lets requests start, in the order in which they asked.

    Times are in seconds of `monotonic`; tests pass their own, and a `sleep` to go with it.
    """

    def __init__(
        self,
        concurrency: int,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._concurrency = concurrency
        self._monotonic = monotonic
        self._sleep = sleep
        self._seats = asyncio.Semaphore(concurrency)
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
    async def slot(self, *, until: float = math.inf) -> AsyncIterator[float]:
        """Wait for leave to send one request, and hold its seat; gives the time of the start.

        Raises `RateLimited` at once where the wait is known to go on beyond `until`.
        """
        self._refuse_beyond(until)
        self._asked += 1
        asked_at = self._monotonic()
        try:
            async with self._seats:
                async with self._turn:  # one caller watches the clock, the others stand behind it
                    while (wait := self._wait()) > 0:
                        self._refuse_beyond(until)
                        await self._sleep(wait)
                    started = self._start()
                self._waited += started - asked_at
                self._in_flight += 1
                try:
                    yield started
                finally:
                    self._in_flight -= 1
        finally:
            self._asked -= 1

    def pause(self, seconds: float) -> None:
        """Nobody starts anything for so long."""
        self._paused_until = max(self._paused_until, self._monotonic() + seconds)

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
