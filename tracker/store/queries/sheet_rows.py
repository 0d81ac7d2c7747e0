"""The rows of batches: their outcomes and errors, what people search in them, and what earlier
batches did with the same rows and columns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    FromClause,
    Select,
    Text,
    and_,
    case,
    cast,
    func,
    literal,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import JSONPATH

from tracker.core.record import Record
from tracker.core.run import Output, RetryAdvice, RunStatus, Tracking, known
from tracker.core.starts import Input, RunNumber, key_parts
from tracker.store.engine import Database, dump_json
from tracker.store.queries.starts import HAS_SEVERAL, StartRow, StartState, is_further_run
from tracker.store.schema import batch_rows, batches, is_any_of, run_outputs, runs, starts, word

RECENT_BATCHES: Final = 300
RECENT_ROWS: Final = 50_000
"""The newest batches, and rows of them, that a text is searched in."""
MATCHES: Final = 1_000
"""Runs that a search by text finds through their rows."""
_ALL: Final = 10**9


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
    advice: RetryAdvice | str | None
    count: int
    retryable: int


class RowOfBatch(NamedTuple):
    """A row, by its batch and position. `run_id` is its present run, `attempts` how many there were
    before that one."""

    batch_id: str
    name: str
    position: int
    run_id: str | None
    attempts: int
    carried: dict[str, str]


class SheetMatches(NamedTuple):
    """What a text finds in batches: their ids and names, rows by their carried cells, and the runs
    of both."""

    batches: list[tuple[str, str]]
    rows: list[RowOfBatch]
    run_ids: tuple[str, ...]


async def error_groups(db: Database, batch_id: str) -> list[ErrorGroup]:
    """The failed rows of a batch by reason, the most frequent first."""
    by = (_CODE.label("code"), runs.c.retry_advice.label("advice"))
    once = and_(runs.c.retry_advice == RetryAdvice.RETRY_NOW.value, batch_rows.c.attempt == 0)
    retryable = or_(once, runs.c.retry_advice == RetryAdvice.RETRY_LATER.value)
    statement = (
        with_outcomes(select(*by, func.min(_MESSAGE).label("message"), func.count().label("count")))
        .add_columns(func.count().filter(retryable).label("retryable"))
        .where(batch_rows.c.batch_id == batch_id, OUTCOME == RowOutcome.FAILED)
        .group_by(*by)
        .order_by(func.count().desc(), by[0])
    )
    groups = [ErrorGroup(**row._asdict()) for row in await db.fetch(statement)]
    return [replace(one, advice=one.advice and known(RetryAdvice, one.advice)) for one in groups]


OUTCOME: Final = case(
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
"""A `RowOutcome`, or "forgotten" where retention removed the run."""
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
        statement = statement.where(OUTCOME.in_([outcome]))
    if code is not None:
        statement = statement.where(OUTCOME == RowOutcome.FAILED, _CODE.in_([code]))
    return statement


# A row may have several runs: one for each value of an input. It is running while one of them is,
# has completed once all have, and else has failed, for the reason of the first that did. So one of
# its runs decides its outcome: the first in progress, else the first that failed, else the first.


def deciding(of_row: Sequence[Record]) -> Record | None:
    """The run that decides the outcome of a row; `None` if it has none."""
    return min(of_row, key=_rank, default=None)


def _rank(record: Record) -> int:
    if record.tracking is Tracking.SETTLED:
        return 2 if record.run.status is RunStatus.COMPLETED else 1
    return 0 if record.tracking is Tracking.ACTIVE else 1


def _deciding() -> ColumnElement[str]:
    run = runs.alias("of_row")
    is_completed = and_(run.c.tracking == "settled", run.c.status == word(RunStatus.COMPLETED))
    rank = case((run.c.tracking == word(Tracking.ACTIVE), 0), (is_completed, 2), else_=1)
    # SQLite lets no ORDER BY name a table outside.
    keys = (rank, run.c.run_id != starts.c.run_id, run.c.created_at)
    of_start = select(run.c.run_id, *(key.label(f"key_{n}") for n, key in enumerate(keys)))
    is_of_row = or_(run.c.run_id == starts.c.run_id, is_further_run(run))
    of_row = of_start.where(is_of_row).correlate(starts).subquery()
    first = select(of_row.c.run_id).order_by(*list(of_row.c)[1:], of_row.c.run_id).limit(1)
    several = first.correlate(starts).scalar_subquery()
    return case((HAS_SEVERAL, several), else_=starts.c.run_id)


DECIDING: Final = _deciding()
"""As `deciding`, in SQL."""


def with_outcomes(statement: Select[Any]) -> Select[Any]:
    """A statement about rows of batches, joined with their starts, and the runs that decide their
    outcomes."""
    return with_starts(statement).outerjoin(runs, runs.c.run_id == DECIDING)


def with_starts(statement: Select[Any]) -> Select[Any]:
    """A statement about rows of batches, joined with their starts."""
    return (
        statement.select_from(batch_rows).join(batches).outerjoin(starts, is_start_of(batch_rows))
    )


def is_start_of(rows: FromClause) -> ColumnElement[bool]:
    """The start has the key of the row of the batch."""
    is_of_workspace = starts.c.workspace_slot == batches.c.workspace_slot
    return and_(is_of_workspace, starts.c.idempotency_key == rows.c.idempotency_key)


async def page_starts(
    db: Database,
    batch_id: str,
    *,
    outcome: RowOutcome | None = None,
    code: str | None = None,
    limit: int,
) -> list[int]:
    """Where each page of `limit` rows begins (see `batches.entries`): after which position."""
    number = func.row_number().over(order_by=batch_rows.c.position).label("number")
    rows = select(batch_rows.c.position, number).where(batch_rows.c.batch_id == batch_id)
    numbered = of_outcome(rows, outcome, code).subquery()
    first = numbered.c.number % limit == 1 % limit
    statement = select(numbered.c.position - 1).where(first).order_by(numbered.c.position)
    return await db.fetchcol(statement)


async def first_outputs(
    db: Database, batch_ids: Sequence[str], *, most: int, rows: int = 12
) -> dict[str, list[Output]]:
    """Of each of these batches at most `most` outputs, the first of each of its first `rows`."""
    of_runs = select(batch_rows.c.batch_id, batch_rows.c.position, starts.c.run_id)
    of_runs = of_runs.where(batch_rows.c.batch_id.in_(batch_ids), batch_rows.c.position <= rows)
    some = with_starts(of_runs).subquery()
    statement = (
        select(some.c.batch_id, run_outputs.c.output_id, run_outputs.c.type, run_outputs.c.url)
        .join(run_outputs, run_outputs.c.run_id == some.c.run_id)
        .where(run_outputs.c.position == 0)
        .order_by(some.c.batch_id, some.c.position)
    )
    found: dict[str, list[Output]] = {batch_id: [] for batch_id in batch_ids}
    for batch_id, *output in await db.fetch(statement):
        if len(found[batch_id]) < most:
            found[batch_id].append(Output(*output))
    return found


def run_ids_of(batch_ids: Sequence[str]) -> CompoundSelect[Any]:
    """The ids of the runs of batches."""
    # PostgreSQL reads the rows once for both halves. SQLite would read all of them before the
    # first result, also where few are wanted.
    of_row = _starts_of(batch_ids).cte("of_row").prefix_with("NOT MATERIALIZED", dialect="sqlite")
    first = select(of_row.c.run_id).where(of_row.c.run_id.is_not(None))
    several = select(of_row).where(of_row.c.run_count > literal_column("1"))
    # The limit keeps SQLite from reading the further runs of all batches first.
    start = several.limit(_ALL).subquery("of_several")
    further = select(runs.c.run_id).join_from(start, runs, is_further_run(runs, start))
    return first.union_all(further)


def of_several_runs(batch_ids: Sequence[str]) -> tuple[Select[Any], Select[Any]]:
    """Two statements about the `runs` of rows that have several: the first ones, and the others.
    Their column is the batch."""
    rows = _starts_of(batch_ids).add_columns(batch_rows.c.batch_id)
    # The limit keeps PostgreSQL from reading the starts of all batches first. Both conditions in
    # one statement would use no index.
    start = rows.limit(_ALL).subquery("of_row")
    # Of the column alone PostgreSQL knows that nearly none has several: it would expect no row,
    # and might read all runs for each one that it finds.
    count = func.coalesce(start.c.run_count, literal_column("1"))
    several = select(start.c.batch_id).where(count > literal_column("1"))
    return (
        several.join(runs, runs.c.run_id == start.c.run_id),
        several.join(runs, is_further_run(runs, start)),
    )


def _starts_of(batch_ids: Sequence[str]) -> Select[Any]:
    names = ("workspace_slot", "idempotency_key", "run_id", "run_count")
    columns = (starts.c[name] for name in names)
    return with_starts(select(*columns)).where(batch_rows.c.batch_id.in_(batch_ids))


async def rows_of_start(db: Database, start: StartRow, *, limit: int = 3) -> list[RowOfBatch]:
    """The rows that a start was made for, those of the newest batches first. A row keeps the starts
    of its earlier attempts."""
    parts = key_parts(start.idempotency_key)
    if parts is None:
        return []
    digest, run_number = parts
    columns = (batch_rows.c.batch_id, batches.c.name, batch_rows.c.position, starts.c.run_id)
    rows = with_starts(select(*columns, batch_rows.c.attempt, batch_rows.c.carried))
    statement = rows.where(
        batch_rows.c.row_digest == digest,
        batch_rows.c.generation == run_number.generation,
        batch_rows.c.attempt >= run_number.attempt,
        batches.c.workspace_slot == start.workspace_id,
    )
    newest = statement.order_by(batches.c.created_at.desc(), batch_rows.c.position).limit(limit)
    return [RowOfBatch(*row) for row in await db.fetch(newest)]


async def search_sheets(
    db: Database, text: str, *, limit: int = 5, newest: int = RECENT_BATCHES
) -> SheetMatches:
    """Batches whose name or id has this text, and rows with it in a carried cell, ignoring case.

    Searched are the `newest` batches; `limit` is for the batches and for the rows.
    """
    recent = select(batches.c.batch_id, batches.c.name).order_by(
        batches.c.created_at.desc(), batches.c.batch_id.desc()
    )
    async with db.read() as connection:
        searched = (await connection.execute(recent.limit(newest))).all()
        wanted = text.casefold()
        named = [
            (row.batch_id, row.name)
            for row in searched
            if wanted in row.name.casefold() or wanted in row.batch_id.casefold()
        ][:limit]
        cells = _with_cell(db, [row.batch_id for row in searched], text)
        in_rows = [RowOfBatch(*row) for row in await connection.execute(cells)]
        ids = run_ids_of([batch_id for batch_id, _ in named])
        of_batches = (await connection.execute(ids.limit(MATCHES))).scalars() if named else ()
        first = [row.run_id for row in in_rows if row.run_id is not None]
        others = select(runs.c.run_id).join(starts, is_further_run(runs)).limit(MATCHES)
        others = others.where(HAS_SEVERAL, starts.c.run_id.in_(first))
        further = (await connection.execute(others)).scalars() if first else ()
        run_ids = [*first, *further, *of_batches]
    return SheetMatches(named, in_rows[:limit], tuple(dict.fromkeys(run_ids)))


def _with_cell(db: Database, batch_ids: Sequence[str], text: str) -> Select[Any]:
    columns = ("batch_id", "position", "attempt", "carried", "idempotency_key")
    rows = (
        select(*(batch_rows.c[name] for name in columns))
        .where(batch_rows.c.batch_id.in_(batch_ids), batch_rows.c.carried.is_not(None))
        .limit(RECENT_ROWS)
        .subquery("searched")
    )
    return (
        select(rows.c.batch_id, batches.c.name, rows.c.position, starts.c.run_id)
        .add_columns(rows.c.attempt, rows.c.carried)
        .join(batches, batches.c.batch_id == rows.c.batch_id)
        .outerjoin(starts, is_start_of(rows))
        .where(has_value(db, rows.c.carried, "$.*", text))
        .limit(MATCHES)
    )


def has_value(
    db: Database, column: ColumnElement[Any], path: str, text: str
) -> ColumnElement[bool]:
    """A value of a JSON column at `path` (`$.*` or `$[*].value`) has this text, ignoring case."""
    as_json = dump_json(text)[1:-1]
    if db.dialect == "postgresql":
        values = func.jsonb_path_query_array(column, cast(path, JSONPATH))
        return cast(values, Text).icontains(as_json, autoescape=True)
    each = func.json_each(column).table_valued("value")
    value = each.c.value if path == "$.*" else func.json_extract(each.c.value, "$.value")
    found = select(literal(1)).select_from(each)
    found = found.where(cast(value, Text).icontains(text, autoescape=True))
    # Most do not have it at all: only those that do are parsed.
    return and_(cast(column, Text).icontains(as_json, autoescape=True), found.exists())


# What earlier batches did with the same rows and columns, for the plan of the next one.

MAPPINGS: Final = 200
"""Batches of a technique whose column mapping is compared with a new sheet's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatestRunNumber:
    """The number of a row's last run, and whether a batch with it was finished."""

    run_number: RunNumber
    finished: bool


