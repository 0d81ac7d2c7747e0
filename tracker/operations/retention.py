"""Retention: what is old goes, and nobody who works has to wait for it.

Each transaction is to take a few milliseconds, whatever the disk: the number of rows follows from
how long the last one took. After each comes a pause, longer than the transaction was, so that on
SQLite, where one writes at a time, a receiver in another process gets in between.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, Protocol

import structlog
from sqlalchemy import Connection

from tracker.core.clock import Clock
from tracker.core.errors import FieldFault, InvalidRequest
from tracker.store.engine import Database
from tracker.store.errors import StoreBusy
from tracker.store.queries import audit
from tracker.store.queries.audit import Action
from tracker.store.writing import prune
from tracker.store.writing import rollups as tallies
from tracker.store.writing.prune import Counts, Key, Page

SHORTEST: Final = timedelta(days=1)
"""Nothing younger is removed: FLORA may still repeat a callback, list a run late, or be asked for
the run of a start that is in doubt."""
BODIES_AFTER: Final = timedelta(days=30)
"""Bodies go after this, or with their runs where those go sooner."""
PAGE: Final = 1000
"""So many rows are looked at in one read."""
AIM: Final = {"sqlite": 0.01, "postgresql": 0.1}
"""Seconds that a transaction is to take: on SQLite nobody else writes meanwhile, on PostgreSQL
nobody else wants its rows."""
FEWEST, MOST = 5, 500
"""Rows in one transaction."""
PAUSE: Final = (0.01, 2.0)
"""Between two transactions: so many seconds at least, and so many times what the last one took."""

AUDIT_AFTER: Final = timedelta(days=365)
"""Entries of the audit log go after this."""
TABLES: Final = (
    *("runs", "run_outputs", "run_events", "deliveries", "bodies", "starts", "sweeps", "audit"),
)
"""What is counted, in the order in which it is told; `bodies` with their delivery or without."""


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """How old what is removed has to be. Quarantined deliveries, and the keys of starts, stay where
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
    """The ages that were asked for, where they are sound. Raises `InvalidRequest`.

    `first_sweep` is how far back the first sweep of a workspace goes.
    """
    chosen = Ages(
        runs=older_than,
        bodies=min(BODIES_AFTER, older_than) if bodies is None else bodies,
        audit=AUDIT_AFTER if audit is None else audit,
        quarantined=quarantined,
        keys=keys,
    )
    given = (
        ("--older-than", chosen.runs),
        ("--bodies-older-than", chosen.bodies),
        ("--quarantined-older-than", chosen.quarantined),
        ("--audit-older-than", chosen.audit),
    )
    for name, age in given:
        if age is not None and age < SHORTEST:
            raise _refused(name, "must be at least 1d: what is younger may still be asked for")
    if chosen.runs < first_sweep:
        days = first_sweep / timedelta(days=1)
        raise _refused(
            "--older-than",
            f"must not be shorter than TRACKER_HISTORY_SINCE ({days:g}d), which is how far back "
            "runs are looked for",
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


class Pruner:
    """Removes what is old. `sleep` is what it pauses with."""

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._clock = clock
        self._sleep = sleep
        self._size = 20

    async def prune(self, ages: Ages, *, dry: bool = False) -> dict[str, int]:
        """Remove what is older; how many rows that was, by table.

        `dry` only counts them. Raises `StoreUnavailable`; what was removed until then is.
        """
        total = Counts()
        audit_id, detail = 0, {}
        if not dry:
            detail = {
                name: f"{age / timedelta(days=1):g}d" for name, age in asdict(ages).items() if age
            }
            entry = audit.entry(Action.PRUNE, self._clock(), older_than=detail)
            audit_id = await audit.write(self._database, entry)
        for stage in await self._stages(ages):
            end: Key | None = None
            while True:
                page = await stage.find(after=end, limit=PAGE)
                total += await (self._count if dry else self._remove)(stage, page.found)
                if (end := page.end) is None:
                    break
        removed = {name: total[name] for name in TABLES}
        if not dry:
            outcome = {"older_than": detail, "removed": dict(+total) or "nothing"}
            await audit.add_detail(self._database, audit_id, outcome)
            log.info("db.pruned", actor=audit.principal().name, **removed)
        return removed

    async def _stages(self, ages: Ages) -> "list[_Stage]":
        now = self._clock()
        runs = now - ages.runs
        spared = await prune.spared(self._database)
        stages = [
            _Stage(
                find=partial(prune.old_runs, self._database, runs, spared),
                remove=partial(prune.delete_runs, before=runs),
                count=partial(prune.count_runs, before=runs),
            ),
            _Stage(
                find=partial(prune.left_deliveries, self._database, runs),
                remove=partial(prune.delete_left, before=runs),
                count=lambda _, keys: Counts(deliveries=len(keys)),
            ),
            _Stage(
                find=partial(prune.old_bodies, self._database, now - ages.bodies),
                remove=partial(prune.empty_bodies, at=now),
                count=lambda _, keys: Counts(bodies=len(keys)),
            ),
            _Stage(
                find=partial(prune.old_sweeps, self._database, runs),
                remove=prune.delete_sweeps,
                count=lambda _, keys: Counts(sweeps=len(keys)),
            ),
            _Stage(
                find=partial(prune.old_audit, self._database, now - ages.audit),
                remove=prune.delete_audit,
                count=lambda _, keys: Counts(audit=len(keys)),
            ),
        ]
        if ages.quarantined is not None:
            before = now - ages.quarantined
            stages.append(
                _Stage(
                    find=partial(prune.quarantined, self._database, before),
                    remove=partial(prune.delete_quarantined, before=before),
                    count=lambda _, keys: Counts(deliveries=len(keys), bodies=len(keys)),
                )
            )
        if ages.keys is not None:
            stages.append(
                _Stage(
                    find=partial(prune.old_keys, self._database, now - ages.keys),
                    remove=prune.delete_keys,
                    count=lambda _, keys: Counts(starts=len(keys)),
                )
            )
        return stages

    async def _remove(self, stage: "_Stage", keys: Sequence[Any]) -> Counts:
        """Remove these rows, in as many transactions as it takes."""
        removed = Counts()
        left = list(keys)
        while left:
            some, left = left[: self._size], left[self._size :]
            removed += await self._write(partial(stage.remove, keys=some))
        if removed["runs"]:
            with suppress(StoreBusy):  # all is being counted anew; what is not folded counts too
                await tallies.fold(self._database)
        return removed

    async def _write(self, work: Callable[[Connection], Counts]) -> Counts:
        """One transaction and the pause after it; how long it took sets the size of the next."""
        began = 0.0

        def timed(connection: Connection) -> Counts:
            nonlocal began
            began = time.monotonic()  # waiting for the others' transactions does not count
            return work(connection)

        counts: Counts = await self._database.write(timed)
        took = time.monotonic() - began
        fitting = int(self._size * min(AIM[self._database.dialect] / took, 2.0))
        self._size = min(max(fitting, FEWEST), MOST)
        await self._sleep(max(PAUSE[0], PAUSE[1] * took))
        return counts

    async def _count(self, stage: "_Stage", keys: Sequence[Any]) -> Counts:
        async with self._database.read() as connection:
            return await connection.run_sync(partial(stage.count, keys=keys))


class _Find(Protocol):
    async def __call__(self, *, after: Key | None, limit: int) -> Page:
        """The next stretch."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """One kind of rows: how they are found, removed, or only counted."""

    find: _Find
    remove: Callable[..., Counts]
    count: Callable[..., Counts]
