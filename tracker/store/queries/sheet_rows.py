"""The rows of batches as people look for them: by outcome, by error, by text, and by run."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Select, Text, and_, cast, func, literal, select
from sqlalchemy.dialects.postgresql import JSONPATH

from tracker.core.inputs import key_parts
from tracker.core.run import Output
from tracker.store.engine import Database
from tracker.store.queries.batches import RowOutcome, is_start_of, of_outcome, with_outcomes
from tracker.store.queries.starts import StartRow
from tracker.store.schema import batch_rows, batches, run_outputs, starts
from tracker.store.text import dump_json

RECENT_BATCHES: Final = 300
RECENT_ROWS: Final = 50_000
"""The newest batches, and rows of them, that a text is searched in."""
MATCHES: Final = 1_000
"""Runs that a search by text finds through their rows."""


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
    some = with_outcomes(of_runs).subquery()
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


def run_ids_of(batch_id: str) -> Select[Any]:
    """The ids of the runs of a batch."""
    return with_outcomes(select(starts.c.run_id)).where(
        batch_rows.c.batch_id == batch_id, starts.c.run_id.is_not(None)
    )


async def rows_of_start(db: Database, start: StartRow, *, limit: int = 3) -> list[RowOfBatch]:
    """The rows that a start was made for, those of the newest batches first. A row keeps the starts
    of its earlier attempts."""
    parts = key_parts(start.idempotency_key)
    if parts is None:
        return []
    digest, turn = parts
    columns = (batch_rows.c.batch_id, batches.c.name, batch_rows.c.position, starts.c.run_id)
    rows = with_outcomes(select(*columns, batch_rows.c.attempt, batch_rows.c.carried))
    statement = rows.where(
        batch_rows.c.row_digest == digest,
        batch_rows.c.generation == turn.generation,
        batch_rows.c.attempt >= turn.attempt,
        batches.c.workspace_slot == start.workspace_slot,
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
        ids = with_outcomes(select(starts.c.run_id)).where(
            batch_rows.c.batch_id.in_([batch_id for batch_id, _ in named]),
            starts.c.run_id.is_not(None),
        )
        of_batches = (await connection.execute(ids.limit(MATCHES))).scalars() if named else ()
        run_ids = [row.run_id for row in in_rows if row.run_id is not None] + list(of_batches)
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
