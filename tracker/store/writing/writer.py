"""The writer: observations of runs are merged and written in groups, each in one transaction.

Callbacks are stored first, and reach the same merge when they are applied: see `tracker.receiving`.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar

import orjson
from sqlalchemy import Connection

from tracker.core.events import event_id, events_between
from tracker.core.formatting import clean
from tracker.core.observation import Observation
from tracker.core.record import (
    DurationsOf,
    Entry,
    FailedRead,
    Observed,
    Record,
    StartFacts,
    apply,
)
from tracker.core.rollup import RollupKey, facts, same
from tracker.core.run import Output, RunError, fast_dataclass
from tracker.core.schedule import Policy
from tracker.store.engine import Database, dump_json
from tracker.store.queries.deliveries import requeue_runs
from tracker.store.writing.group_commit import GroupCommit, call_hook
from tracker.store.writing.statements import (
    BatchChanges,
    lock_runs,
    write_postgres,
    write_sqlite,
)

T = TypeVar("T")


@fast_dataclass
class WriteResult:
    """What an entry did: the run's record before and after it.

    `after` is `None` if the entry is about an unknown run.
    """

    before: Record | None
    after: Record | None

    @property
    def record(self) -> Record:
        """The run after an observation of it, which always leaves one."""
        if self.after is None:
            raise AssertionError("the entry is no observation")
        return self.after

    @property
    def settles(self) -> bool:
        """Whether the entry settled the run."""
        was_settled = self.before is not None and self.before.run.settled
        return self.after is not None and self.after.run.settled and not was_settled

    @property
    def changed(self) -> bool:
        """Whether the entry showed anything new about its run."""
        return self.after is not None and (
            self.before is None or self.after.run is not self.before.run
        )


@dataclass(frozen=True, slots=True)
class WriteOutcome:
    """What a write batch did: the result of each entry, in order, and the sum.

    `due` is true if a poll was brought forward, `requeued` if quarantined deliveries wait again,
    `outbox` if there are events to send to endpoints.
    """

    results: list[WriteResult]
    due: bool
    changed_runs: list[str]
    requeued: bool = False
    outbox: bool = False


OnCommit = Callable[[WriteOutcome], None]
"""Called in the event loop after each commit, before the callers are answered."""


@dataclass(frozen=True, slots=True)
class MergeRules:
    """What the merge needs besides the entries."""

    policy: Policy
    durations_of: DurationsOf


@dataclass(eq=False)
class Writer(GroupCommit[Entry, WriteResult]):
    """Commits entries in groups. Used as `async with Writer(database, …) as writer`."""

    name = "writer"
    database: Database
    _: KW_ONLY
    rules: MergeRules
    on_commit: Sequence[OnCommit] = ()

    async def submit(self, entry: Entry) -> WriteResult:
        """Commit an entry, and return what it did.

        Raises `StoreUnavailable` if it was not committed in time (it still may be), and
        `StoreError` if the database refuses this very entry.
        """
        return await self.enqueue(cleaned(entry))

    async def submit_all(self, entries: Sequence[Entry]) -> list[WriteResult]:
        """Commit entries, and return what each did, in order.

        They share transactions; those of different transactions are committed in any order. Raises
        as `submit` does, after all others have been committed or refused.
        """
        answers = self.enqueue_all([cleaned(entry) for entry in entries])
        results = []
        for each in await asyncio.gather(*answers, return_exceptions=True):
            if isinstance(each, BaseException):
                raise each
            results.append(each)
        return results

    async def _commit(self, items: list[Entry]) -> list[WriteResult]:
        outcome = await self.database.write(partial(self._write, items))
        for hook in self.on_commit:
            call_hook(hook, outcome)
        return outcome.results

    def _write(self, entries: list[Entry], connection: Connection) -> WriteOutcome:
        """Merge and write entries, in their order; several may be about one run."""
        run_ids = {entry.run_id for entry in entries}
        batch = WriteBatch(connection, run_ids, self.rules, self.database.origin)
        for entry in entries:
            batch.add(entry)
        return batch.write()


class WriteBatch:
    """Entries about the runs with these ids, which are locked from the start. On PostgreSQL,
    `origin` marks the notices of this process.

    Runs are always locked in the order of their ids, so that no two processes deadlock. Nothing is
    committed here.
    """

    def __init__(
        self, connection: Connection, run_ids: set[str], rules: MergeRules, origin: str
    ) -> None:
        self._connection = connection
        self._rules = rules
        self._origin = origin
        self._before = lock_runs(connection, sorted(run_ids)) if run_ids else {}
        self._now = dict(self._before)
        self._changes = BatchChanges()
        self._started: dict[tuple[str, str], list[Any]] = {}
        self._results: list[WriteResult] = []
        self._last: dict[str, Entry] = {}

    def record(self, run_id: str) -> Record | None:
        """The run after the entries so far; `None` for an unknown run."""
        return self._now.get(run_id)

    def add(self, entry: Entry) -> None:
        run_id, rules, changes = entry.run_id, self._rules, self._changes
        before = self._now.get(run_id)
        after = apply(before, entry, policy=rules.policy, durations_of=rules.durations_of)
        result = WriteResult(before=before, after=after)
        self._results.append(result)
        if after is None:
            return
        self._now[run_id] = after
        self._last[run_id] = entry
        if isinstance(entry, Observed):
            if result.changed:
                seen = entry.observation
                status, source = str(seen.status), str(seen.source)
                event = (run_id, seen.at, source, status, seen.progress, seen.to_json())
                changes.events.append(event)
            if (start := entry.start) is not None:
                key = (start.workspace_id, start.idempotency_key)
                # A version before 0023 stored the reservation without the key.
                is_counted = before is not None and (
                    before.idempotency_key is not None or before.reserved_at is not None
                )
                self._started.setdefault(key, [run_id, 0])[1] += not is_counted
        due = after.next_check_at
        known = None if before is None else before.next_check_at
        if due is not None and (known is None or due < known):
            changes.due = True

    def write(self) -> WriteOutcome:
        """Write the differences between the stored and the merged records.

        On PostgreSQL, raises `WriteConflict` if another process has added a new run.
        """
        changes = self._changes
        rollups: dict[RollupKey, list[int]] = {}
        for run_id, new in sorted(self._now.items()):
            old = self._before.get(run_id)
            if new is old or new == old:
                continue
            changes.add(old, new)
            if old is None or not same(old, new):
                _count(rollups, old, -1)
                _count(rollups, new, 1)
            for event in events_between(old, new):
                row = (event_id(event, new), event.value, run_id, self._last[run_id].at)
                changes.outbox.append(row)
        changes.rollups = [(*key, *counts) for key, counts in rollups.items() if any(counts)]
        changes.started = [
            (*key, run_id, shown, max(shown - 1, 0))
            for key, (run_id, shown) in sorted(self._started.items())
        ]
        if changes.added or changes.updated or changes.started:
            if self._connection.dialect.name == "sqlite":
                write_sqlite(self._connection, changes)
            else:
                write_postgres(self._connection, changes, self._origin)
        requeued = bool(changes.moved) and requeue_runs(self._connection, changes.moved)
        return WriteOutcome(
            self._results, changes.due, changes.changed_runs, requeued, bool(changes.outbox)
        )


def _count(rollups: dict[RollupKey, list[int]], record: Record | None, sign: int) -> None:
    for key, amount in () if record is None else facts(record):
        counts = rollups.setdefault(key, [0, 0])
        counts[0] += sign
        counts[1] += sign * amount


_TEXTS: Final[dict[type, tuple[str, ...]]] = {
    Observed: ("observation", "start"),
    StartFacts: ("inputs",),
    FailedRead: ("run_id", "error"),
    Observation: (
        *("run_id", "run_type", "workspace_id", "project_id", "technique_id", "technique_name"),
        *("poll_url", "error", "outputs"),
    ),
    RunError: ("code", "message"),
    Output: ("output_id", "type", "url"),
}
"""The attributes with text in them."""


def cleaned(value: T) -> T:
    """`value`, an entry or any text or JSON in one, as a database returns it; `value` itself if
    that is equal.

    PostgreSQL's text holds neither NUL nor half a surrogate pair. Both are replaced before
    observations are merged, so that the merged values are the stored ones.
    """
    made: Any = value
    if isinstance(value, str):
        made = clean(value)
    elif isinstance(value, tuple):
        made = tuple(map(cleaned, value))
    elif (names := _TEXTS.get(type(value))) is None:
        made = orjson.loads(dump_json(value))
    else:
        changes = {}
        for name in names:
            one = getattr(value, name)
            if one is not None and (fit := cleaned(one)) is not one:
                changes[name] = fit
        if changes:
            made = replace(made, **changes)
    return value if made is value or made == value else made
