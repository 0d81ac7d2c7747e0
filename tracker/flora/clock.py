"""FLORA's clocks: the one of the header `Date`, and the one of `created_at`.

They need not agree: a gateway may write `Date`. What a run is compared with is the second one,
which the answers to our own starts show: FLORA created their runs between request and answer.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

UNSEEN: Final = timedelta(minutes=2)
"""How far the clock of `created_at` may be behind ours and behind `Date` before a start showed
it."""
MARGIN: Final = timedelta(seconds=2)
"""How far it may be behind what starts have shown: times are cut to seconds, and FLORA may have
several machines."""
MOST_AHEAD: Final = timedelta(days=1)
"""How far ahead it is believed to be. No run would come after a time that is a mistake."""


@dataclass(slots=True, eq=False)
class FloraClocks:
    """What FLORA's answers show of its clocks. Differences are its clock minus ours.

    `offset` is that of `Date` by the last answer, `None` before the first.
    """

    offset: timedelta | None = None
    _bounds: tuple[timedelta, timedelta] = field(default=(timedelta(), timedelta()))
    """The least and greatest possible difference of `Date`, by all answers."""
    _least: tuple[timedelta, timedelta] | None = None
    """How far `created_at` was ahead at least, of our clock and of `Date`."""

    def answered(self, date: datetime, *, sent_at: datetime, at: datetime) -> None:
        """An answer with this `Date` came at `at` to a request sent at `sent_at`, by our clock."""
        # It is cut to seconds, and lies between request and answer.
        least, most = date - at, date + timedelta(seconds=1) - sent_at
        if self.offset is not None:
            lower, upper = max(least, self._bounds[0]), min(most, self._bounds[1])
            if lower <= upper:  # else one of the clocks was set
                least, most = lower, upper
        self.offset, self._bounds = date - at, (least, most)

    def started(self, created_at: datetime, *, at: datetime) -> None:
        """The answer to a start came at `at` and shows the run that it has just created."""
        ahead = created_at - at
        if ahead > MOST_AHEAD:
            return
        seen = ahead, ahead - self._bounds[1]
        before = self._least or seen
        self._least = min(before[0], seen[0]), min(before[1], seen[1])

    def earliest_creation(self, sent_at: datetime) -> datetime:
        """The earliest `created_at` of a run whose start was sent at `sent_at`, by our clock.

        Too early leaves a start in doubt, too late pays for it twice: so the lower counts of what
        our clock says, which may have been set since, and what `Date` says.
        """
        date_ahead = self._bounds[0]
        if self._least is None:
            return sent_at + min(timedelta(), date_ahead) - UNSEEN
        ahead, ahead_of_date = self._least
        return sent_at + min(ahead, date_ahead + ahead_of_date) - MARGIN
