"""The write statements for PostgreSQL.

The rows of a write batch travel as one JSON text, which `json_to_recordset` turns into rows again.
So a statement does not depend on the number of rows, each connection plans it once, and one text
takes this process a third of the time of an array for each column. Rows come sorted by key, so that
two processes never deadlock.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

import orjson
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Integer,
    Table,
    Text,
    TypeDecorator,
    bindparam,
    cast,
    column,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.selectable import TableValuedAlias

from tracker.store.engine import Database
from tracker.store.errors import WriteConflict
from tracker.store.rows import RUN_COLUMNS, run_row
from tracker.store.schema import (
    UtcDateTime,
    deliveries,
    is_any_of,
    outbox,
    run_events,
    run_outputs,
    run_tally_changes,
    runs,
)
from tracker.store.signals import DUE, OUTBOX, run_notices
from tracker.store.writing.statements import (
    DELETE_OUTPUTS,
    DELIVERY_COLUMNS,
    EVENT_COLUMNS,
    OUTBOX_COLUMNS,
    OUTPUT_COLUMNS,
    ROLLUP_COLUMNS,
    STARTED_COLUMNS,
    BatchChanges,
    Receipt,
    Rows,
    Statements,
    close_starts,
    new_delivery,
)


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


def _write() -> Any:
    """Runs, their events, rollup changes, the outbox and notices; returns how many runs were
    written.

    It waits for no row: those of `existing` runs are locked. A run that another process has added
    meanwhile is left alone.
    """
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
    events = _insert_incoming(run_events, EVENT_COLUMNS, "events").cte("new_events")
    rollups = _insert_incoming(run_tally_changes, ROLLUP_COLUMNS, "rollups").cte("new_rollups")
    sent = _insert_incoming(outbox, OUTBOX_COLUMNS, "outbox").cte("new_outbox")
    notice = _incoming("notice", [Column(name, Text()) for name in _NOTICES])
    notified = select(func.count(func.pg_notify(notice.c.channel, notice.c.payload)))
    updates, inserts = (
        select(func.count()).select_from(part).scalar_subquery() for part in (changed, added)
    )
    return select(updates + inserts, notified.scalar_subquery()).add_cte(events, rollups, sent)


WRITE: Final = _write()
INSERT_OUTPUTS: Final = _insert_incoming(run_outputs, OUTPUT_COLUMNS, "outputs")
_STARTED: Final[list[Column[Any]]] = [
    *(Column(name, Text()) for name in STARTED_COLUMNS[:3]),
    *(Column(name, Integer()) for name in STARTED_COLUMNS[3:]),
]
CLOSE_STARTS: Final = close_starts(*_incoming("started", _STARTED).c)

# One statement, which is a transaction by itself, goes to the driver directly: see `Database.send`.
# Bodies are bytes, so they travel beside the JSON. A body that retention has removed cannot be
# compared: what comes under its id counts as a repetition. Of new deliveries, which are nearly all,
# nothing is sent back.
_TYPES: Final = {UtcDateTime: "timestamptz", Integer: "integer"}
_TYPED: Final = ", ".join(
    f"{name} {_TYPES.get(type(deliveries.c[name].type), 'text')}" for name in DELIVERY_COLUMNS
)
_DELIVERY: Final = ", ".join(DELIVERY_COLUMNS)
STORE: Final = f"""
WITH came AS (
    SELECT *
    FROM ROWS FROM (
        json_to_recordset($1::text::json) AS ({_TYPED}),
        unnest($2::bytea[])
    ) AS came ({_DELIVERY}, body)
), stored AS (
    INSERT INTO deliveries ({_DELIVERY}, body)
    SELECT * FROM came
    ON CONFLICT (delivery_id) DO UPDATE SET
        receipts = deliveries.receipts + excluded.receipts,
        last_received_at = greatest(deliveries.last_received_at, excluded.last_received_at)
    WHERE deliveries.body = excluded.body OR deliveries.body_removed_at IS NOT NULL
    RETURNING delivery_id, receipts, outcome
)
SELECT delivery_id, stored.outcome
FROM came LEFT JOIN stored USING (delivery_id)
WHERE stored.receipts IS DISTINCT FROM came.receipts
"""  # noqa: S608 - names of columns alone


class PostgresStatements(Statements):
    """One statement for the rows of a write batch, and up to three for outputs and starts.

    `origin` marks the notices of this process.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def write(self, connection: Connection, changes: BatchChanges) -> None:
        notices = run_notices(self._origin, changes.changed_runs)
        if changes.due:
            notices.append((DUE, self._origin))
        if changes.outbox:
            notices.append((OUTBOX, self._origin))
        existing = set(changes.existing)
        rows: dict[bool, Rows] = {True: [], False: []}
        for record in changes.records:
            rows[record.run.run_id in existing].append(run_row(record))
        values = {
            "existing": changes.existing,
            "after": _to_json(_RUNS, rows[True]),
            "new": _to_json(_RUNS, rows[False]),
            "events": _to_json(EVENT_COLUMNS, changes.events),
            "rollups": _to_json(ROLLUP_COLUMNS, changes.rollups),
            "outbox": _to_json(OUTBOX_COLUMNS, changes.outbox),
            "notice": _to_json(_NOTICES, notices),
        }
        if connection.execute(WRITE, values).scalar_one() < len(changes.records):
            raise WriteConflict
        if changes.replaced_outputs:
            connection.execute(DELETE_OUTPUTS, {"run_ids": changes.replaced_outputs})
        if changes.outputs:
            made = _to_json(OUTPUT_COLUMNS, changes.outputs)
            connection.execute(INSERT_OUTPUTS, {"outputs": made})
        if changes.started:
            started = _to_json(STARTED_COLUMNS, changes.started)
            connection.execute(CLOSE_STARTS, {"started": started})

    async def store(self, db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
        incoming = orjson.dumps([*map(new_delivery, receipts)]).decode()
        bodies = [receipt.delivery.body for receipt in receipts]
        rows = await db.send(STORE, (incoming, bodies))
        return {row[0]: row[1] for row in rows}


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
