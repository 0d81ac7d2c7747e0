"""The one way in which observations of runs are written: in groups, each answered after its commit.

Callbacks are stored by `tracker.store.writing.inbox` first, and come to the same merge when
they are applied.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy import Connection

from tracker.core.observation import Observation
from tracker.core.quick import quick_dataclass
from tracker.core.record import Delivery, DurationsOf, Entry, Record, Seen, Unseen, apply
from tracker.core.rollup import Key, facts, same
from tracker.core.schedule import Policy
from tracker.store.engine import Database
from tracker.store.text import clean_entry
from tracker.store.writing.delivery_rows import requeue_runs
from tracker.store.writing.group_commit import GroupCommit, call_hook

if TYPE_CHECKING:
    from tracker.store.engine import Database


# One transaction of a writer: what a group of entries makes of the rows, whichever database it
# is.
#
# Runs are always locked in one order, by id, so that any number of processes can do this at the
# same time and none waits for another in a circle.


@quick_dataclass(frozen=True, slots=True)
class WriteResult:
    """What an entry did: the run's record before and after it.

    `after` is `None` where the entry is about no run that is known.
    """

    before: Record | None
    after: Record | None

    @property
    def news(self) -> bool:
        """Whether the entry said something about its run that was not known."""
        return self.after is not None and (
            self.before is None or self.after.run is not self.before.run
        )


EVENT_COLUMNS: Final = ("run_id", "at", "source", "status", "progress", "detail")
OUTPUT_COLUMNS: Final = ("run_id", "position", "output_id", "type", "url")
TALLY_COLUMNS: Final = (*Key._fields, "runs", "amount")
Rows = list[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class WriteOutcome:
    """What a write batch did: the result of each entry, in order, and the sum.

    `due` tells that a poll was brought forward, `requeued` that quarantined deliveries wait again.
    """

    results: list[WriteResult]
    due: bool
    changed_runs: list[str]
    requeued: bool = False


@dataclass(slots=True)
class Changes:
    """What a batch is to write, in rows sorted by key."""

    records: list[Record] = field(default_factory=list)
    """New and changed ones."""
    known: list[str] = field(default_factory=list)
    """Those of them that had a row."""
    outputs_gone: list[str] = field(default_factory=list)
    """Runs whose stored outputs are replaced."""
    outputs: Rows = field(default_factory=list)
    events: Rows = field(default_factory=list)
    tallies: Rows = field(default_factory=list)
    """How many runs more or fewer now count under a key, by how much: see tracker.core.rollup."""
    started: Rows = field(default_factory=list)
    """Workspace slots and idempotency keys of starts, the runs that they became (of several the
    first), and how many runs show for the first time as theirs: all, and without one."""
    due: bool = False
    """Whether a look at some run was brought forward."""
    news: list[str] = field(default_factory=list)
    """Runs that show otherwise than before."""
    moved: list[str] = field(default_factory=list)
    """Runs that turned out to be another workspace's than was known."""


class Statements(Protocol):
    """The statements of a batch; their number does not grow with it."""

    def lock_runs(self, connection: Connection, run_ids: list[str]) -> dict[str, Record]:
        """The records of those of the runs that exist, kept from others until the commit."""

    def write(self, connection: Connection, changes: Changes) -> None:
        """Write all of it. Raises `WriteConflict` where a new run has become known meanwhile."""

    def take_waiting(
        self, connection: Connection, limit: int, held_up: Sequence[str]
    ) -> tuple[list[Delivery], int]:
        """The deliveries that have waited longest, without those `held_up`, kept from others until
        the commit; and how many were found, some of which may be too large for this time. What
        others have taken is passed over."""

    def finish(
        self,
        connection: Connection,
        applied: Sequence[str],
        quarantined: Sequence[tuple[str, str]],
        at: datetime,
    ) -> None:
        """Mark deliveries as applied at that moment, and others as quarantined, with the reason."""


def statements_for(db: "Database") -> Statements:
    """The statements for this database, built when they are first needed."""
    if db.dialect == "sqlite":
        from tracker.store.writing.statements_sqlite import SqliteStatements  # noqa: PLC0415

        return SqliteStatements()
    from tracker.store.writing.statements_postgres import PostgresStatements  # noqa: PLC0415

    return PostgresStatements(db.origin)


@dataclass(frozen=True, slots=True)
class MergeRules:
    """What the merge needs to know besides the entries."""

    policy: Policy
    durations_of: DurationsOf


def write_batch(
    connection: Connection, entries: Sequence[Entry], rules: MergeRules, statements: Statements
) -> WriteOutcome:
    """Do what the entries say, in their order, and return what came of each.

    Several entries may be about one run. Nothing is committed here.
    """
    merging = WriteBatch(connection, {run_id_of(entry) for entry in entries}, rules, statements)
    for entry in entries:
        merging.add(entry)
    return merging.write()


