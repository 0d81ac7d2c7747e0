"""Pauses of polling: after failures, and so that due runs share their reads."""

import math
from collections.abc import Callable
from typing import Final

BACKOFF: Final = 1.0
LONGEST_BACKOFF: Final = 30.0
"""The pause of a workspace in which FLORA failed, in seconds: doubling from the first to the
second."""
SECONDS_A_READ: Final = 1.0
"""Seconds of pause after each shared read."""
LONGEST_PAUSE: Final = 10.0
"""The longest pause, however many pages were read."""


class Backoff:
    """Pauses by name, which grow with each failure in a row. All times are in `seconds`."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._pauses: dict[str, tuple[int, float]] = {}

    def left(self, name: str) -> float:
        """The seconds that are left of the pause, if any."""
        _, until = self._pauses.get(name, (0, -math.inf))
        return max(0.0, until - self._seconds())

    def failed(self, name: str, *, least: float = 0.0) -> float:
        """Count a failure; the seconds of pause that follow, at least `least`."""
        failures = self._pauses.get(name, (0, 0.0))[0] + 1
        length = min(BACKOFF * 2.0 ** min(failures - 1, 10), LONGEST_BACKOFF)
        length = max(length, least)
        self._pauses[name] = failures, self._seconds() + length
        return length

    def succeeded(self, name: str) -> None:
        self._pauses.pop(name, None)

    def clear(self) -> None:
        self._pauses.clear()


class Coalescer:
    """Pauses after shared reads, by a workspace's place, so that due runs coalesce.

    A history page costs the same for one run as for a hundred. So each read that due runs shared,
    or could have, is followed by `SECONDS_A_READ` of pause, in which more runs become due: a single
    end is read at once, and among hundreds of runs, ends wait up to `LONGEST_PAUSE` and are read
    together. A sweep reads the same pages, and counts like a round.

    With 1,000 runs on ten pages that end within a minute, 10 s cost 0.07 reads a run (0.09 with a
    sweep) and a median wait of 5 s; 5 s cost 0.14 reads and 2 s; no pause 0.6 reads and half a
    second (`python -m bench.economy`).
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._ends: dict[str, float] = {}
        self._reads: dict[str, int] = {}

    def left(self, place: str) -> float:
        """The seconds that are left of the pause, if any."""
        return max(0.0, self._ends.get(place, -math.inf) - self._seconds())

    def add(self, place: str, reads: int, *, began: float, complete: bool) -> None:
        """Count the shared reads of a round that began at `began`, in `seconds`.

        The pause follows the first round that leaves nothing behind, for all reads until then.
        """
        reads += self._reads.pop(place, 0)
        if not complete:
            self._reads[place] = reads
            return
        self._ends[place] = began + min(reads * SECONDS_A_READ, LONGEST_PAUSE)
