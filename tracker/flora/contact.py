"""What FLORA's answers say about its API key and its API.

`Breaker` keeps a refused key from being sent again and again. `Contact` judges whether FLORA can be
reached and whether base URL and key are right. Both only use requests that are made anyway, and
only an answer in FLORA's own shape counts as FLORA's.
"""

import math
from collections.abc import Callable
from copy import copy
from datetime import datetime
from typing import Final

from tracker.core.clock import Clock
from tracker.core.contact import CURRENT, PATIENCE, ContactState, OngoingTrouble, Trouble
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreadable,
    Forbidden,
    KeyRefused,
    NotFound,
    OtherWorkspace,
)
from tracker.core.log import get_logger

PROBE_EVERY: Final = 30.0
"""Seconds between two half-open probes: calls let through while the breaker is open."""
CONFIRMED: Final = 5.0
"""Seconds for which requests must have failed before FLORA is reported as silent."""

log = get_logger(__name__)


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