class WriteBatch:
    """What a group of entries makes of these runs, which are locked from the beginning."""

    def __init__(
        self,
        connection: Connection,
        run_ids: set[str],
        rules: MergeRules,
        statements: Statements,
    ) -> None:
        self._connection = connection
        self._rules = rules
        self._statements = statements
        self._before = statements.lock_runs(connection, sorted(run_ids)) if run_ids else {}
        self._now = dict(self._before)
        self._changes = Changes()
        self._started: dict[tuple[str, str], list[Any]] = {}
        self._passed: list[WriteResult] = []

    def record(self, run_id: str) -> Record | None:
        """The run as the entries so far have left it; `None` for one that is not known."""
        return self._now.get(run_id)

    def add(self, entry: Entry) -> None:
        """Take in one entry."""
        run_id, rules = run_id_of(entry), self._rules
        before = self._now.get(run_id)
        after = apply(before, entry, policy=rules.policy, durations_of=rules.durations_of)
        passed = WriteResult(before, after)
        self._passed.append(passed)
        if after is None:
            return
        self._now[run_id] = after
        if isinstance(entry, Seen):
            if passed.news:
                self._changes.events.append(_event_row(entry.observation))
            if entry.slot is not None and entry.idempotency_key is not None:
                key = (entry.slot, entry.idempotency_key)
                known = before is not None and before.reserved_at is not None
                self._started.setdefault(key, [run_id, 0])[1] += not known
        if _brought_forward(before, after):
            self._changes.due = True

    def write(self) -> WriteOutcome:
        """Write what has changed, and return what each entry did."""
        changes = self._changes
        _compare(self._before, self._now, changes)
        changes.started = [
            (*key, run_id, shown, max(shown - 1, 0))
            for key, (run_id, shown) in sorted(self._started.items())
        ]
        if changes.records or changes.started:
            self._statements.write(self._connection, changes)
        requeued = bool(changes.moved) and requeue_runs(self._connection, changes.moved)
        return WriteOutcome(self._passed, changes.due, changes.news, requeued)


def _brought_forward(before: Record | None, after: Record) -> bool:
    """Whether the next look at the run is sooner than anybody who waits for it knows."""
    due = after.next_check_at
    known = None if before is None else before.next_check_at
    return due is not None and (known is None or due < known)


def _compare(before: Mapping[str, Record], now: dict[str, Record], changes: Changes) -> None:
    """Compare what was with what is, and note what is to be written."""
    tallied: dict[Key, list[int]] = {}
    for run_id in sorted(now):
        old, new = before.get(run_id), now[run_id]
        if new is old or new == old:
            continue
        changes.records.append(new)
        _tally(tallied, old, new)
        if old is not None:
            changes.known.append(run_id)
            if new.run.workspace_id != old.run.workspace_id:
                changes.moved.append(run_id)
        if old is None or new.run is not old.run or new.tracking is not old.tracking:
            changes.news.append(run_id)
        stored = None if old is None else old.run.outputs
        outputs = new.run.outputs
        if outputs is stored or outputs == stored:
            continue
        if stored is not None:
            changes.outputs_gone.append(run_id)
        changes.outputs.extend(
            (run_id, position, output.output_id, output.type, output.url)
            for position, output in enumerate(outputs or ())
        )
    changes.tallies = [(*key, *counts) for key, counts in tallied.items() if any(counts)]


def _tally(tallied: dict[Key, list[int]], old: Record | None, new: Record) -> None:
    """Take off what the run counted for, and add what it counts for now."""
    if old is not None:
        if same(old, new):
            return
        for key, amount in facts(old):
            counts = tallied.setdefault(key, [0, 0])
            counts[0] -= 1
            counts[1] -= amount
    for key, amount in facts(new):
        counts = tallied.setdefault(key, [0, 0])
        counts[0] += 1
        counts[1] += amount


def run_id_of(entry: Entry) -> str:
    """Which run the entry is about."""
    return entry.run_id if isinstance(entry, Unseen) else entry.observation.run_id


def _event_row(seen: Observation) -> tuple[str, datetime, str, str, float | None, dict[str, Any]]:
    """The row of one event, in the order of `EVENT_COLUMNS`."""
    return (
        seen.run_id,
        seen.at,
        seen.source.value,
        str(seen.status),
        seen.progress,
        seen.to_json(),
    )


NAME: Final = "writer"

OnCommit = Callable[[WriteOutcome], None]
"""Called in the event loop after each commit, before the callers are answered."""


class Writer(GroupCommit[Entry, WriteResult]):
    """Takes entries and commits them in groups. Used as `async with Writer(database, …) as writer`.

    `options` are those of `GroupCommit`.
    """

    def __init__(
        self, db: Database, *, rules: MergeRules, on_commit: Sequence[OnCommit] = (), **options: Any
    ) -> None:
        super().__init__(self._commit_entries, name=NAME, **options)
        self._db = db
        self._rules = rules
        self._statements = statements_for(db)
        self._on_commit = tuple(on_commit)

    async def submit(self, entry: Entry) -> WriteResult:
        """Commit an entry, and return what it did.

        Raises `StoreUnavailable` where it was not committed in time (it still may be), and
        `StoreError` where the database refuses this very entry.
        """
        return await self.enqueue(clean_entry(entry))

    async def submit_all(self, entries: Sequence[Entry]) -> list[WriteResult]:
        """Commit entries, and return what each did, in order.

        They share transactions as they fit; what does not fit into one is committed in any order.
        Raises as `submit` does, after all have been answered: those that could be committed are.
        """
        answers = self.enqueue_all([clean_entry(entry) for entry in entries])
        done = []
        for each in await asyncio.gather(*answers, return_exceptions=True):
            if isinstance(each, BaseException):
                raise each
            done.append(each)
        return done

    async def _commit_entries(self, entries: list[Entry]) -> list[WriteResult]:
        outcome = await self._db.write(partial(_pass, entries, self._rules, self._statements))
        for hook in self._on_commit:
            call_hook(hook, outcome)
        return outcome.results


def _pass(
    entries: list[Entry], rules: MergeRules, statements: Statements, connection: Connection
) -> WriteOutcome:
    return write_batch(connection, entries, rules, statements)
