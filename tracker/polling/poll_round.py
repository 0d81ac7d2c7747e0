"""One round of polling in one workspace: how far it is, how FLORA does, and what rests."""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from tracker.core.clock import Clock
from tracker.core.record import Record
from tracker.core.schedule import LEARNED_FROM, Durations
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.writing.writer import WriteResult

T = TypeVar("T")

FAILURES: Final = 2
"""So many failures without one answer end a round: FLORA is down, and no run is to blame."""
REST: Final = timedelta(seconds=1)
LONGEST_REST: Final = timedelta(seconds=30)
"""How long a workspace then rests: doubling from the first to the second."""


@dataclass(slots=True, kw_only=True)
class PollReport:
    """What one round did.

    Runs claimed, history pages and single reads made, runs settled, runs that could not be read
    (FLORA's word that there is no such run is an answer). `more` is true where due runs were left
    for the next round, `at_once` where that should not wait for others to join them; `trouble` says
    why the round was broken off, if it was.
    """

    claimed: int = 0
    pages: int = 0
    reads: int = 0
    settled: int = 0
    failed: int = 0
    more: bool = False
    at_once: bool = False
    trouble: str | None = None

    def count(self, passed: WriteResult) -> None:
        """Count one run that went through the writer, if that settled it."""
        before, after = passed.before, passed.after
        if after is not None and after.run.settled and not (before and before.run.settled):
            self.settled += 1

    def add(self, other: "PollReport") -> None:
        """Add another round's figures."""
        self.claimed += other.claimed
        self.pages += other.pages
        self.reads += other.reads
        self.settled += other.settled
        self.failed += other.failed
        self.more = self.more or other.more
        self.at_once = self.at_once or other.at_once
        self.trouble = self.trouble or other.trouble


@dataclass(slots=True)
class Round:
    """One round in one workspace: what is still to be read, and how FLORA does.

    `places` tells where runs stand in FLORA's list, as far as that is known, once it was asked for;
    `shared` counts the reads that other runs shared, or could have. `confirmed` tells, once that
    was asked, that FLORA can be read in the workspace, so that its denial of a run counts.
    `recheck` is true where settled runs are read again for their cost and outputs; `probe` names
    the one whose cost a page lacked, and which is read alone to see whether lists leave costs out.
    """

    open_runs: dict[str, Record]
    recheck: bool = False
    probe: str | None = None
    places: Mapping[str, int] | None = None
    shared: int = 0
    answered: bool = False
    confirmed: bool | None = None
    confirming: asyncio.Lock = field(default_factory=asyncio.Lock)
    failures: int = 0
    refused: bool = False
    trouble: str = ""

    @property
    def broken_off(self) -> bool:
        """Whether nothing more is asked: FLORA refuses to be asked, or answers nothing at all."""
        return self.refused or (self.failures >= FAILURES and not self.answered)

    def fail(self, error: str) -> None:
        """FLORA gave no answer, or a 5xx."""
        self.failures += 1
        self.trouble = error

    def refuse(self, error: str) -> None:
        """FLORA refuses the key, or any further request for now; or the key reads another
        workspace."""
        self.refused = True
        self.trouble = error


class Rests:
    """What is left alone for a while because it failed, by name: longer with each failure in a
    row."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rests: dict[str, tuple[int, datetime, timedelta]] = {}

    def left(self, name: str) -> timedelta:
        """How long it is still left alone: 0 where it is not, as after the clock was set back."""
        now = self._clock()
        _, since, length = self._rests.get(name, (0, now, timedelta()))
        return max(timedelta(), since + length - now) if since <= now else timedelta()

    def failures(self, name: str) -> int:
        """How often in a row it has failed."""
        return self._rests[name][0] if name in self._rests else 0

    def failed(self, name: str, *, least: float = 0.0) -> float:
        """It has failed once more; for how many seconds it is left alone, `least` at least."""
        failures = self.failures(name) + 1
        length: timedelta = min(REST * 2 ** min(failures - 1, 10), LONGEST_REST)
        length = max(length, timedelta(seconds=least))
        self._rests[name] = (failures, self._clock(), length)
        return length.total_seconds()

    def over(self, name: str) -> None:
        """It has gone well."""
        self._rests.pop(name, None)


async def all_of(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all of it at the same time. Where one fails the others are ended, and its error raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


# How long due runs are left to gather, so that they can share the pages that show them.
#
# A page of the history costs the same whether it settles one run or a hundred. So the reads that
# a round made for runs which pages show are followed by a pause of as many seconds, within which
# more of them become due. Who polls so makes about one such read a second: a run that ends alone
# is read at once, and where hundreds are under way, their ends wait up to ten seconds and are
# read together. A sweep reads the same pages, and counts like a round.
#
# Why these two: 1,000 runs, on ten pages, that end within a minute cost 0.07 reads each with 10
# s, 0.09 with a sweep among them, and half of them wait for 5 s. With 5 s they cost 0.14 reads
# and wait for 2 s, without gathering 0.6 reads and half a second (`python -m bench.economy`).


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


# What is known of how long each technique takes, kept for a few minutes.


KEPT_FOR: Final = timedelta(minutes=5)
FEW_KEPT_FOR: Final = timedelta(seconds=5)
"""Where too few runs are known to learn from, a sweep may bring the rest at any moment."""


class DurationBook:
    """The durations of techniques, read from the ended runs.

    The writer asks `of`, in the middle of a transaction, and never waits: whoever is about to send
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
