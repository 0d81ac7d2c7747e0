"""A batch's statements for SQLite, whose single writer has the whole file locked while it runs.

Each statement takes all rows of its kind at once; lists of keys travel as one JSON text, so that
the statements' text does not depend on how many there are.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Text, bindparam, delete, func, null, select, update
from sqlalchemy.dialects.sqlite import insert

from tracker.core.record import Record
from tracker.store.batch import DELIVERY_COLUMNS, EVENT_COLUMNS, OUTPUT_COLUMNS, Changes, Rows
from tracker.store.rows import (
    RUN_COLUMNS,
    ids_with_outputs,
    outputs_by_run,
    run_row,
    with_outputs,
)
from tracker.store.tables import deliveries, run_events, run_outputs, runs, starts
from tracker.store.text import dump_json

_DELIVERIES: Final = tuple(column.name for column in DELIVERY_COLUMNS)
_RUNS: Final = tuple(column.name for column in RUN_COLUMNS)


def _is_any_of(of: Any, parameter: str) -> Any:
    listed = func.json_each(bindparam(parameter, type_=Text())).table_valued("value")
    return of.in_(select(listed.c.value))


def _count_deliveries() -> Any:
    upsert = insert(deliveries)
    return upsert.on_conflict_do_update(
        index_elements=[deliveries.c.delivery_id],
        set_={
            "receipts": deliveries.c.receipts + upsert.excluded.receipts,
            "last_received_at": func.max(
                deliveries.c.last_received_at, upsert.excluded.last_received_at
            ),
        },
    ).returning(deliveries.c.delivery_id, deliveries.c.receipts)


def _write_runs() -> Any:
    upsert = insert(runs)
    return upsert.on_conflict_do_update(
        index_elements=[runs.c.run_id],
        set_={name: upsert.excluded[name] for name in _RUNS if name != "run_id"},
    )


COUNT_DELIVERIES: Final = _count_deliveries()
RUNS: Final = select(*RUN_COLUMNS).where(_is_any_of(runs.c.run_id, "run_ids"))
OUTPUTS: Final = (
    select(*(run_outputs.c[name] for name in ("run_id", "output_id", "type", "url")))
    .where(_is_any_of(run_outputs.c.run_id, "run_ids"))
    .order_by(run_outputs.c.run_id, run_outputs.c.position)
)
WRITE_RUNS: Final = _write_runs()
KEEP_EVENTS: Final = insert(run_events)
DROP_OUTPUTS: Final = delete(run_outputs).where(_is_any_of(run_outputs.c.run_id, "run_ids"))
KEEP_OUTPUTS: Final = insert(run_outputs)
CLOSE_STARTS: Final = (
    update(starts)
    .where(
        starts.c.workspace_slot == bindparam("slot"),
        starts.c.idempotency_key == bindparam("key"),
        starts.c.state != "started",
    )
    .values(
        state="started",
        run_id=bindparam("run"),
        error=null(),
        lease_until=null(),
        lease_holder=null(),
    )
)


class SqliteStatements:
    """See `tracker.store.batch.Statements`."""

    def count_deliveries(self, connection: Connection, rows: Rows) -> dict[str, int]:
        """Rows of several values each, as many as SQLite takes in one statement."""
        answer = connection.execute(COUNT_DELIVERIES, _named(_DELIVERIES, rows))
        return dict(answer.all())

    def lock_runs(self, connection: Connection, run_ids: list[str]) -> dict[str, Record]:
        """Plain reads: the transaction has the file to itself."""
        rows = connection.execute(RUNS, {"run_ids": dump_json(run_ids)}).all()
        made = ids_with_outputs(rows)
        outputs = (
            outputs_by_run(connection.execute(OUTPUTS, {"run_ids": dump_json(made)}))
            if made
            else {}
        )
        return {record.run.run_id: record for record in with_outputs(rows, outputs)}

    def write(self, connection: Connection, changes: Changes) -> None:
        """One prepared statement for each table. Nobody can have come in between."""
        records = [run_row(record) for record in changes.records]
        if records:
            connection.execute(WRITE_RUNS, _named(_RUNS, records))
        if changes.events:
            connection.execute(KEEP_EVENTS, _named(EVENT_COLUMNS, changes.events))
        if changes.outputs_gone:
            connection.execute(DROP_OUTPUTS, {"run_ids": dump_json(changes.outputs_gone)})
        if changes.outputs:
            connection.execute(KEEP_OUTPUTS, _named(OUTPUT_COLUMNS, changes.outputs))
        if changes.started:
            connection.execute(CLOSE_STARTS, _named(("slot", "key", "run"), changes.started))


def _named(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(names, row, strict=True)) for row in rows]
