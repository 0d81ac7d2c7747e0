"""Batches: the rows of a sheet, and the idempotency key of each.

The outcome of a row is not stored here: its key leads to its start, and that to its run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    and_,
    bindparam,
    case,
    func,
    or_,
    select,
    update,
)

from tracker.core.inputs import Input, Tags, Turn, row_key
from tracker.core.run import RetryAdvice, RunStatus, Tracking
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries.paging import newest_first
from tracker.store.queries.starts import StartState
from tracker.store.schema import batch_rows, batches, runs, starts, word


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """A batch.

    `finished_at` is when it was followed to its end, `None` until then. `mapping` is the column of
    each input: `[input id, column, type]`; `columns` are the others, whose cells are carried.
    `source` is `cli`, `api`, `page` or `python`. `launch` are the options of a batch that a worker
    launches, which is due at `launch_at`; `stopped` is why the last launch ended early.
    """

    batch_id: str
    workspace_slot: str
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


BATCH_COLUMNS: Final = tuple(batches.c[each.name] for each in fields(BatchRow))


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
    turn: Turn = field(default_factory=Turn)
    inputs: list[Input] | None = None
    tags: Tags = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> str:
        return row_key(self.digest, self.turn)


@dataclass(slots=True, kw_only=True)
class BatchCounts:
    """The progress of a batch, in rows; `cost` is what its runs were charged so far, in USD.

    The bills of `not_final` runs may still change; `quoted` is the sum of their quotes where they
    have no cost. A `started` row is also counted as `completed`, `failed`, `active` or `lost`; the
    others are `refused`, `unresolved`, in `doubt` (sent without an answer) or not started.
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
    cost: Decimal = Decimal(0)
    quoted: Decimal = Decimal(0)
    not_final: int = 0
    next_check_at: datetime | None = None
    last_end_at: datetime | None = None

    def finished_at(self, batch: BatchRow) -> datetime | None:
        """When the last of its runs ended, which can be after its command; `None` until then."""
        if batch.finished_at is None or self.active:
            return None
        return self.last_end_at or batch.finished_at

    @property
    def cost_final(self) -> bool:
        return self.not_final == 0

    @property
    def ended(self) -> int:
        """Rows whose run has ended or is lost."""
        return self.started - self.active

    @property
    def unstarted(self) -> int:
        return self.rows - self.started


