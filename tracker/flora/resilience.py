"""How a client copes with FLORA's limits and refusals, and with its silence.

`RequestLimit` says how many requests run at a time, and how often one starts. FLORA's limits hold
for a whole workspace, are not published, and are shared with everything else that uses it. So the
rate adapts. At most `concurrency` requests run at a time. Until FLORA refuses one as too many (429)
there is no other limit. From then on requests are spaced to a rate that grows a little with every
answer and is halved by every refusal (additive increase, multiplicative decrease). Reads of runs
that have just ended alternate with all other requests, if both wait. A wait that FLORA asks for
holds for all processes with the same key, which share it. The rate is each process's own, by its
own refusals, so that several processes come to share FLORA's limit without counting each other.

`Breaker` keeps a refused key from being sent again and again. `Contact` judges whether FLORA can be
reached and whether base URL and key are right. Both only use requests that are made anyway, and
only an answer in FLORA's own shape counts as FLORA's.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timedelta
from typing import Final

from tracker.core.clock import Clock, utc_now
from tracker.core.contact import CURRENT, PATIENCE, ContactState, OngoingTrouble, Trouble
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreadable,
    Forbidden,
    KeyRefused,
    NotFound,
    OtherWorkspace,
    RequestPaused,
)
from tracker.core.log import get_logger

SLOWEST: Final = 0.2
"""Requests a second; halving stops here, at FLORA's own advice of one every five seconds."""
FASTEST: Final = 50.0
"""Requests a second; above this rate the limit that was met counts as gone."""
GROWTH: Final = 0.05
"""What each answer adds to the rate, in requests a second."""
MEMORY: Final = 10.0
"""Seconds of starts from which the rate is taken at which a limit was met."""
PROBE_EVERY: Final = 30.0
"""Seconds between two half-open probes: calls let through while the breaker is open."""
CONFIRMED: Final = 5.0
"""Seconds for which requests must have failed before FLORA is reported as silent."""

log = get_logger(__name__)


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
        self._wait_within(until)
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
            while (wait := self._wait_within(until)) > 0:
                await self.sleep(wait)
            # Last: another process may have been asked to wait a moment ago.
            left = await self.shared.left()
            if left <= 0:
                return
            self.pause(left)

    def _wait_within(self, until: float) -> float:
        """Seconds until a request may start; none are left if it is negative.

        Raises `RequestPaused` if that is beyond `until`.
        """
        now = self.monotonic()
        wait = max(self._next_start, self._paused_until) - now
        if wait > 0 and now + wait > until:
            raise RequestPaused(seconds=wait, until=self.clock() + timedelta(seconds=wait))
        return wait


class Breaker:
    """A circuit breaker for the API key: open from FLORA's refusal until it takes the key again.

    While it is open every call fails at once, except a half-open probe now and then. `since` is
    when it opened.
    """

    def __init__(self, *, clock: Clock, monotonic: Callable[[], float]) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._refusal: KeyRefused | None = None
        self._next_probe = 0.0
        self.since: datetime | None = None

    @property
    def open(self) -> bool:
        """Whether FLORA refuses the key."""
        return self._refusal is not None

    @property
    def reason(self) -> str | None:
        """FLORA's refusal in words, or `None`."""
        return None if self._refusal is None else str(self._refusal)

    @property
    def blocked(self) -> bool:
        """Whether a call would fail at once: the breaker is open and no probe is due."""
        return self._refusal is not None and self._next_probe > self._monotonic()

    def check(self) -> None:
        """Raise `KeyRefused` if a call would not be let through."""
        wait = self._next_probe - self._monotonic()
        if self._refusal is not None and wait > 0:
            refusal = copy(self._refusal)
            refusal.retry_after = wait
            raise refusal

    def admit(self) -> None:
        """Like `check`, directly before a call: while the breaker is open, the call is a probe."""
        self.check()
        if self._refusal is not None:
            self._next_probe = self._monotonic() + PROBE_EVERY

    def refused(self, refusal: KeyRefused) -> None:
        self.since = self.since or self._clock()
        self._refusal = copy(refusal)  # one that is raised keeps its callers' frames alive
        self._next_probe = self._monotonic() + PROBE_EVERY

    def accepted(self) -> None:
        self._refusal = None
        self.since = None


