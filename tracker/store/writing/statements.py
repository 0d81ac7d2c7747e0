"""The statements of a write batch: on SQLite one for each table, on PostgreSQL one for nearly all.

Their number hardly depends on that of the rows.

SQLite's single writer locks the whole file while it runs. So the text of each statement is made
once, and the driver gets rows in SQLite's own form, many at a time.

To PostgreSQL the rows travel as one JSON text, which `json_to_recordset` turns into rows again. So
each connection plans a statement once, and one text takes this process a third of the time of an
array for each column. Rows come sorted by key, so that two processes never deadlock.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

import orjson
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Insert,
    Integer,
    Select,
    Table,
    Text,
    TypeDecorator,
    Update,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.selectable import TableValuedAlias

from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.store.coordination import DUE, OUTBOX, run_notices
from tracker.store.engine import Database, dump_json
from tracker.store.errors import WriteConflict
from tracker.store.queries import audit
from tracker.store.queries.runs import RUN_COLUMNS, records, run_row
from tracker.store.schema import (
    Money,
    UtcDateTime,
    is_any_of,
    outbox,
    run_events,
    run_outputs,
    run_tally_changes,
    runs,
    starts,
)
from tracker.store.sqlite import driver_execute
from tracker.store.writing import rollups

Rows = list[tuple[Any, ...]]


@dataclass(slots=True)
class BatchChanges:
    """What a write batch changes, in rows sorted by key."""

    added: list[Record] = field(default_factory=list)
    updated: list[Record] = field(default_factory=list)
    """Records of runs that have a row already."""
    replaced_outputs: list[str] = field(default_factory=list)
    """Runs whose stored outputs are replaced."""
    outputs: Rows = field(default_factory=list)
    events: Rows = field(default_factory=list)
    rollups: Rows = field(default_factory=list)
    """Differences of counts and amounts, by key: see tracker.core.rollup."""
    outbox: Rows = field(default_factory=list)
    """Events to send to endpoints: see tracker.core.events."""
    started: Rows = field(default_factory=list)
    """Workspace and idempotency key of a start, the run that it became (the first of several),
    and how many of its runs appear for the first time: all, and all but the first."""
    due: bool = False
    """Whether a poll was brought forward."""
    changed_runs: list[str] = field(default_factory=list)
    """Runs that look different to readers."""
    moved: list[str] = field(default_factory=list)
    """Runs whose workspace was corrected."""

    def add(self, old: Record | None, new: Record) -> None:
        """Add what differs between the stored record of a run and the new one."""
        run, run_id, stored = new.run, new.run.run_id, None
        if old is None:
            self.added.append(new)
        else:
            self.updated.append(new)
            stored = old.run.outputs
            if run.workspace_id != old.run.workspace_id:
                self.moved.append(run_id)
        if old is None or run is not old.run or new.tracking is not old.tracking:
            self.changed_runs.append(run_id)
        if run.outputs != stored:
            if stored is not None:
                self.replaced_outputs.append(run_id)
            self.outputs.extend(
                (run_id, position, output.output_id, output.type, output.url)
                for position, output in enumerate(run.outputs or ())
            )


LOCK_RUNS: Final = (
    select(*RUN_COLUMNS)
    .where(is_any_of(runs.c.run_id, "run_ids"))
    .order_by(runs.c.run_id)
    .with_for_update(key_share=True)
)


def lock_runs(connection: Connection, run_ids: Sequence[str]) -> dict[str, Record]:
    """The records of those of the runs that exist, locked until the commit."""
    rows = connection.execute(LOCK_RUNS, {"run_ids": run_ids}).all()
    return {record.run.run_id: record for record in records(connection, rows)}


class ShownByFlora(Exception):
    """FLORA has shown the run, and does not deny it."""


async def forget_run(
    db: Database, run_id: str, *, force: bool, entry: Mapping[str, Any]
) -> Record | None:
    """Remove a run with its outputs and timeline, as though it had never been known, and write the
    audit `entry`; the run as it was.

    Returns `None` for an unknown run. Raises `ShownByFlora`, unless `force`, for a run that FLORA
    has shown and that is not lost; and `StoreUnavailable`.
    """

    def work(connection: Connection) -> Record | None:
        record = lock_runs(connection, [run_id]).get(run_id)
        if record is None:
            return None
        mine = run_events.c.run_id == run_id
        shown = exists().where(mine, run_events.c.source != Source.TRACK.value)
        if not (force or record.lost) and connection.execute(select(shown)).scalar():
            raise ShownByFlora
        rollups.remove(connection, record)
        connection.execute(delete(runs).where(runs.c.run_id == run_id))
        # A further run of a start: the start lacks it again, unless FLORA denies that it exists.
        connection.execute(
            update(starts)
            .where(
                starts.c.workspace_slot == record.run.workspace_id,
                starts.c.idempotency_key == record.idempotency_key,
                starts.c.run_id != run_id,
            )
            .values(
                run_count=starts.c.run_count - 1,
                reserved_runs=starts.c.reserved_runs + int(not record.lost),
            )
        )
        audit.note(connection, entry)
        return record

    return await db.write(work)


# What both databases share.

_EVENT_COLUMNS: Final = ("run_id", "at", "source", "status", "progress", "detail")
_OUTBOX_COLUMNS: Final = ("event_id", "event", "run_id", "at")
_OUTPUT_COLUMNS: Final = ("run_id", "position", "output_id", "type", "url")
_STARTED_COLUMNS: Final = ("workspace", "key", "run", "shown", "others")
_DELETE_OUTPUTS: Final = delete(run_outputs).where(is_any_of(run_outputs.c.run_id, "run_ids"))


def _close_starts(workspace: Any, key: Any, run: Any, shown: Any, others: Any) -> Update:
    """Starts that became runs, with the values of `_STARTED_COLUMNS`: each keeps its first run,
    counts those that appeared, and no longer reserves them."""
    is_started = starts.c.state == "started"
    further = case((is_started, shown), else_=others)
    return (
        update(starts)
        .where(
            starts.c.workspace_slot == workspace,
            starts.c.idempotency_key == key,
            or_(~is_started, shown > 0),
        )
        .values(
            state="started",
            run_id=func.coalesce(starts.c.run_id, run),
            run_count=func.coalesce(starts.c.run_count, 1) + further,
            reserved_runs=starts.c.reserved_runs - further,
            error=null(),
            request_body=null(),
            lease_until=null(),
            lease_holder=null(),
        )
    )


# SQLite.

_SIZES: Final = (1, 2, 4, *range(8, 64, 8), 64, 96, 128)
"""How many rows one statement inserts: the next size, filled up with rows that are not inserted."""


@lru_cache(4096)  # most times of a run are equal
def _moment(value: datetime) -> str:
    """As `UtcDateTime` stores it on SQLite."""
    if value.tzinfo is not UTC:
        value = value.astimezone(UTC)
    return value.isoformat(" ", "microseconds")[:-6]  # without its +00:00


_FORMS: Final[dict[type, Callable[[Any], Any]]] = {
    UtcDateTime: _moment,
    Money: float,
    JSON: dump_json,
}
"""How SQLite stores what it has no type for; the types of `tracker.store.schema` do the same."""


class RowInsert:
    """An insert of any number of rows into these columns of a table.

    After each statement the driver asks for Python's lock again, for which it may wait while other
    threads compute. So rows go many at a time, in statements of a few fixed sizes: the driver keeps
    each that it has prepared, with the values that it had last.
    """

    def __init__(self, table: Table, names: Sequence[str], *, on_conflict: str = "") -> None:
        columns = [table.c[name] for name in names]
        into = f"INSERT INTO {table.name} ({', '.join(each.name for each in columns)})"
        row = f"({', '.join('?' * len(columns))})"
        self._texts = {
            size: f"{into} SELECT * FROM (VALUES {', '.join([row] * size)}) "  # noqa: S608
            f"WHERE column1 IS NOT NULL {on_conflict}"
            for size in _SIZES
        }
        self._width = len(columns)
        self._forms = [
            (position, form)
            for position, column in enumerate(columns)
            if (form := _FORMS.get(type(column.type))) is not None
        ]

    def statements(self, rows: Rows) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Statements in the driver's form, each with its values."""
        for first in range(0, len(rows), _SIZES[-1]):
            some = rows[first : first + _SIZES[-1]]
            size = next(size for size in _SIZES if size >= len(some))
            values: list[Any] = []
            for row in some:
                plain = [*row]
                for position, form in self._forms:
                    if (value := plain[position]) is not None:
                        plain[position] = form(value)
                values += plain
            values += [None] * self._width * (size - len(some))
            yield self._texts[size], tuple(values)

    def __call__(self, connection: Connection, rows: Rows) -> None:
        if rows:
            execute = driver_execute(connection)
            for text, values in self.statements(rows):
                execute(text, values)


