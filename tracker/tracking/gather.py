"""How long due runs are left to gather, so that they can share the pages that show them.

A page of the history costs the same whether it settles one run or a hundred. So the reads that a
round made for runs which pages show are followed by a pause of as many seconds, within which more
of them become due. Who polls so makes about one such read a second: a run that ends alone is read
at once, and where hundreds are under way, their ends wait up to ten seconds and are read together.
A sweep reads the same pages, and counts like a round.

Why these two: 1,000 runs, on ten pages, that end within a minute cost 0.07 reads each with 10 s,
0.09 with a sweep among them, and half of them wait for 5 s. With 5 s they cost 0.14 reads and wait
for 2 s, without gathering 0.6 reads and half a second (`python -m bench.economy`).
"""

from datetime import datetime, timedelta
from typing import Final

from tracker.core.clock import Clock

SECONDS_A_READ: Final = 1.0
"""So many seconds of gathering follow each read."""
LONGEST_GATHER: Final = 10.0
"""Seconds of gathering at most, however many pages were read."""


class Gathering:
    """Until when the due runs of each workspace, by its slot, are left to gather."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._spans: dict[str, tuple[datetime, datetime]] = {}
        self._reads: dict[str, int] = {}

    def until(self, slot: str) -> datetime | None:
        """When the pause ends; `None` where there is none."""
        began, end = self._spans.get(slot, (None, None))
        # A clock that was set back must not make it longer.
        return end if began and end and began <= self._clock() < end else None

    def count(self, slot: str, reads: int, *, began: datetime, over: bool) -> None:
        """A round that began then made so many reads that others could have shared.

        The pause follows once a round leaves nothing behind, and is for all reads until then.
        """
        reads += self._reads.pop(slot, 0)
        if not over:
            self._reads[slot] = reads
            return
        seconds = min(reads * SECONDS_A_READ, LONGEST_GATHER)
        self._spans[slot] = began, began + timedelta(seconds=seconds)
