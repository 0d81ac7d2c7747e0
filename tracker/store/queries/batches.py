"""Batches: the rows of a sheet, and the idempotency key of each.

The outcome of a row is not stored here: its key leads to its start, and that to its run.

A worker launches a batch from `launch_at` on, which is null otherwise. Whoever holds the lease
launches it, and ends that with `end_launch` if the batch was not ordered anew, stopped or finished
by a command meanwhile: each changes `launch_at`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    Update,
    and_,
    bindparam,
    case,
    false,
    func,
    literal_column,
    or_,
    select,
    update,
)

from tracker.core.run import RunStatus, Tracking
from tracker.core.starts import Input, RunNumber, Tags, row_key
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries.paging import newest_first
from tracker.store.queries.sheet_rows import (
    OUTCOME,
    RowOutcome,
    of_outcome,
    of_several_runs,
    with_outcomes,
)
from tracker.store.queries.starts import HAS_SEVERAL, StartState, gets_callbacks
from tracker.store.schema import LONGEST_LEASE, batch_rows, batches, is_free, runs, starts, word

LEASE: Final = timedelta(seconds=30)
"""How long the lease of a process that died lasts; a living one renews it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """A batch.

    `finished_at` is when it was followed to its end, `None` until then. `mapping` is the column of
    each input: `[input id, column, type]`; `columns` are the others, whose cells are carried.
    `source` is `cli`, `api`, `page` or `python`. `launch` are the options of a batch that a worker
    launches, which is due at `launch_at`; `stopped` is why the last launch ended early.
    """

    batch_id: str
    workspace_id: str
    technique_id: str
    name: str
    created_at: datetime
    finished_at: datetime | None = None
    mapping: list[list[str]] | None = None
    source: str | None = None
    columns: list[str] | None = None
    launch: dict[str, Any] | None = None
    launch_at: datetime | None = None
    stopped: str | None = None


