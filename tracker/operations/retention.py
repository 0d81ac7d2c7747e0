"""Retention: deletes what is old, without anyone else having to wait.

Each transaction is to take a few milliseconds on any disk: its number of rows follows from how long
the last one took. After each comes a pause longer than the transaction, so that on SQLite, with one
writer at a time, a receiver in another process gets its turn.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection

from tracker.core.clock import Clock
from tracker.core.errors import FieldFault, InvalidRequest
from tracker.core.log import get_logger
from tracker.store.engine import Database
from tracker.store.errors import StoreBusy
from tracker.store.queries import audit
from tracker.store.queries.audit import Action
from tracker.store.schema import audit as entries
from tracker.store.schema import sweeps
from tracker.store.writing import retention, rollups
from tracker.store.writing.retention import Counts, PruneKey, PrunePage

SHORTEST: Final = timedelta(days=1)
"""Nothing younger is deleted: FLORA may still repeat a callback, list a run late, or be asked for
the run of a start in doubt."""
BODIES_AFTER: Final = timedelta(days=30)
"""Default age for deleting bodies, or with their runs if those go sooner."""
AUDIT_AFTER: Final = timedelta(days=365)
PAGE: Final = 1000
"""Rows found by one read."""
AIM: Final = {"sqlite": 0.01, "postgresql": 0.1}
"""Target seconds per transaction: on SQLite nothing else writes meanwhile, on PostgreSQL nothing
else needs its rows."""
FEWEST, MOST = 5, 500
"""Rows per transaction."""
SHORTEST_PAUSE: Final = 0.01
PAUSE_FACTOR: Final = 2.0
"""The pause between two transactions, in multiples of what the last one took."""
TABLES: Final = (
    *("runs", "run_outputs", "run_events", "deliveries", "bodies", "starts"),
    *("messages", "message_attempts", "sweeps", "audit"),
)
"""What is counted, in the order shown; `bodies` are counted with or without their delivery."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """The ages from which data is deleted. Quarantined deliveries and keys of starts are kept if
    no age is given."""

    runs: timedelta
    bodies: timedelta
    audit: timedelta = AUDIT_AFTER
    quarantined: timedelta | None = None
    keys: timedelta | None = None


def ages(
    older_than: timedelta,
    *,
    bodies: timedelta | None,
    quarantined: timedelta | None,
    keys: timedelta | None,
    first_sweep: timedelta,
    audit: timedelta | None = None,
) -> Ages:
    """Check the ages that were asked for. Raises `InvalidRequest`.

    `first_sweep` is how far back the first sweep of a workspace goes.
    """
    chosen = Ages(
        runs=older_than,
        bodies=min(BODIES_AFTER, older_than) if bodies is None else bodies,
        audit=AUDIT_AFTER if audit is None else audit,
        quarantined=quarantined,
        keys=keys,
    )
    options = (
        ("--older-than", chosen.runs),
        ("--bodies-older-than", chosen.bodies),
        ("--quarantined-older-than", chosen.quarantined),
        ("--audit-older-than", chosen.audit),
    )
    for name, age in options:
        if age is not None and age < SHORTEST:
            raise _refused(name, "must be at least 1d: younger data may still be needed")
    if chosen.runs < first_sweep:
        days = first_sweep / timedelta(days=1)
        raise _refused(
            "--older-than",
            f"must not be shorter than TRACKER_HISTORY_SINCE ({days:g}d), the span of a sweep",
        )
    if chosen.bodies > chosen.runs:
        raise _refused(
            "--bodies-older-than", "must not be longer than --older-than: bodies go with their runs"
        )
    if chosen.keys is not None and chosen.keys < chosen.runs:
        raise _refused(
            "--keys-older-than", "must not be shorter than --older-than: a run's key outlives it"
        )
    return chosen


def _refused(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {message}", [FieldFault(name, message)])


@dataclass(kw_only=True, eq=False)
class Pruner:
    """Deletes old data. `page` is how many rows one read finds."""

    database: Database
    clock: Clock
    page: int = PAGE
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __post_init__(self) -> None:
        self._batch_size = 20

    async def prune(self, ages: Ages, *, dry: bool = False) -> dict[str, int]:
        """Delete data older than `ages`; the number of rows by table.

        `dry` only counts them. Raises `StoreUnavailable`; deletions until then stay.
        """
        total = Counts()
        audit_id, detail = 0, {}
        if not dry:
            detail = {
                name: f"{age / timedelta(days=1):g}d" for name, age in asdict(ages).items() if age
            }
            entry = audit.entry(Action.PRUNE, self.clock(), older_than=detail)
            audit_id = await audit.write(self.database, entry)
        for kind in await self._kinds(ages):
            end: PruneKey | None = None
            while True:
                page = await kind.find(after=end, limit=self.page)
                total += await (self._count if dry else self._delete)(kind, page.found)
                if (end := page.end) is None:
                    break
        removed = {name: total[name] for name in TABLES}
        if not dry:
            outcome = {"older_than": detail, "removed": dict(+total) or "nothing"}
            await audit.add_detail(self.database, audit_id, outcome)
            log.info("db.pruned", actor=audit.principal().name, **removed)
        return removed

    async def _kinds(self, ages: Ages) -> "list[_RowKind]":
        db, now = self.database, self.clock()
        runs, bodies, audits = now - ages.runs, now - ages.bodies, now - ages.audit
        kinds = [
            _RowKind(
                partial(retention.old_runs, db, runs, await retention.protected_runs(db)),
                partial(retention.delete_runs, before=runs),
                partial(retention.count_runs, before=runs),
            ),
            _RowKind(
                partial(retention.orphaned_deliveries, db, runs),
                partial(retention.delete_deliveries, outcome="applied", before=runs),
                _count_as("deliveries"),
            ),
            _RowKind(
                partial(retention.old_bodies, db, bodies),
                partial(retention.empty_bodies, at=now),
                _count_as("bodies"),
            ),
            _RowKind(
                partial(retention.next_page, db, retention.old_messages(runs)),
                partial(retention.delete_messages, before=runs),
                retention.count_messages,
            ),
            _RowKind(
                partial(retention.old_sweeps, db, runs),
                partial(retention.delete_by_id, table=sweeps),
                _count_as("sweeps"),
            ),
            _RowKind(
                partial(retention.next_page, db, retention.old_audit(audits)),
                partial(retention.delete_by_id, table=entries),
                _count_as("audit"),
            ),
        ]
        if ages.quarantined is not None:
            before = now - ages.quarantined
            kinds.append(
                _RowKind(
                    partial(retention.next_page, db, retention.quarantined(before)),
                    partial(retention.delete_deliveries, outcome="quarantined", before=before),
                    _count_as("deliveries", "bodies"),
                )
            )
        if ages.keys is not None:
            find = partial(retention.old_start_keys, db, now - ages.keys)
            kinds.append(_RowKind(find, retention.delete_start_keys, _count_as("starts")))
        return kinds

    async def _delete(self, kind: "_RowKind", keys: Sequence[Any]) -> Counts:
        """Delete these rows, in as many transactions as needed."""
        removed = Counts()
        left = list(keys)
        while left:
            some, left = left[: self._batch_size], left[self._batch_size :]
            removed += await self._write(partial(kind.delete, keys=some))
        if removed["runs"]:
            with suppress(StoreBusy):  # being recounted; changes not compacted count too
                await rollups.compact(self.database)
        return removed

    async def _write(self, work: Callable[[Connection], Counts]) -> Counts:
        """One transaction and its pause; its duration sets the size of the next."""
        began = 0.0

        def timed(connection: Connection) -> Counts:
            nonlocal began
            began = time.monotonic()  # without the wait for other transactions
            return work(connection)

        counts: Counts = await self.database.write(timed)
        took = time.monotonic() - began
        fitting = int(self._batch_size * min(AIM[self.database.dialect] / took, 2.0))
        self._batch_size = min(max(fitting, FEWEST), MOST)
        await self.sleep(max(SHORTEST_PAUSE, PAUSE_FACTOR * took))
        return counts

    async def _count(self, kind: "_RowKind", keys: Sequence[Any]) -> Counts:
        async with self.database.read() as connection:
            return await connection.run_sync(partial(kind.count, keys=keys))


@dataclass(frozen=True, slots=True)
class _RowKind:
    """One kind of rows: how they are found (`after` a key, up to `limit`), deleted, or counted."""

    find: Callable[..., Awaitable[PrunePage]]
    delete: Callable[..., Counts]
    count: Callable[..., Counts]


def _count_as(*tables: str) -> Callable[..., Counts]:
    return lambda _, keys: Counts(dict.fromkeys(tables, len(keys)))