class Contact:
    """Judges one client's requests; `found` is the trouble to report.

    Failures are reported once FLORA has not answered for `PATIENCE` and requests have failed for
    `CONFIRMED`, so that one failed request after a quiet time is not reported.
    """

    def __init__(self, *, clock: Clock, monotonic: Callable[[], float]) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._asked_at: tuple[float, datetime] | None = None
        self._answered_at: tuple[float, datetime | None] = (monotonic(), None)
        self._unanswered: tuple[float, datetime] | None = None
        """When the first request since FLORA's last answer was sent."""
        self._failing: OngoingTrouble | None = None
        self._other_workspace: OngoingTrouble | None = None
        self._logged: Trouble | str | None = None

    @property
    def failing(self) -> bool:
        """Whether the last answer was a failure, so that a probe is worth while."""
        return (self._failing or self._other_workspace) is not None

    @property
    def found(self) -> OngoingTrouble | None:
        """The trouble that has lasted long enough to be reported; `None` if there is none."""
        if self._failing is not None and self._unanswered is not None:
            now = self._monotonic()
            recent = self.idle_seconds <= CURRENT.total_seconds()
            silent = now - self._answered_at[0] >= PATIENCE.total_seconds()
            if recent and silent and now - self._unanswered[0] >= CONFIRMED:
                return self._failing
        return self._other_workspace

    @property
    def idle_seconds(self) -> float:
        """How long ago the last request was sent; infinite if none was."""
        return self._monotonic() - self._asked_at[0] if self._asked_at else math.inf

    @property
    def state(self) -> ContactState | None:
        """What this client has seen; `None` before its first request."""
        if self._asked_at is None:
            return None
        return ContactState(
            asked_at=self._asked_at[1], answered_at=self._answered_at[1], trouble=self.found
        )

    def asked(self) -> None:
        now = self._monotonic(), self._clock()
        # A request that was cancelled has no outcome: silence does not count from it.
        if self._failing is None and self.idle_seconds > CONFIRMED:
            self._unanswered = None
        self._unanswered = self._unanswered or now
        self._asked_at = now

    def answered(self) -> None:
        self._answered_at = self._monotonic(), self._clock()
        self._failing = self._unanswered = None
        self._log()

    def checked_workspace(self, error: OtherWorkspace | None) -> None:
        """A list has shown the workspace of the key; `error` if it is the wrong one."""
        if error is None:
            self._other_workspace = None
        elif self._other_workspace is None:
            self._other_workspace = OngoingTrouble(
                Trouble.OTHER_WORKSPACE, self._clock(), str(error)
            )
        self._log()

    def failed(self, error: FloraError, *, listing: bool = False) -> None:
        """A request failed; `listing` if it was for a list that every good key may read."""
        trouble = _trouble_of(error, listing=listing)
        if trouble is None:
            # Another refusal does not show that lists can be read.
            if self._failing is None or self._failing.trouble is not Trouble.LISTS_REFUSED:
                self.answered()
            return
        self._unanswered = self._unanswered or (self._monotonic(), self._clock())
        self._failing = OngoingTrouble(trouble, self._unanswered[1], str(error))
        self._log()

    def _log(self) -> None:
        found = self.found
        if found is None:
            if self._logged is not None and not self.failing:
                log.info("flora.well_again", was=str(self._logged))
                self._logged = None
        elif self._logged is not found.trouble:
            self._logged = found.trouble
            log.error(
                "flora.trouble",
                trouble=str(found.trouble),
                since=found.since.isoformat(timespec="seconds"),
                error=found.reason,
                advice=found.advice,
            )


def _trouble_of(error: FloraError, *, listing: bool) -> Trouble | None:
    """`None` if FLORA answered, even with a refusal."""
    match error:
        case FloraUnreadable():
            return Trouble.NOT_FLORA
        case FloraRefusal(silent=True) if error.status < 500:
            return Trouble.NOT_FLORA
        case Forbidden() | NotFound() if listing:
            return Trouble.LISTS_REFUSED
    return Trouble.UNREACHABLE if error.silent else None