_COLUMN_OF: Final = {"workspace_id": "workspace_slot"}
"""The columns that have another name than the field."""
BATCH_COLUMNS: Final = tuple(
    batches.c[_COLUMN_OF.get(each.name, each.name)].label(each.name) for each in fields(BatchRow)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEntry:
    """One row of a batch: `position` counts from 1, `line` is its first line in the file.

    `inputs` are what is started, `None` for rows that a version before 0015 stored. `carried` are
    the cells of columns that are no input, by column; `error` is why the last launch could not try
    the row.
    """

    position: int
    line: int
    digest: str
    run_number: RunNumber = field(default_factory=RunNumber)
    inputs: list[Input] | None = None
    tags: Tags = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> str:
        return row_key(self.digest, self.run_number)


@dataclass(slots=True, kw_only=True)
class BatchCounts:
    """The progress of a batch, in rows; `cost` is what its runs were charged so far, in USD.

    The bills of `not_final` runs may still change; `quoted` is the sum of their quotes where they
    have no cost. Of rows with several values, `missing` runs are not known yet, nor their cost; for
    `called_back` of them FLORA calls back. `last_end_seen_at` is when the last end became known.
    `several` rows have several known runs. A `started` row is also counted as `completed`,
    `failed`, `active` or `lost`, unless retention removed its runs; the others are `refused`,
    `unresolved`, in `doubt` (sent without an answer), `unsent` (the last launch could not try them)
    or not started.
    """

    rows: int = 0
    started: int = 0
    active: int = 0
    completed: int = 0
    failed: int = 0
    lost: int = 0
    refused: int = 0
    unresolved: int = 0
    doubt: int = 0
    unsent: int = 0
    cost: Decimal = Decimal(0)
    quoted: Decimal = Decimal(0)
    not_final: int = 0
    several: int = 0
    missing: int = 0
    called_back: int = 0
    next_check_at: datetime | None = None
    last_end_at: datetime | None = None
    last_end_seen_at: datetime | None = None

    def add(self, more: "BatchCounts") -> None:
        """Add what is summed up over further runs."""
        self.cost += more.cost
        self.quoted += more.quoted
        self.not_final += more.not_final
        polls = filter(None, (self.next_check_at, more.next_check_at))
        ends = filter(None, (self.last_end_at, more.last_end_at))
        ends_seen = filter(None, (self.last_end_seen_at, more.last_end_seen_at))
        self.next_check_at = min(polls, default=None)
        self.last_end_at = max(ends, default=None)
        self.last_end_seen_at = max(ends_seen, default=None)

    def awaits_runs(self, now: datetime) -> bool:
        """Whether a row is in progress, or gets further runs."""
        return self.active > 0 or self.gets_runs(now)

    def gets_runs(self, now: datetime) -> bool:
        """Whether callbacks may still name further runs of rows."""
        return self.called_back > 0 and gets_callbacks(self.active > 0, self.last_end_seen_at, now)

    def finished_at(self, batch: BatchRow) -> datetime | None:
        """When the last of its runs ended, which can be after its command; `None` until then."""
        if batch.finished_at is None or self.active:
            return None
        return self.last_end_at or batch.finished_at

    @property
    def cost_final(self) -> bool:
        return self.not_final == self.missing == 0

    @property
    def ended(self) -> int:
        """Rows whose run has ended or is lost."""
        return self.started - self.active

    @property
    def unstarted(self) -> int:
        return self.rows - self.started

    @property
    def removed(self) -> int:
        """Rows whose run retention removed."""
        return self.ended - self.completed - self.failed - self.lost


async def keep(
    db: Database,
    batch: BatchRow,
    entries: Sequence[BatchEntry],
    *,
    only_new: bool = False,
    noted: Mapping[str, Any] | None = None,
) -> bool:
    """Insert or update a batch with its rows, and open it again. An older run of a row never
    replaces a newer one.

    Without `launch` a worker still launches what it has not launched yet, and no more. `noted` is
    an entry of the audit log. If it is to be `only_new` and is not, nothing is stored; returns
    whether it was.
    """
    new = db.insert(batches)
    if batch.launch is not None:
        launch = {name: new.excluded[name] for name in ("launch", "launch_at")}
    else:
        launch = {"launch": case((batches.c.launch_at.is_not(None), batches.c.launch))}
    first = {
        name: func.coalesce(batches.c[name], new.excluded[name]) for name in ("mapping", "source")
    }
    last = {name: new.excluded[name] for name in ("name", "columns", "finished_at", "stopped")}
    updated = new.on_conflict_do_update(
        index_elements=[batches.c.batch_id], set_=first | last | launch
    )
    rows = db.insert(batch_rows)
    rows = rows.on_conflict_do_update(
        index_elements=[batch_rows.c.batch_id, batch_rows.c.position],
        set_={
            name: rows.excluded[name]
            for name in ("line", "attempt", "idempotency_key", "inputs", "tags", "carried", "error")
        },
        where=rows.excluded.attempt >= batch_rows.c.attempt,
    )
    values = [_values(batch.batch_id, entry) for entry in entries]
    header = {_COLUMN_OF.get(name, name): value for name, value in asdict(batch).items()}
    header |= {"finished_at": None, "stopped": None}
    header_statement = new.on_conflict_do_nothing() if only_new else updated

    def work(connection: Connection) -> bool:
        if connection.execute(header_statement, header).rowcount == 0:
            return False
        if values:
            connection.execute(rows, values)
        if noted is not None:
            audit.note(connection, noted)
        return True

    return await db.write(work)


async def finish(
    db: Database,
    batch: BatchRow,
    at: datetime | None,
    *,
    stopped: str | None = None,
    errors: Mapping[int, str] | None = None,
    in_doubt: bool = False,
) -> None:
    """Store how a command ended: when the batch was followed to its end, or why that is not so, and
    why rows could not be tried, by position.

    `batch` is as it was planned. What was ordered before ends with the command if that tried every
    row and left none `in_doubt`. Nothing is stored if a worker has still to launch what was ordered
    since, or rows in doubt.
    """
    of = batches.c
    ordered_at = func.coalesce(of.launch["ordered_at"].as_string(), "")
    is_planned = ordered_at <= batch.created_at.isoformat()
    if at is not None and in_doubt:
        is_planned = false()
    header = update(batches)
    header = header.where(of.batch_id == batch.batch_id, or_(of.launch_at.is_(None), is_planned))
    header = header.values(finished_at=at, stopped=stopped)
    if at is not None:
        header = header.values(launch_at=None)
    await db.write(lambda connection: _end(connection, header, batch.batch_id, errors or {}))


def _end(connection: Connection, header: Update, batch_id: str, errors: Mapping[int, str]) -> bool:
    """Store how a launch ended, within a transaction; false, and nothing is stored, if the update
    of the batch changes nothing."""
    if connection.execute(header).rowcount == 0:
        return False
    statement = (
        update(batch_rows)
        .where(batch_rows.c.batch_id == batch_id, batch_rows.c.position == bindparam("row"))
        .values(error=bindparam("why"))
    )
    if errors:
        values = [{"row": position, "why": why} for position, why in errors.items()]
        connection.execute(statement, values)
    return True


async def get(db: Database, batch_id: str) -> BatchRow | None:
    """The batch with this id, if any."""
    found = await db.fetchrow(select(*BATCH_COLUMNS).where(batches.c.batch_id == batch_id))
    return None if found is None else BatchRow(**found._asdict())


async def list_batches(
    db: Database, *, cursor: str | None = None, limit: int
) -> tuple[list[BatchRow], str | None]:
    """A page of batches, newest first, and the cursor of the next page.

    Raises `InvalidRequest` for an invalid cursor.
    """
    key = (batches.c.created_at, batches.c.batch_id)
    async with db.read() as connection:
        rows, following = await newest_first(
            connection, select(*BATCH_COLUMNS), key, cursor=cursor, limit=limit
        )
    return [BatchRow(**row._asdict()) for row in rows], following


async def unfinished(db: Database, *, since: datetime, limit: int) -> list[BatchRow]:
    """The newest batches that were made after `since` and are not finished."""
    statement = (
        select(*BATCH_COLUMNS)
        .where(batches.c.created_at > since, batches.c.finished_at.is_(None))
        .order_by(batches.c.created_at.desc(), batches.c.batch_id.desc())
        .limit(limit)
    )
    return [BatchRow(**row._asdict()) for row in await db.fetch(statement)]


async def entries(
    db: Database,
    batch_id: str,
    *,
    after: int = 0,
    limit: int | None = None,
    outcome: RowOutcome | None = None,
    code: str | None = None,
) -> list[BatchEntry]:
    """The rows of a batch in order: those after a position, at most `limit`; those with an
    `outcome`, those of an error group by its `code`."""
    statement = (
        select(batch_rows)
        .where(batch_rows.c.batch_id == batch_id, batch_rows.c.position > after)
        .order_by(batch_rows.c.position)
        .limit(limit)
    )
    statement = of_outcome(statement, outcome, code)
    return [
        BatchEntry(
            position=row.position,
            line=row.line,
            digest=row.row_digest,
            run_number=RunNumber(row.generation, row.attempt),
            inputs=row.inputs,
            tags=row.tags or {},
            carried=row.carried or {},
            error=row.error,
        )
        for row in await db.fetch(statement)
    ]


_IS_SETTLED: Final = runs.c.tracking == word(Tracking.SETTLED)
_IS_COMPLETED: Final = runs.c.status == word(RunStatus.COMPLETED)
_COUNTED: Final[Mapping[str, ColumnElement[bool]]] = {
    "started": starts.c.state == word(StartState.STARTED),
    "refused": starts.c.state == word(StartState.REFUSED),
    "unresolved": starts.c.state == word(StartState.UNRESOLVED),
    "doubt": starts.c.state.in_([word(StartState.SENT), word(StartState.IN_DOUBT)]),
    "unsent": and_(
        func.coalesce(starts.c.state, StartState.STORED) == word(StartState.STORED),
        OUTCOME == RowOutcome.FAILED,
    ),
    "active": runs.c.tracking == word(Tracking.ACTIVE),
    "lost": runs.c.tracking == word(Tracking.LOST),
    "completed": and_(_IS_SETTLED, _IS_COMPLETED),
    "failed": and_(_IS_SETTLED, ~_IS_COMPLETED),
}
"""Which rows each number of `BatchCounts` counts."""


_IS_QUOTED: Final = and_(~runs.c.cost_final, runs.c.charged_cost.is_(None))
_AMOUNTS: Final[Mapping[str, Any]] = {
    "cost": func.sum(runs.c.charged_cost),
    "quoted": func.sum(case((_IS_QUOTED, runs.c.quoted_cost))),
    "not_final": func.count(case((~runs.c.cost_final, runs.c.run_id))),
    "next_check_at": func.min(case((_COUNTED["active"], runs.c.next_check_at))),
    "last_end_at": func.max(runs.c.completed_at),
    "last_end_seen_at": func.max(runs.c.end_seen_at),
}
"""What is summed up over all runs of the rows; everything else is about rows."""
_LACKS_RUNS: Final = and_(_COUNTED["started"], starts.c.reserved_runs > literal_column("1"))
_IS_CALLED_BACK: Final = starts.c.callback_url.like("%/" + starts.c.callback_token)


async def batch_counts(db: Database, batch_ids: Sequence[str]) -> dict[str, BatchCounts]:
    """The progress of each batch."""
    found = {batch_id: BatchCounts() for batch_id in batch_ids}
    async with db.read() as connection:
        for row in await connection.execute(_counts(), {"ids": batch_ids}):
            found[row.batch_id] = BatchCounts(**_numbers(row))
        if having := [batch_id for batch_id, counts in found.items() if counts.several]:
            for of_runs in of_several_runs(having):
                amounts = (amount.label(name) for name, amount in _AMOUNTS.items())
                summed = of_runs.add_columns(*amounts).group_by(of_runs.selected_columns.batch_id)
                for row in await connection.execute(summed):
                    found[row.batch_id].add(BatchCounts(**_numbers(row)))
    return found


@cache
def _counts() -> Select[Any]:
    """The query of `batch_counts`, with the ids as a parameter."""
    has_one = func.coalesce(starts.c.run_count, 1) <= literal_column("1")
    of, missing = batch_rows.c, func.sum(starts.c.reserved_runs - 1)
    called_back = missing.filter(_LACKS_RUNS, _IS_CALLED_BACK)
    counted = select(
        of.batch_id,
        func.count().label("rows"),
        *(func.count().filter(which).label(name) for name, which in _COUNTED.items()),
        func.count().filter(HAS_SEVERAL).label("several"),
        func.coalesce(missing.filter(_LACKS_RUNS), 0).label("missing"),
        func.coalesce(called_back, 0).label("called_back"),
        *(amount.filter(has_one).label(name) for name, amount in _AMOUNTS.items()),
    )
    of_these = of.batch_id.in_(bindparam("ids", expanding=True))
    return with_outcomes(counted).where(of_these).group_by(of.batch_id)


def _numbers(row: Row[Any]) -> dict[str, Any]:
    values = row._asdict()
    del values["batch_id"]
    for name in ("cost", "quoted"):  # sums of doubles have spurious digits
        values[name] = round(values[name] or Decimal(0), 6)
    return values


def _values(batch_id: str, entry: BatchEntry) -> dict[str, Any]:
    return {
        "batch_id": batch_id,
        "position": entry.position,
        "line": entry.line,
        "row_digest": entry.digest,
        "generation": entry.run_number.generation,
        "attempt": entry.run_number.attempt,
        "idempotency_key": entry.key,
        "inputs": entry.inputs,
        "tags": entry.tags or None,
        "carried": entry.carried or None,
        "error": None,
    }


# Batches that a worker launches.

_OPEN: Final = and_(batches.c.launch.is_not(None), batches.c.finished_at.is_(None))


async def claim_due(
    db: Database, workspaces: Collection[str], *, holder: str, now: datetime, limit: int
) -> list[BatchRow]:
    """Lease at most `limit` due batches of these workspaces, those that wait longest first."""
    due = (
        select(batches.c.batch_id)
        .where(
            _OPEN,
            or_(batches.c.launch_at <= now, batches.c.launch_at > now + LONGEST_LEASE),
            batches.c.workspace_slot.in_(workspaces),
            is_free(batches, now),
        )
        .order_by(batches.c.launch_at)
        .limit(limit)
    )
    if not workspaces or await db.fetchrow(due.limit(1)) is None:  # which takes no lock
        return []
    statement = (
        update(batches)
        .where(batches.c.batch_id.in_(due.with_for_update(skip_locked=True)))
        .values(lease_until=now + LEASE, lease_holder=holder, stopped=None)
        .returning(*BATCH_COLUMNS)
    )

    claimed = await db.write(lambda connection: connection.execute(statement).all())
    return [BatchRow(**row._asdict()) for row in claimed]


async def renew_launch(
    db: Database, batch: BatchRow, *, holder: str, now: datetime, waits: str | None = None
) -> bool:
    """Renew the lease; false if it is lost, or the batch was ordered anew or stopped.

    `waits` is what the launch waits for.
    """
    renewed = update(batches).where(_held(batch, holder))
    statement = renewed.values(lease_until=now + LEASE, stopped=waits)
    return await db.execute(statement) == 1


async def release_launch(db: Database, batch: BatchRow, *, holder: str) -> None:
    """Release the lease; the batch stays due."""
    statement = (
        update(batches)
        .where(batches.c.batch_id == batch.batch_id, batches.c.lease_holder == holder)
        .values(lease_until=None, lease_holder=None)
    )
    await db.execute(statement)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnd:
    """How a launch ended: `launch_at` is when to go on, `stopped` why it ended early; `errors` are
    why rows could not be tried, by position."""

    launch_at: datetime | None
    stopped: str | None
    errors: Mapping[int, str]


async def end_launch(db: Database, batch: BatchRow, ended: LaunchEnd, *, holder: str) -> bool:
    """Store how a launch ended and release the lease; false, and nothing is stored, if the lease is
    lost or the batch was ordered anew or stopped."""
    header = (
        update(batches)
        .where(_held(batch, holder))
        .values(
            launch_at=ended.launch_at, stopped=ended.stopped, lease_until=None, lease_holder=None
        )
    )
    return await db.write(lambda connection: _end(connection, header, batch.batch_id, ended.errors))


async def stop(db: Database, batch_id: str, why: str, *, noted: Mapping[str, Any]) -> bool:
    """Start no further row of a batch that a worker launches; false if there is none to start.

    `noted` is an entry of the audit log.
    """
    statement = (
        update(batches)
        .where(batches.c.batch_id == batch_id, _OPEN, batches.c.launch_at.is_not(None))
        .values(launch_at=None, stopped=why)
    )
    return await db.write(lambda connection: audit.execute_noted(connection, statement, noted))


async def finish_ended(db: Database, now: datetime) -> int:
    """Close launched batches whose runs have all ended; returns how many."""
    launched = (_OPEN, batches.c.launch_at.is_(None), batches.c.stopped.is_(None))
    ids = await db.fetchcol(select(batches.c.batch_id).where(*launched))
    if not ids:
        return 0
    counts = await batch_counts(db, ids)
    ended = [one for one, count in counts.items() if not (count.doubt or count.awaits_runs(now))]
    if not ended:
        return 0
    statement = (
        update(batches).where(batches.c.batch_id.in_(ended), *launched).values(finished_at=now)
    )
    return await db.execute(statement)


def _held(batch: BatchRow, holder: str) -> ColumnElement[bool]:
    return and_(
        batches.c.batch_id == batch.batch_id,
        batches.c.lease_holder == holder,
        batches.c.launch_at == batch.launch_at,
    )
