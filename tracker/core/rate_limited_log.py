"""What may happen a thousand times a second is said every so many seconds, with its number."""

from typing import Final

SAY_AGAIN_AFTER: Final = 10.0
"""Seconds between two lines that say the same, where nobody wants another number."""


class Seldom:
    """Counts by kind; the kinds are few, and fixed. Times are seconds of any clock that only goes
    forward."""

    def __init__(self, seconds: float = SAY_AGAIN_AFTER) -> None:
        self._seconds = seconds
        self._counts: dict[str, int] = {}
        self._said_at: dict[str, float] = {}

    def count(self, kind: str, *, now: float) -> int:
        """Count one. How many there were since it was last said, where it is time to say so; else
        0."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        said_at = self._said_at.get(kind)
        if said_at is not None and now - said_at < self._seconds:
            return 0
        self._said_at[kind] = now
        return self._counts.pop(kind)

    def rest(self, kind: str, *, now: float) -> int:
        """How many there were since it was last said, to be said now; 0 where there were none."""
        if kind in self._counts:
            self._said_at[kind] = now
        return self._counts.pop(kind, 0)
