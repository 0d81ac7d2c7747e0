"""One transaction of the door: what a batch of entries makes of the rows, whichever database it is.

Locks are always taken in one order, deliveries by id and then runs by id, so that any number of
processes can do this at the same time and none waits for another in a circle.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Protocol

from sqlalchemy import Connection, bindparam, null, update

from tracker.core.entry import Delivered, Delivery, Entry, Replayed, Seen, Unseen
from tracker.core.observation import Observation
from tracker.core.quick import quick_dataclass
from tracker.core.record import DurationsOf, Record, apply
from tracker.core.schedule import Policy
from tracker.core.tally import Key, facts, same
from tracker.store import retention
from tracker.store.tables import deliveries, word


@quick_dataclass(frozen=True, slots=True)
class Passed:
    """What an entry did: the run's record before and after it.

    `after` is `None` where the entry is about no run that is known. `repeated` says that the
    delivery had come before, so that only its count changed, or that it had been replayed before;
    its run is then not looked at.
    """

    before: Record | None
    after: Record | None
    repeated: bool = False

    @property
    def news(self) -> bool:
        """Whether the entry said something about its run that was not known."""
        return self.after is not None and (
            self.before is None or self.after.run is not self.before.run
        )


DELIVERY_COLUMNS: Final = tuple(each for each in deliveries.c if each.name != "body_removed_at")
EVENT_COLUMNS: Final = ("run_id", "at", "source", "status", "progress", "detail")
OUTPUT_COLUMNS: Final = ("run_id", "position", "output_id", "type", "url")
TALLY_COLUMNS: Final = (*Key._fields, "runs", "amount")
Rows = list[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a whole batch did: of each entry in order, and in sum.

    `due` says that a look was brought forward, `news` names the runs that show otherwise than
    before.
    """

    passed: list[Passed]
    due: bool
    news: list[str]


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
    """How many runs more or fewer now count under a key, by how much: see tracker.core.tally."""
    started: Rows = field(default_factory=list)
    """Workspace slots and idempotency keys of starts, and the runs that they became."""
    due: bool = False
    """Whether a look at some run was brought forward."""
    news: list[str] = field(default_factory=list)
    """Runs that show otherwise than before."""


class Statements(Protocol):
    """The statements of a batch; their number does not grow with it."""

    def count_deliveries(self, connection: Connection, rows: Rows) -> dict[str, int]:
        """Insert rows of `DELIVERY_COLUMNS`, or add to the receipts of those that are there.

        Returns how often each delivery has now come.
        """

    def lock_runs(self, connection: Connection, run_ids: list[str]) -> dict[str, Record]:
        """The records of those of the runs that exist, kept from others until the commit."""

    def write(self, connection: Connection, changes: Changes) -> None:
        """Write all of it. Raises `WriteConflict` where a new run has become known meanwhile."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the merge needs to know besides the entries."""

    policy: Policy
    durations_of: DurationsOf


def pass_batch(
    connection: Connection, entries: Sequence[Entry], rules: Rules, statements: Statements
) -> Outcome:
    """Do what the entries say, in their order, and return what came of each.

    Several entries may be about one run. Nothing is committed here.
    """
    came = Came.among(entries)
    receipts = statements.count_deliveries(connection, came.rows) if came.rows else {}
    repeated = came.repeated(receipts) | _apply_replays(connection, entries)
    run_ids = run_ids_of(entries, repeated)
    before = statements.lock_runs(connection, run_ids) if run_ids else {}
    passed, changes = merged(entries, before, rules, repeated=repeated)
    if changes.records or changes.started:
        statements.write(connection, changes)
    return Outcome(passed, changes.due, changes.news)


def run_ids_of(entries: Sequence[Entry], repeated: Collection[int]) -> list[str]:
    """The runs that the entries are about, sorted, but for those at the `repeated` positions."""
    found = {
        run_id
        for position, entry in enumerate(entries)
        if position not in repeated and (run_id := _run_id(entry)) is not None
    }
    return sorted(found)


def merged(
    entries: Sequence[Entry],
    before: Mapping[str, Record],
    rules: Rules,
    *,
    repeated: Collection[int],
) -> tuple[list[Passed], Changes]:
    """What the entries make of the runs as they were `before`: of each in order, and what is to be
    written for all. Those at the `repeated` positions say nothing new."""
    now = dict(before)
    changes = Changes()
    passed = []
    for position, entry in enumerate(entries):
        if position in repeated:
            passed.append(Passed(None, None, repeated=True))
        else:
            passed.append(_pass(entry, now, changes, rules))
    _gather(before, now, changes)
    return passed, changes