async def latest_run_numbers(
    db: Database, workspace_id: str, digests: Sequence[str]
) -> dict[str, LatestRunNumber]:
    """The number of the last run of each of these rows in any batch of the workspace; its
    generation is finished if any batch with it is."""
    by = (batch_rows.c.row_digest, batch_rows.c.generation)
    numbers = select(*by, func.max(batch_rows.c.attempt), func.count(batches.c.finished_at))
    numbers = numbers.join(batches).where(batches.c.workspace_slot == workspace_id)
    numbers = numbers.where(is_any_of(batch_rows.c.row_digest, digests))
    # A row's last generation comes last.
    rows = await db.fetch(numbers.group_by(*by).order_by(batch_rows.c.generation))
    return {
        digest: LatestRunNumber(run_number=RunNumber(*numbers), finished=finished > 0)
        for digest, *numbers, finished in rows
    }


async def mappings(
    db: Database, workspace_id: str, technique_id: str
) -> list[tuple[tuple[str, str, str], ...]]:
    """The distinct column mappings of a technique's batches, newest first."""
    statement = (
        select(batches.c.mapping)
        .where(
            batches.c.workspace_slot == workspace_id,
            batches.c.technique_id == technique_id,
            batches.c.mapping.is_not(None),
        )
        .order_by(batches.c.created_at.desc(), batches.c.batch_id.desc())
        .limit(MAPPINGS)
    )
    rows = await db.fetchcol(statement)
    found = [tuple((one[0], one[1], one[2]) for one in mapping) for mapping in rows]
    return list(dict.fromkeys(found))


async def asked_without_mapping(
    db: Database, workspace_id: str, technique_id: str
) -> list[list[list[Input]]]:
    """Inputs of rows that older versions started without storing the batch's mapping: one list for
    all batches with the same inputs."""
    statement = (
        select(batches.c.batch_id, starts.c.inputs)
        .join(batch_rows)
        .join(starts, is_start_of(batch_rows))
        .where(
            batches.c.workspace_slot == workspace_id,
            batches.c.technique_id == technique_id,
            batches.c.mapping.is_(None),
            starts.c.state.not_in((StartState.STORED, StartState.REFUSED)),
        )
    )
    of_batches: dict[str, list[list[Input]]] = {}
    for batch_id, inputs in await db.fetch(statement):
        of_batches.setdefault(batch_id, []).append(inputs)
    found: dict[frozenset[tuple[str, str]], list[list[Input]]] = {}
    for rows in of_batches.values():
        named = frozenset((one["id"], one["type"]) for inputs in rows for one in inputs)
        found.setdefault(named, []).extend(rows)
    return list(found.values())