_UPSERT_RUNS: Final = RowInsert(
    runs,
    [each.key for each in RUN_COLUMNS],
    on_conflict="ON CONFLICT (run_id) DO UPDATE SET "
    + ", ".join(
        f"{each.name} = excluded.{each.name}" for each in RUN_COLUMNS if each is not runs.c.run_id
    ),
)
_INSERT_EVENTS: Final = RowInsert(run_events, _EVENT_COLUMNS)
_INSERT_ROLLUPS: Final = RowInsert(run_tally_changes, rollups.COLUMNS)
_INSERT_OUTBOX: Final = RowInsert(outbox, _OUTBOX_COLUMNS)
_INSERT_OUTPUTS: Final = RowInsert(run_outputs, _OUTPUT_COLUMNS)
_CLOSE_STARTS: Final = _close_starts(*(bindparam(name) for name in _STARTED_COLUMNS))


def write_sqlite(connection: Connection, changes: BatchChanges) -> None:
    """Write all changes."""
    _UPSERT_RUNS(connection, [run_row(record) for record in (*changes.added, *changes.updated)])
    _INSERT_EVENTS(connection, changes.events)
    _INSERT_ROLLUPS(connection, changes.rollups)
    _INSERT_OUTBOX(connection, changes.outbox)
    if changes.replaced_outputs:
        connection.execute(_DELETE_OUTPUTS, {"run_ids": changes.replaced_outputs})
    _INSERT_OUTPUTS(connection, changes.outputs)
    if changes.started:
        rows = [dict(zip(_STARTED_COLUMNS, row, strict=True)) for row in changes.started]
        connection.execute(_CLOSE_STARTS, rows)


