"""Whether FLORA answers in a workspace: what one process has seen, and how two such views join.

Processes share their views through the database, so that each of them can say since when FLORA has
not answered, also one that asks nothing itself. Only an answer in FLORA's own shape counts.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

PATIENCE: Final = timedelta(seconds=30)
"""FLORA is reported as silent when it has not answered for so long although it was asked."""
CURRENT: Final = timedelta(seconds=120)
"""How long after the last request its outcome still describes the present."""


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
    KEY_REFUSED = "key refused"
    """FLORA does not accept the key."""


_SILENT: Final = (Trouble.UNREACHABLE, Trouble.NOT_FLORA)
_ADVICE: Final[dict[str, str]] = {
    Trouble.UNREACHABLE: "it is tried again; see whether this machine reaches FLORA_BASE_URL",
    Trouble.NOT_FLORA: "check FLORA_BASE_URL, and what answers in FLORA's place",
    Trouble.LISTS_REFUSED: "check FLORA_BASE_URL, and the rights of FLORA_API_KEY",
    Trouble.OTHER_WORKSPACE: "set FLORA_API_KEY, or FLORA_WORKSPACE_ID, to the right one",
    Trouble.KEY_REFUSED: "set FLORA_API_KEY to a key that is valid at FLORA",
}


@dataclass(frozen=True, slots=True)
class OngoingTrouble:
    """A trouble, since when (UTC) it lasts, and the last error in words."""

    trouble: Trouble | str
    """A text where a newer version reported what this version does not know."""
    since: datetime
    reason: str

    @property
    def advice(self) -> str:
        """What to do about it."""
        return _ADVICE.get(self.trouble, "a newer version of the tracker reported it")

    @property
    def silent(self) -> bool:
        """Whether FLORA itself does not answer."""
        return self.trouble in _SILENT


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactState:
    """When FLORA was last asked, when it last answered (UTC; `None` if never), and the trouble that
    is reported, if any."""

    asked_at: datetime
    answered_at: datetime | None = None
    trouble: OngoingTrouble | None = None

    def is_current(self, now: datetime) -> bool:
        """Whether it describes the present: FLORA was asked recently."""
        return now - self.asked_at <= CURRENT

    def answers(self, now: datetime) -> bool | None:
        """Whether FLORA answers; `None` if that is not known."""
        if not self.is_current(now):
            return None
        if self.trouble is not None:
            return not self.trouble.silent
        return True if self.answered_at else None


def joined(one: ContactState, other: ContactState) -> ContactState:
    """What both processes have seen together.

    An answer to either ends a silence that began before it. A process that gets no answer, while
    another one does, reports trouble only once nothing has been answered for `PATIENCE`.
    """
    older, newer = sorted((one, other), key=lambda each: each.asked_at)
    answers = [each.answered_at for each in (one, other) if each.answered_at]
    answered_at = max(answers, default=None)
    trouble = newer.trouble
    if trouble is None or trouble.silent:
        trouble = _silence(newer.trouble, older.trouble, newer.asked_at, answered_at)
    return ContactState(asked_at=newer.asked_at, answered_at=answered_at, trouble=trouble)


def _silence(
    newer: OngoingTrouble | None,
    older: OngoingTrouble | None,
    asked_at: datetime,
    answered_at: datetime | None,
) -> OngoingTrouble | None:
    """The silence of FLORA that two troubles show, if it lasts."""
    silences = [each for each in (newer, older) if each and each.silent]
    if not silences:
        return None
    starts = [each.since for each in silences if not answered_at or each.since >= answered_at]
    if starts:
        return replace(silences[0], since=min(starts))
    if answered_at is not None and asked_at - answered_at >= PATIENCE:
        return replace(silences[0], since=answered_at)
    return None