@dataclass(frozen=True, slots=True)
class Came:
    """The deliveries among entries: at which positions each stands, and a row for each, sorted."""

    at: dict[str, list[int]]
    rows: Rows

    @classmethod
    def among(cls, entries: Sequence[Entry]) -> "Came":
        """Those of these entries."""
        at: dict[str, list[int]] = {}
        for position, entry in enumerate(entries):
            if isinstance(entry, Delivered):
                at.setdefault(entry.delivery.delivery_id, []).append(position)
        rows = [_delivery_row([_delivery(entries[p]) for p in at[key]]) for key in sorted(at)]
        return cls(at, rows)

    def repeated(self, receipts: Mapping[str, int]) -> set[int]:
        """The positions of those that had come before, where each has now come so often."""
        repeated = set()
        for key, positions in self.at.items():
            first_is_new = receipts[key] == len(positions)
            repeated.update(positions[1:] if first_is_new else positions)
        return repeated

    @property
    def repeated_here(self) -> set[int]:
        """The same where none of them had come before."""
        return {position for positions in self.at.values() for position in positions[1:]}


_READ_AGAIN: Final = ("run_id", "event_type", "api_version", "workspace_id", "created_at")
"""What a replay may read otherwise than it was read when the callback came."""
_APPLY_REPLAY: Final = (
    update(deliveries)
    .where(
        deliveries.c.delivery_id == bindparam("replayed"),
        deliveries.c.outcome == word("quarantined"),
    )
    .values(
        outcome="applied",
        reason=null(),
        **{name: bindparam(f"as_{name}", type_=deliveries.c[name].type) for name in _READ_AGAIN},
    )
)


def _apply_replays(connection: Connection, entries: Sequence[Entry]) -> set[int]:
    """Take the replayed deliveries out of quarantine; the positions of those that were not in it.

    The door brings each replay in a batch of its own, so that deliveries are locked in one order
    here too.
    """
    repeated = set()
    for position, entry in enumerate(entries):
        if isinstance(entry, Replayed):
            read = {f"as_{name}": getattr(entry.delivery, name) for name in _READ_AGAIN}
            found = connection.execute(
                _APPLY_REPLAY, {"replayed": entry.delivery.delivery_id, **read}
            )
            if found.rowcount == 0:
                repeated.add(position)
            else:
                # Its body is now one of those that go, maybe before where the last ones went.
                retention.step_back(connection, "bodies", entry.delivery.received_at)
    return repeated


def _delivery(entry: Entry) -> Delivery:
    assert isinstance(entry, Delivered)  # noqa: S101 - for the type checker
    return entry.delivery


def _delivery_row(receipts: list[Delivery]) -> tuple[Any, ...]:
    """The row of one delivery that a batch holds once or more, in the order of the table."""
    first = receipts[0]
    return (
        first.delivery_id,
        first.run_id,
        first.event_type,
        first.api_version,
        first.workspace_id,
        first.created_at,
        first.received_at,
        max(delivery.received_at for delivery in receipts),
        len(receipts),
        first.outcome.value,
        first.reason,
        first.body,
    )


def _pass(entry: Entry, now: dict[str, Record], changes: Changes, rules: Rules) -> Passed:
    run_id = _run_id(entry)
    if run_id is None:
        return Passed(None, None)
    before = now.get(run_id)
    after = apply(before, entry, policy=rules.policy, durations_of=rules.durations_of)
    passed = Passed(before, after)
    if after is None:
        return passed
    now[run_id] = after
    seen = _observation(entry)
    if seen is not None and passed.news:
        changes.events.append(_event_row(seen))
    if isinstance(entry, Seen) and entry.slot is not None and entry.idempotency_key is not None:
        changes.started.append((entry.slot, entry.idempotency_key, run_id))
    if _brought_forward(before, after):
        changes.due = True
    return passed


def _brought_forward(before: Record | None, after: Record) -> bool:
    """Whether the next look at the run is sooner than anybody who waits for it knows."""
    due = after.next_check_at
    known = None if before is None else before.next_check_at
    return due is not None and (known is None or due < known)


def _gather(before: Mapping[str, Record], now: dict[str, Record], changes: Changes) -> None:
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


def _run_id(entry: Entry) -> str | None:
    """Which run the entry is about; `None` for a quarantined delivery and for a trial."""
    if isinstance(entry, Unseen):
        return entry.run_id
    return None if entry.observation is None else entry.observation.run_id


def _observation(entry: Entry) -> Observation | None:
    return None if isinstance(entry, Unseen) else entry.observation


def _event_row(seen: Observation) -> tuple[str, datetime, str, str, float | None, dict[str, Any]]:
    """The row of one event, in the order of `EVENT_COLUMNS`."""
    return (
        seen.run_id,
        seen.at,
        seen.source.value,
        seen.status.value,
        seen.progress,
        seen.to_json(),
    )