# PostgreSQL.


def _incoming(name: str, columns: Sequence[Column[Any]]) -> TableValuedAlias:
    """The rows that the parameter `name` holds as JSON, in order, with these columns' types."""
    # The type under ours, because PostgreSQL has to know its name.
    types = (
        each.type.impl_instance if isinstance(each.type, TypeDecorator) else each.type
        for each in columns
    )
    return (
        func.json_to_recordset(cast(bindparam(name, type_=Text()), JSON))
        .table_valued(*(column(each.key, kind) for each, kind in zip(columns, types, strict=True)))
        .render_derived(name=name, with_types=True)
    )


def _insert_incoming(table: Table, names: Sequence[str], parameter: str) -> Any:
    rows = _incoming(parameter, [table.c[name] for name in names])
    return insert(table).from_select(names, select(*(rows.c[name] for name in names)))


# Plain strings: SQLAlchemy's names are of a class of their own, which no JSON key may be.
_RUNS: Final = tuple(f"{each.key}" for each in RUN_COLUMNS)
_NOTICES: Final = ("channel", "payload")


class PostgresStatements(NamedTuple):
    """The statements of `postgres_statements`."""

    write: Select[int, int]
    """Writes runs, their events, rollup changes, the outbox and notices; returns how many runs were
    written.

    It waits for no row: those of `existing` runs are locked. A run that another process has added
    meanwhile is left alone.
    """
    insert_outputs: Insert
    close_starts: Update


