"""What is known of how long each technique takes, kept for a few minutes."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from tracker.core.clock import Clock
from tracker.core.schedule import LEARNED_FROM, Durations
from tracker.store import read
from tracker.store.engine import Database

KEPT_FOR: Final = timedelta(minutes=5)
FEW_KEPT_FOR: Final = timedelta(seconds=5)
"""Where too few runs are known to learn from, a sweep may bring the rest at any moment."""


class DurationBook:
    """The durations of techniques, read from the ended runs.

    The door asks `of`, in the middle of a transaction, and never waits: whoever is about to send
    observations of a technique calls `learn` before.
    """

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._known: dict[str, tuple[datetime, Durations]] = {}

    def of(self, technique_id: str | None) -> Durations | None:
        """What is known of a technique; `None` for nothing yet."""
        entry = self._known.get(technique_id or "")
        return entry[1] if entry else None

    async def learn(self, technique_ids: Iterable[str | None]) -> None:
        """Read the durations of these techniques, where what is known of them is old."""
        now = self._clock()
        for technique_id in set(technique_ids):
            if technique_id is None:
                continue
            entry = self._known.get(technique_id)
            if entry is None or now - entry[0] >= _kept_for(entry[1]):
                self._known[technique_id] = (
                    now,
                    await read.durations(self._database, technique_id),
                )


def _kept_for(known: Durations) -> timedelta:
    return KEPT_FOR if known.count >= LEARNED_FROM else FEW_KEPT_FOR
