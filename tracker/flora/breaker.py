"""A refused key is not tried again and again: calls fail at once, but for a trial now and then.

FLORA answers a wrong or revoked key with 401, and every further call fails, too. The breaker then
opens, for everybody to see, until FLORA takes the key in a trial.
"""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Final

from tracker.core.clock import Clock, utc_now
from tracker.core.errors import KeyRefused

TRIAL_EVERY: Final = 30.0
"""Seconds between two calls that are let through while the breaker is open."""


class Breaker:
    """Closed until FLORA refuses the key; `since` and `reason` tell when it opened, and why."""

    def __init__(
        self, *, clock: Clock = utc_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._refusal: KeyRefused | None = None
        self._next_trial = 0.0
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
        """Whether a call would be refused here, unsent: the key is refused and no trial is due."""
        return self._refusal is not None and self._next_trial > self._monotonic()

    def check(self) -> None:
        """Raise `KeyRefused` where a call would not be let through."""
        wait = self._next_trial - self._monotonic()
        if self._refusal is not None and wait > 0:
            raise _copy(self._refusal, retry_after=wait)

    def admit(self) -> None:
        """As `check`, right before a call: while the breaker is open, this call is the trial."""
        self.check()
        if self._refusal is not None:
            self._next_trial = self._monotonic() + TRIAL_EVERY

    def refused(self, refusal: KeyRefused) -> None:
        """FLORA refused the key."""
        self.since = self.since or self._clock()
        self._refusal = _copy(refusal)  # what is raised keeps the frames of its callers alive
        self._next_trial = self._monotonic() + TRIAL_EVERY

    def accepted(self) -> None:
        """FLORA took the key."""
        self._refusal = None
        self.since = None


def _copy(refusal: KeyRefused, *, retry_after: float | None = None) -> KeyRefused:
    return KeyRefused(
        status=refusal.status,
        code=refusal.code,
        message=refusal.message,
        request_id=refusal.request_id,
        retry_after=retry_after,
    )