@cache
def postgres_statements() -> PostgresStatements:
    """The statements, made when they are first needed: it takes a few milliseconds."""
    after = _incoming("after", RUN_COLUMNS)
    changed = (
        update(runs)
        # The ids once more, because only an array is looked up in the index, however small the
        # table was when this was planned.
        .where(runs.c.run_id == after.c.run_id, is_any_of(runs.c.run_id, "existing"))
        .values({name: after.c[name] for name in _RUNS if name != "run_id"})
        .returning(runs.c.run_id)
        .cte("changed")
    )
    added = (
        _insert_incoming(runs, _RUNS, "new")
        .on_conflict_do_nothing(index_elements=[runs.c.run_id])
        .returning(runs.c.run_id)
        .cte("added")
    )
    events = _insert_incoming(run_events, _EVENT_COLUMNS, "events").cte("new_events")
    counts = _insert_incoming(run_tally_changes, rollups.COLUMNS, "rollups").cte("new_rollups")
    sent = _insert_incoming(outbox, _OUTBOX_COLUMNS, "outbox").cte("new_outbox")
    notice = _incoming("notice", [Column(name, Text()) for name in _NOTICES])
    notified = select(func.count(func.pg_notify(notice.c.channel, notice.c.payload)))
    updates, inserts = (
        select(func.count()).select_from(part).scalar_subquery() for part in (changed, added)
    )
    started: list[Column[Any]] = [
        *(Column(name, Text()) for name in _STARTED_COLUMNS[:3]),
        *(Column(name, Integer()) for name in _STARTED_COLUMNS[3:]),
    ]
    return PostgresStatements(
        select(updates + inserts, notified.scalar_subquery()).add_cte(events, counts, sent),
        _insert_incoming(run_outputs, _OUTPUT_COLUMNS, "outputs"),
        _close_starts(*_incoming("started", started).c),
    )


def write_postgres(connection: Connection, changes: BatchChanges, origin: str) -> None:
    """Write all changes; `origin` marks the notices of this process. Raises `WriteConflict` if
    another process has added a new run."""
    notices = run_notices(origin, changes.changed_runs)
    if changes.due:
        notices.append((DUE, origin))
    if changes.outbox:
        notices.append((OUTBOX, origin))
    values = {
        "existing": [record.run.run_id for record in changes.updated],
        "after": _to_json(_RUNS, [run_row(record) for record in changes.updated]),
        "new": _to_json(_RUNS, [run_row(record) for record in changes.added]),
        "events": _to_json(_EVENT_COLUMNS, changes.events),
        "rollups": _to_json(rollups.COLUMNS, changes.rollups),
        "outbox": _to_json(_OUTBOX_COLUMNS, changes.outbox),
        "notice": _to_json(_NOTICES, notices),
    }
    statements = postgres_statements()
    written = connection.execute(statements.write, values).scalar_one()
    if written < len(changes.added) + len(changes.updated):
        raise WriteConflict
    if changes.replaced_outputs:
        connection.execute(_DELETE_OUTPUTS, {"run_ids": changes.replaced_outputs})
    if changes.outputs:
        made = _to_json(_OUTPUT_COLUMNS, changes.outputs)
        connection.execute(statements.insert_outputs, {"outputs": made})
    if changes.started:
        started = _to_json(_STARTED_COLUMNS, changes.started)
        connection.execute(statements.close_starts, {"started": started})


def _to_json(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    """Rows as one JSON text for `_incoming`, without nulls."""
    named = [
        {name: value for name, value in zip(names, row, strict=True) if value is not None}
        for row in rows
    ]
    return orjson.dumps(named, default=_decimal_text).decode()


def _decimal_text(value: Any) -> str:
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a row")
