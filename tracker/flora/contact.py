"""What FLORA's answers say about its API key and its API.

`Breaker` keeps a refused key from being sent again and again. `Contact` judges whether FLORA can be
reached and whether base URL and key are right. Both only use requests that are made anyway, and
only an answer in FLORA's own shape counts as FLORA's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

import structlog

from tracker.core.clock import Clock, utc_now
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreadable,
    Forbidden,
    KeyRefused,
    NotFound,
    OtherWorkspace,
)

PROBE_EVERY: Final = 30.0
"""Seconds between two half-open probes: calls let through while the breaker is open."""
PATIENCE: Final = 30.0
"""Seconds of failures before they are reported."""
FORGOTTEN_AFTER: Final = 120.0
"""Seconds after the last request from which its failure says nothing any more."""

log = structlog.get_logger(__name__)


class Breaker:
    """A circuit breaker for the API key: open from FLORA's refusal until it takes the key again.

    While it is open every call fails at once, except a half-open probe now and then. `since` is
    when it opened.
    """

    def __init__(
        self, *, clock: Clock = utc_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
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
            raise _copy(self._refusal, retry_after=wait)

    def admit(self) -> None:
        """Like `check`, directly before a call: while the breaker is open, the call is a probe."""
        self.check()
        if self._refusal is not None:
            self._next_probe = self._monotonic() + PROBE_EVERY

    def refused(self, refusal: KeyRefused) -> None:
        """FLORA refused the key."""
        self.since = self.since or self._clock()
        self._refusal = _copy(refusal)  # one that is raised keeps its callers' frames alive
        self._next_probe = self._monotonic() + PROBE_EVERY

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


class Trouble(StrEnum):
    """Why a workspace cannot be read."""

    UNREACHABLE = "unreachable"
    """No answer, or a 5xx of a gateway's or FLORA's own."""
    NOT_FLORA = "not FLORA's API"
    """The base URL is wrong, or a gateway answers in FLORA's place."""
    LISTS_REFUSED = "lists refused"
    """FLORA denies lists that every good key may read at the right base URL."""
    OTHER_WORKSPACE = "key of another workspace"
    """The key is good, but not for the workspace in the settings."""


SILENT: Final = (Trouble.UNREACHABLE, Trouble.NOT_FLORA)
"""Troubles in which FLORA itself does not answer."""
_ADVICE: Final = {
    Trouble.UNREACHABLE: "it is tried again; see whether this machine reaches FLORA_BASE_URL",
    Trouble.NOT_FLORA: "check FLORA_BASE_URL, and what answers in FLORA's place",
    Trouble.LISTS_REFUSED: "check FLORA_BASE_URL, and the rights of FLORA_API_KEY",
    Trouble.OTHER_WORKSPACE: "set FLORA_API_KEY, or FLORA_WORKSPACE_ID, to the right one",
}


@dataclass(frozen=True, slots=True)
class OngoingTrouble:
    """A trouble, since when (UTC) it lasts, and the last error in words."""

    trouble: Trouble
    since: datetime
    reason: str

    @property
    def advice(self) -> str:
        """What to do about it."""
        return _ADVICE[self.trouble]


class Contact:
    """Judges one client's requests; `found` is the trouble to report."""

    def __init__(
        self, *, clock: Clock = utc_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._asked_at = 0.0
        self._failing_from: float | None = None
        self._failing: OngoingTrouble | None = None
        self._other_workspace: OngoingTrouble | None = None
        self._logged: Trouble | None = None

    @property
    def failing(self) -> bool:
        """Whether the last answer was a failure, so that a probe is worth while."""
        return (self._failing or self._other_workspace) is not None

    @property
    def found(self) -> OngoingTrouble | None:
        """The trouble that has lasted long enough to be reported; `None` if there is none."""
        now = self._monotonic()
        if self._failing is not None and self._failing_from is not None:
            recent = now - self._asked_at <= FORGOTTEN_AFTER
            if recent and now - self._failing_from >= PATIENCE:
                return self._failing
        return self._other_workspace

    def asked(self) -> None:
        """A request is sent."""
        self._asked_at = self._monotonic()

    def answered(self) -> None:
        """FLORA answered a request."""
        self._failing = self._failing_from = None
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
        if self._failing is None:
            self._failing_from = self._monotonic()
        since = self._clock() if self._failing is None else self._failing.since
        self._failing = OngoingTrouble(trouble, since, str(error))
        self._log()

    def _log(self) -> None:
        """Log each trouble once, and its end."""
        found = self.found
        if found is None:
            if self._logged is not None and not self.failing:
                log.info("flora.well_again", was=self._logged.value)
                self._logged = None
        elif self._logged is not found.trouble:
            self._logged = found.trouble
            log.error(
                "flora.trouble",
                trouble=found.trouble.value,
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
