"""The request limit of one workspace: how many requests run at a time, and how often one starts.

FLORA's limits hold for a whole workspace, are not published, and are shared with everything else
that uses it. So the rate adapts. At most `concurrency` requests run at a time. Until FLORA refuses
one as too many (429) there is no other limit. From then on requests are spaced to a rate that grows
a little with every answer and is halved by every refusal (additive increase, multiplicative
decrease). Reads of runs that have just ended alternate with all other requests, if both wait.

A wait that FLORA asks for holds for all processes with the same key, which share it. The rate is
each process's own, by its own refusals, so that several processes come to share FLORA's limit
without counting each other.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Final

from tracker.core.clock import Clock, utc_now
from tracker.core.errors import RequestPaused

SLOWEST: Final = 0.2
"""Requests a second; halving stops here, at FLORA's own advice of one every five seconds."""
FASTEST: Final = 50.0
"""Requests a second; above this rate the limit that was met counts as gone."""
GROWTH: Final = 0.05
"""What each answer adds to the rate, in requests a second."""
MEMORY: Final = 10.0
"""Seconds of starts from which the rate is taken at which a limit was met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimitState:
    """The request limit at one moment.

    `rate` is in requests a second, `None` while no limit was met; `paused` is what is left of the
    wait that FLORA asked for, in seconds; `limited` counts its refusals; `waited` is how many
    seconds all requests together have waited for a permit.
    """

    concurrency: int
    in_flight: int
    waiting: int
    rate: float | None
    paused: float
    limited: int
    waited: float


class SharedWaits:
    """Waits shared by all processes with one key; these are of this process alone. Neither method
    raises."""

    async def left(self) -> float:
        """Seconds that the longest shared wait still lasts."""
        return 0.0

    async def share(self, seconds: float) -> None:
        """Share a wait that FLORA has asked this process for."""


OWN_WAITS: Final = SharedWaits()


@dataclass(eq=False)
class RequestLimit:
    """Permits for requests, given in the order in which they were asked for.

    Times are in seconds of `monotonic`; tests pass their own, with a `sleep` to match. `shared`
    exchanges waits with other processes. `clock` is for the text of errors.
    """

    concurrency: int
    _: KW_ONLY
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    shared: SharedWaits = OWN_WAITS
    clock: Clock = utc_now

    def __post_init__(self) -> None:
        self._permits = asyncio.Semaphore(self.concurrency)
        # The first of each lane waits for a permit, in order, so that the lanes alternate.
        self._lanes = {fresh: asyncio.Lock() for fresh in (False, True)}
        self._pacing = asyncio.Lock()  # one request waits for its time, the others for it
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
    async def permit(self, *, until: float = math.inf, fresh: bool = False) -> AsyncIterator[float]:
        """Wait for a permit to send one request, and hold it; gives the time of the start.

        `fresh` is for a read of a run that has just ended. Raises `RequestPaused` at once if the
        wait is known to last beyond `until`.
        """
        self._refuse_beyond(until)
        self._asked += 1
        asked_at = self.monotonic()
        try:
            async with self._lanes[fresh]:
                await self._permits.acquire()
            try:
                async with self._pacing:
                    await self._wait_for_start(until)
                    started = self.monotonic()
                    self._starts.append(started)
                    self._next_start = started if self._rate is None else started + 1 / self._rate
                self._waited += started - asked_at
                self._in_flight += 1
                try:
                    yield started
                finally:
                    self._in_flight -= 1
            finally:
                self._permits.release()
        finally:
            self._asked -= 1

    def pause(self, seconds: float) -> None:
        """Let this process start no request for so long."""
        self._paused_until = max(self._paused_until, self.monotonic() + seconds)

    async def pause_others(self, seconds: float) -> None:
        """Let no other process start a request for so long."""
        await self.shared.share(seconds)

    def answered(self) -> None:
        """FLORA took a request: raise the rate a little."""
        if self._rate is not None:
            self._rate += GROWTH
            if self._rate > FASTEST:
                self._rate = None

    def limited(self, started: float) -> None:
        """FLORA refused the request that started then as one too many: halve the rate.

        Requests that ran at the same time are refused together, which counts once.
        """
        self._limited += 1
        if started < self._slowed_at:
            return
        now = self.monotonic()
        lately = sum(start > now - MEMORY for start in self._starts) / MEMORY
        self._rate = max(SLOWEST, min(lately, self._rate or math.inf) / 2)
        self._slowed_at = now

    def state(self) -> RequestLimitState:
        return RequestLimitState(
            concurrency=self.concurrency,
            in_flight=self._in_flight,
            waiting=self._asked - self._in_flight,
            rate=self._rate,
            paused=max(0.0, self._paused_until - self.monotonic()),
            limited=self._limited,
            waited=self._waited,
        )

    async def _wait_for_start(self, until: float) -> None:
        while True:
            while (wait := self._wait()) > 0:
                self._refuse_beyond(until)
                await self.sleep(wait)
            # Last: another process may have been asked to wait a moment ago.
            left = await self.shared.left()
            if left <= 0:
                return
            self.pause(left)

    def _wait(self) -> float:
        return max(self._next_start, self._paused_until) - self.monotonic()

    def _refuse_beyond(self, until: float) -> None:
        wait = self._wait()
        if wait > 0 and self.monotonic() + wait > until:
            raise RequestPaused(seconds=wait, until=self.clock() + timedelta(seconds=wait))