class RowOutcome(StrEnum):
    """What rows of a batch are filtered by."""

    COMPLETED = "completed"
    FAILED = "failed"
    """The run failed or is lost, or the row could not be started."""
    RUNNING = "running"
    """Including starts that were sent and not answered yet."""
    NOT_STARTED = "not_started"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Rows of a batch that failed for the same reason.

    `code` is FLORA's, or else `lost`, `unresolved` or `not_started`; `message` is an example.
    `retryable` of the `count` rows are started again by `Retry.FAILED`.
    """

    code: str
    message: str | None
    advice: RetryAdvice | None
    count: int
    retryable: int


async def keep(
    db: Database,
    batch: BatchRow,
    entries: Sequence[BatchEntry],
    *,
    only_new: bool = False,
    noted: Mapping[str, Any] | None = None,
) -> bool:
    """Insert or update a batch with its rows, and open it again. Turns never go back.

    Without `launch` a worker still launches what it has not launched yet, and no more. `noted` is
    an entry of the audit log. If it is to be `only_new` and is not, nothing is stored; returns
    whether it was.
    """
    new = db.insert(batches)
    if batch.launch is not None:
        launch = {name: new.excluded[name] for name in ("launch", "launch_at")}
    else:
        launch = {"launch": case((batches.c.launch_at.is_not(None), batches.c.launch))}
    updated = new.on_conflict_do_update(
        index_elements=[batches.c.batch_id],
        set_={
            **{name: new.excluded[name] for name in ("name", "columns")},
            **launch,
            **{
                name: func.coalesce(batches.c[name], new.excluded[name])
                for name in ("mapping", "source")
            },
            "finished_at": None,
            "stopped": None,
        },
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
    header = asdict(batch) | {"finished_at": None, "stopped": None}

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
    batch_id: str,
    at: datetime | None,
    *,
    stopped: str | None = None,
    errors: Mapping[int, str] | None = None,
) -> None:
    """Store how a launch ended: when the batch was followed to its end, or why that is not so, and
    why rows could not be tried, by position."""
    header = (
        update(batches)
        .where(batches.c.batch_id == batch_id)
        .values(finished_at=at, stopped=stopped)
    )

    def work(connection: Connection) -> None:
        connection.execute(header)
        keep_errors(connection, batch_id, errors or {})

    await db.write(work)


def keep_errors(connection: Connection, batch_id: str, errors: Mapping[int, str]) -> None:
    """Store why rows could not be tried, by position, within a transaction."""
    statement = (
        update(batch_rows)
        .where(batch_rows.c.batch_id == batch_id, batch_rows.c.position == bindparam("row"))
        .values(error=bindparam("why"))
    )
    if errors:
        values = [{"row": position, "why": why} for position, why in errors.items()]
        connection.execute(statement, values)


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
            turn=Turn(row.generation, row.attempt),
            inputs=row.inputs,
            tags=row.tags or {},
            carried=row.carried or {},
            error=row.error,
        )
        for row in await db.fetch(statement)
    ]


async def batch_counts(db: Database, batch_ids: Sequence[str]) -> dict[str, BatchCounts]:
    """The progress of each batch."""
    found = {batch_id: BatchCounts() for batch_id in batch_ids}
    by = (batch_rows.c.batch_id, starts.c.state, runs.c.status, runs.c.tracking)
    counted = select(
        *by,
        func.count().label("count"),
        func.sum(runs.c.charged_cost).label("cost"),
        func.count(runs.c.run_id).filter(~runs.c.cost_final).label("not_final"),
        func.sum(runs.c.quoted_cost)
        .filter(~runs.c.cost_final, runs.c.charged_cost.is_(None))
        .label("quoted"),
        func.min(runs.c.next_check_at).label("next_check_at"),
        func.max(runs.c.completed_at).label("last_end_at"),
    )
    of_batches = with_outcomes(counted).where(batch_rows.c.batch_id.in_(batch_ids))
    for row in await db.fetch(of_batches.group_by(*by)):
        _count(found[row.batch_id], row)
    return found


async def error_groups(db: Database, batch_id: str) -> list[ErrorGroup]:
    """The failed rows of a batch by reason, the most frequent first."""
    by = (_CODE.label("code"), runs.c.retry_advice.label("advice"))
    once = and_(runs.c.retry_advice == RetryAdvice.RETRY_NOW.value, batch_rows.c.attempt == 0)
    retryable = or_(once, runs.c.retry_advice == RetryAdvice.RETRY_LATER.value)
    statement = (
        with_outcomes(select(*by, func.min(_MESSAGE).label("message"), func.count().label("rows")))
        .add_columns(func.count().filter(retryable).label("retryable"))
        .where(batch_rows.c.batch_id == batch_id, _OUTCOME == RowOutcome.FAILED)
        .group_by(*by)
        .order_by(func.count().desc(), by[0])
    )
    return [
        ErrorGroup(
            code=row.code,
            message=row.message,
            advice=None if row.advice is None else RetryAdvice(row.advice),
            count=row.rows,
            retryable=row.retryable,
        )
        for row in await db.fetch(statement)
    ]


_OUTCOME: Final = case(
    (runs.c.tracking == word(Tracking.LOST), RowOutcome.FAILED.value),
    (runs.c.tracking == word(Tracking.ACTIVE), RowOutcome.RUNNING.value),
    (runs.c.status == word(RunStatus.COMPLETED), RowOutcome.COMPLETED.value),
    (runs.c.run_id.is_not(None), RowOutcome.FAILED.value),
    (starts.c.state.in_([StartState.REFUSED, StartState.UNRESOLVED]), RowOutcome.FAILED.value),
    (starts.c.state.in_([StartState.SENT, StartState.IN_DOUBT]), RowOutcome.RUNNING.value),
    (starts.c.state == word(StartState.STARTED), "forgotten"),
    (batch_rows.c.error.is_not(None), RowOutcome.FAILED.value),
    else_=RowOutcome.NOT_STARTED.value,
)
_CODE: Final = case(
    (runs.c.tracking == word(Tracking.LOST), "lost"),
    (runs.c.run_id.is_not(None), func.coalesce(runs.c.error_code, runs.c.status)),
    (starts.c.state == word(StartState.UNRESOLVED), "unresolved"),
    else_=func.coalesce(starts.c.error["code"].as_string(), "not_started"),
)
_MESSAGE: Final = case(
    (runs.c.run_id.is_not(None), func.coalesce(runs.c.error_message, runs.c.last_error)),
    else_=func.coalesce(starts.c.error["message"].as_string(), batch_rows.c.error),
)


def of_outcome(statement: Select[Any], outcome: RowOutcome | None, code: str | None) -> Select[Any]:
    """A statement about `batch_rows`, limited to an outcome, and to an error group by its code."""
    if outcome is not None or code is not None:
        statement = with_outcomes(statement)
    if outcome is not None:
        statement = statement.where(_OUTCOME.in_([outcome]))
    if code is not None:
        statement = statement.where(_OUTCOME == RowOutcome.FAILED, _CODE.in_([code]))
    return statement


def with_outcomes(statement: Select[Any]) -> Select[Any]:
    """A statement about rows of batches, joined with their starts and runs."""
    return (
        statement.select_from(batch_rows)
        .join(batches)
        .outerjoin(starts, is_start_of(batch_rows))
        .outerjoin(runs, runs.c.run_id == starts.c.run_id)
    )


def is_start_of(rows: FromClause) -> ColumnElement[bool]:
    """The start has the key of the row of the batch."""
    is_of_workspace = starts.c.workspace_slot == batches.c.workspace_slot
    return and_(is_of_workspace, starts.c.idempotency_key == rows.c.idempotency_key)


def _values(batch_id: str, entry: BatchEntry) -> dict[str, Any]:
    return {
        "batch_id": batch_id,
        "position": entry.position,
        "line": entry.line,
        "row_digest": entry.digest,
        "generation": entry.turn.generation,
        "attempt": entry.turn.attempt,
        "idempotency_key": entry.key,
        "inputs": entry.inputs,
        "tags": entry.tags or None,
        "carried": entry.carried or None,
        "error": None,
    }


def _count(progress: BatchCounts, row: Any) -> None:
    progress.rows += row.count
    match row.state:
        case StartState.STARTED:
            progress.started += row.count
        case StartState.REFUSED:
            progress.refused += row.count
        case StartState.UNRESOLVED:
            progress.unresolved += row.count
        case StartState.SENT | StartState.IN_DOUBT:
            progress.doubt += row.count
    ends = (progress.last_end_at, row.last_end_at)
    progress.last_end_at = max((one for one in ends if one is not None), default=None)
    if row.tracking == Tracking.ACTIVE:
        progress.active += row.count
        moments = (progress.next_check_at, row.next_check_at)
        progress.next_check_at = min((one for one in moments if one is not None), default=None)
    elif row.tracking == Tracking.LOST:
        progress.lost += row.count
    elif row.status == RunStatus.COMPLETED:
        progress.completed += row.count
    elif row.tracking == Tracking.SETTLED:
        progress.failed += row.count
    # Sums of doubles have spurious digits.
    progress.cost += round(row.cost or Decimal(0), 6)
    progress.quoted += round(row.quoted or Decimal(0), 6)
    progress.not_final += row.not_final
