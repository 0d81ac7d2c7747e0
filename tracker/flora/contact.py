"""How FLORA answers one workspace: whether it can be reached, and whether base URL and key fit.

Judged from the requests that are made anyhow. Only an answer in FLORA's own shape counts as one:
what a gateway or another program says in its place does not.
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
    NotFound,
    OtherWorkspace,
)

PATIENCE: Final = 30.0
"""Seconds that FLORA may answer nothing before that is told."""
FORGOTTEN_AFTER: Final = 120.0
"""Seconds after the last request from which its failure says nothing any more."""

log = structlog.get_logger(__name__)


class Trouble(StrEnum):
    """What keeps a workspace from being read, in words for people."""

    UNREACHABLE = "unreachable"
    """No answer, or a gateway's or FLORA's own 5xx."""
    NOT_FLORA = "not FLORA's API"
    """What answers at the base URL is not FLORA: it is wrong, or a gateway is in front."""
    LISTS_REFUSED = "lists refused"
    """FLORA denies the lists that every good key may read at the right base URL."""
    OTHER_WORKSPACE = "key of another workspace"
    """The key is good, and reads another workspace than the settings name."""


SILENT: Final = (Trouble.UNREACHABLE, Trouble.NOT_FLORA)
"""FLORA itself says nothing."""
_ADVICE: Final = {
    Trouble.UNREACHABLE: "it is tried again; see whether this machine reaches FLORA_BASE_URL",
    Trouble.NOT_FLORA: "check FLORA_BASE_URL, and what answers in FLORA's place",
    Trouble.LISTS_REFUSED: "check FLORA_BASE_URL, and the rights of FLORA_API_KEY",
    Trouble.OTHER_WORKSPACE: "set FLORA_API_KEY, or FLORA_WORKSPACE_ID, to the right one",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A trouble, since when (UTC) it lasts, and the last error in words."""

    trouble: Trouble
    since: datetime
    reason: str

    @property
    def advice(self) -> str:
        """What to do."""
        return _ADVICE[self.trouble]


class Contact:
    """What the last requests of one client tell. It is told of each; `found` is what to report."""

    def __init__(
        self, *, clock: Clock = utc_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._asked_at = 0.0
        self._failing_from: float | None = None
        self._failing: Found | None = None
        self._other_workspace: Found | None = None
        self._told: Trouble | None = None

    @property
    def failing(self) -> bool:
        """Whether something was wrong with the last answer: worth asking again soon."""
        return (self._failing or self._other_workspace) is not None

    @property
    def found(self) -> Found | None:
        """What has been wrong for long enough to be told; `None` where all is well."""
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
        """FLORA has answered one."""
        self._failing = self._failing_from = None
        self._tell()

    def reads(self, other: OtherWorkspace | None) -> None:
        """A list has shown whose key it is: the right workspace's where `other` is `None`."""
        if other is None:
            self._other_workspace = None
        elif self._other_workspace is None:
            found = Found(Trouble.OTHER_WORKSPACE, self._clock(), str(other))
            self._other_workspace = found
        self._tell()

    def failed(self, error: FloraError, *, listing: bool = False) -> None:
        """A request, of a list that any key may read where `listing`, ended in that error."""
        trouble = _trouble_of(error, listing=listing)
        if trouble is None:
            # A refusal of something else does not tell that lists can be read.
            if self._failing is None or self._failing.trouble is not Trouble.LISTS_REFUSED:
                self.answered()
            return
        if self._failing is None:
            self._failing_from = self._monotonic()
        since = self._clock() if self._failing is None else self._failing.since
        self._failing = Found(trouble, since, str(error))
        self._tell()

    def _tell(self) -> None:
        """Let the log know, once for each trouble, and when it is over."""
        found = self.found
        if found is None:
            if self._told is not None and not self.failing:
                log.info("flora.well_again", was=self._told.value)
                self._told = None
        elif self._told is not found.trouble:
            self._told = found.trouble
            log.error(
                "flora.trouble",
                trouble=found.trouble.value,
                since=found.since.isoformat(timespec="seconds"),
                error=found.reason,
                advice=found.advice,
            )


def _trouble_of(error: FloraError, *, listing: bool) -> Trouble | None:
    """`None` where FLORA has answered, be it with a refusal."""
    match error:
        case FloraUnreadable():
            return Trouble.NOT_FLORA
        case FloraRefusal(silent=True) if error.status < 500:
            return Trouble.NOT_FLORA
        case Forbidden() | NotFound() if listing:
            return Trouble.LISTS_REFUSED
    return Trouble.UNREACHABLE if error.silent else None
