"""Rate-limited logging: one line per interval, with a count."""

from typing import Final

LOG_INTERVAL: Final = 10.0
"""Default seconds between two lines of one kind."""


class LogRateLimit:
    """Counts events by kind (few, fixed kinds). Times are seconds of any monotonic clock."""

    def __init__(self, seconds: float = LOG_INTERVAL) -> None:
        self._seconds = seconds
        self._counts: dict[str, int] = {}
        self._logged_at: dict[str, float] = {}

    def count(self, kind: str, *, now: float) -> int:
        """Count one event; the number since the last line if a line is due now, else 0."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        logged_at = self._logged_at.get(kind)
        if logged_at is not None and now - logged_at < self._seconds:
            return 0
        self._logged_at[kind] = now
        return self._counts.pop(kind)

    def rest(self, kind: str, *, now: float) -> int:
        """The number since the last line, for a line now; 0 if there were none."""
        if kind in self._counts:
            self._logged_at[kind] = now
        return self._counts.pop(kind, 0)
