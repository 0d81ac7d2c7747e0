"""Up to which number the timeline is whole, where numbers do not show in their order.

PostgreSQL gives a number out when a line is written, and shows the line when its transaction
commits. So behind a gap there may be a line that is still to come, or nothing, where a transaction
was rolled back. It can be told which: a line that was not there in one snapshot was written by a
transaction that had begun before it; once all of those have ended and it still is not there, it
never will be.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from tracker.store.queries.changes import Moment

HOLD: Final = 10.0
"""Seconds after which a gap is passed over whatever is under way: somebody else's transaction may
stay open for hours, and none of the tracker's own lasts so long."""


class _Mark(NamedTuple):
    """What is missing below `upto` was written, if at all, by transactions before `begun`."""

    upto: int
    begun: int
    until: float


class Whole:
    """Follows the timeline from `start` on. `upto` is how far nothing can come any more."""

    def __init__(self, start: int) -> None:
        self.upto = start
        self._dead = start
        self._marks: deque[_Mark] = deque()

    @property
    def waits(self) -> bool:
        """Whether there is a gap that may still be filled."""
        return bool(self._marks)

    def take(self, numbers: Sequence[int], moment: Moment | None, *, now: float) -> int:
        """How many of these lines may be passed on.

        They are the next ones after `upto`, as one snapshot shows them. `now` is in seconds, by a
        clock that only goes forward.
        """
        if moment is None:
            self.upto = numbers[-1] if numbers else self.upto
            return len(numbers)
        while self._marks and (self._marks[0].begun <= moment.ended or self._marks[0].until <= now):
            self._dead = self._marks.popleft().upto
        passed = 0
        for number in numbers:
            if number > self.upto + 1 and number > self._dead + 1:
                break
            self.upto = number
            passed += 1
        if passed == len(numbers):
            self._marks.clear()
        elif not self._marks or self._marks[-1].upto < numbers[-1]:
            self._marks.append(_Mark(numbers[-1], moment.begun, now + HOLD))
        return passed
