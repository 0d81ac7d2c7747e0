"""A batch's statements for PostgreSQL.

Rows travel as one JSON text and become rows again in the server, by `json_to_recordset`. So a
statement's text does not depend on how many rows there are, it is planned once for each connection,
a batch is a handful of round trips, and one text costs this process a third of what an array for
each column costs. Rows come sorted by key, so that no two processes deadlock.
"""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import orjson
from sqlalchemy import (
    ARRAY,
    JSON,
    Column,
    Connection,
    Integer,
    Text,
    TypeDecorator,
    any_,
    bindparam,
    case,
    cast,
    column,
    delete,
    func,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import TypeEngine

from tracker.core.record import Delivery, Record
from tracker.store.engine import Database
from tracker.store.errors import WriteConflict
from tracker.store.notices import due_notice, run_notices
from tracker.store.rows import RUN_COLUMNS, ids_with_outputs, outputs_by_run, run_row, with_outputs
from tracker.store.schema import (
    deliveries,
    run_events,
    run_outputs,
    run_tally_changes,
    runs,
    starts,
)
from tracker.store.writing.delivery_rows import deliveries_of, quarantine, waiting_first
from tracker.store.writing.inbox import Receipt
from tracker.store.writing.writer import EVENT_COLUMNS, OUTPUT_COLUMNS, TALLY_COLUMNS, Changes, Rows


def _incoming(name: str, columns: Sequence[Column[Any]]) -> TableValuedAlias:
    """The rows that the parameter `name` holds as JSON, in order, with these columns' types."""
    return (
        func.json_to_recordset(cast(bindparam(name, type_=Text()), JSON))
        .table_valued(*(column(each.name, _plain(each.type)) for each in columns))
        .render_derived(name=name, with_types=True)
    )


def _plain(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """The type under ours, as PostgreSQL names it."""
    return kind.impl_instance if isinstance(kind, TypeDecorator) else kind


def _is_any_of(of: Any, parameter: str) -> Any:
    """Whether it is among the texts that this parameter lists."""
    return of == any_(bindparam(parameter, type_=ARRAY(Text(), dimensions=1)))


# Plain strings: SQLAlchemy's names are of a class of their own, which no JSON key may be.
_RUNS: Final = tuple(f"{each.name}" for each in RUN_COLUMNS)
_STARTED: Final = ("slot", "key", "run_id", "shown", "others")
_NOTICES: Final = ("channel", "payload")


def _how_many(part: Any) -> Any:
    return select(func.count()).select_from(part).scalar_subquery()


def _write() -> Any:
    """Runs, their events, what they count for and the notices: how many runs were written.

    It waits for no row: those of `known` runs are locked. A run that is new to us and is there all
    the same is left.
    """
    after = _incoming("after", RUN_COLUMNS)
    changed = (
        update(runs)
        # The ids once more, because only an array is looked up in the index however small the
        # table was when this was planned.
        .where(runs.c.run_id == after.c.run_id, _is_any_of(runs.c.run_id, "known"))
        .values({name: after.c[name] for name in _RUNS if name != "run_id"})
        .returning(runs.c.run_id)
        .cte("changed")
    )
    new = _incoming("new", RUN_COLUMNS)
    added = (
        insert(runs)
        .from_select(_RUNS, select(*(new.c[name] for name in _RUNS)))
        .on_conflict_do_nothing(index_elements=[runs.c.run_id])
        .returning(runs.c.run_id)
        .cte("added")
    )
    seen = _incoming("seen", [run_events.c[name] for name in EVENT_COLUMNS])
    kept = (
        insert(run_events)
        .from_select(EVENT_COLUMNS, select(*(seen.c[name] for name in EVENT_COLUMNS)))
        .cte("kept")
    )
    tally = _incoming("tally", [run_tally_changes.c[name] for name in TALLY_COLUMNS])
    counted = (
        insert(run_tally_changes)
        .from_select(TALLY_COLUMNS, select(*(tally.c[name] for name in TALLY_COLUMNS)))
        .cte("counted")
    )
    notice = _incoming("notice", [Column(name, Text()) for name in _NOTICES])
    notified = select(func.count(func.pg_notify(notice.c.channel, notice.c.payload)))
    written = _how_many(changed) + _how_many(added)
    return select(written, notified.scalar_subquery()).add_cte(kept, counted)


def _writing_values(changes: Changes, origin: str) -> dict[str, Any]:
    """The parameters of `WRITE`."""
    notices = run_notices(origin, changes.news)
    if changes.due:
        notices.append(due_notice(origin))
    known = set(changes.known)
    rows: dict[bool, Rows] = {True: [], False: []}
    for record in changes.records:
        rows[record.run.run_id in known].append(run_row(record))
    return {
        "known": changes.known,
        "after": _to_json(_RUNS, rows[True]),
        "new": _to_json(_RUNS, rows[False]),
        "seen": _to_json(EVENT_COLUMNS, changes.events),
        "tally": _to_json(TALLY_COLUMNS, changes.tallies),
        "notice": _to_json(_NOTICES, notices),
    }


def _keep_outputs() -> Any:
    made = _incoming("made", [run_outputs.c[name] for name in OUTPUT_COLUMNS])
    return insert(run_outputs).from_select(
        OUTPUT_COLUMNS, select(*(made.c[name] for name in OUTPUT_COLUMNS))
    )


def _close_starts() -> Any:
    texts, counts = _STARTED[:3], _STARTED[3:]
    columns: list[Column[Any]] = [Column(name, Text()) for name in texts]
    started = _incoming("started", [*columns, *(Column(name, Integer()) for name in counts)])
    return (
        update(starts)
        .where(
            starts.c.workspace_slot == started.c.slot,
            starts.c.idempotency_key == started.c.key,
            or_(starts.c.state != "started", started.c.shown > 0),
        )
        .values(
            state="started",
            run_id=func.coalesce(starts.c.run_id, started.c.run_id),
            reserved_runs=starts.c.reserved_runs
            - case((starts.c.state == "started", started.c.shown), else_=started.c.others),
            error=null(),
            request_body=null(),
            lease_until=null(),
            lease_holder=null(),
        )
    )


LOCK_RUNS: Final = (
    select(*RUN_COLUMNS)
    .where(_is_any_of(runs.c.run_id, "run_ids"))
    .order_by(runs.c.run_id)
    .with_for_update(key_share=True)
)
# A statement of its own, after the lock: one that also takes the lock would show outputs as they
# were when it began to wait.
OUTPUTS: Final = (
    select(*(run_outputs.c[name] for name in ("run_id", "output_id", "type", "url")))
    .where(_is_any_of(run_outputs.c.run_id, "run_ids"))
    .order_by(run_outputs.c.run_id, run_outputs.c.position)
)
WRITE: Final = _write()
DROP_OUTPUTS: Final = delete(run_outputs).where(_is_any_of(run_outputs.c.run_id, "run_ids"))
KEEP_OUTPUTS: Final = _keep_outputs()
CLOSE_STARTS: Final = _close_starts()
TAKE_WAITING: Final = (
    waiting_first().where(~_is_any_of(deliveries.c.delivery_id, "held_up"))
).with_for_update(skip_locked=True)
APPLIED: Final = (
    update(deliveries)
    .where(_is_any_of(deliveries.c.delivery_id, "delivery_ids"))
    .values(outcome="applied", reason=null(), applied_at=bindparam("at"))
)


class PostgresStatements:
    """See `tracker.store.writing.writer.Statements`. `origin` signs the notices."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def lock_runs(self, connection: Connection, run_ids: list[str]) -> dict[str, Record]:
        """One select for update, and one for the outputs where there are any."""
        rows = connection.execute(LOCK_RUNS, {"run_ids": run_ids}).all()
        made = ids_with_outputs(rows)
        outputs = outputs_by_run(connection.execute(OUTPUTS, {"run_ids": made})) if made else {}
        return {record.run.run_id: record for record in with_outputs(rows, outputs)}

    def write(self, connection: Connection, changes: Changes) -> None:
        """One statement, and up to three more where outputs or starts are among the changes."""
        written = connection.execute(WRITE, _writing_values(changes, self._origin)).scalar_one()
        if written < len(changes.records):
            raise WriteConflict
        if changes.outputs_gone:
            connection.execute(DROP_OUTPUTS, {"run_ids": changes.outputs_gone})
        if changes.outputs:
            connection.execute(KEEP_OUTPUTS, {"made": _to_json(OUTPUT_COLUMNS, changes.outputs)})
        if changes.started:
            connection.execute(CLOSE_STARTS, {"started": _to_json(_STARTED, changes.started)})

    def take_waiting(
        self, connection: Connection, limit: int, held_up: Sequence[str]
    ) -> tuple[list[Delivery], int]:
        """One select for update, and one for large bodies."""
        rows = connection.execute(TAKE_WAITING, {"most": limit, "held_up": held_up}).all()
        return deliveries_of(connection, rows), len(rows)

    def finish(
        self,
        connection: Connection,
        applied: Sequence[str],
        quarantined: Sequence[tuple[str, str]],
        at: datetime,
    ) -> None:
        """One update of all that were applied, and one for each that was not."""
        if applied:
            connection.execute(APPLIED, {"delivery_ids": applied, "at": at})
        quarantine(connection, quarantined)


def _to_json(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    """Rows as one JSON text for `_incoming`; what is not there is null."""
    named = [
        {name: value for name, value in zip(names, row, strict=True) if value is not None}
        for row in rows
    ]
    return orjson.dumps(named, default=_as_text).decode()


def _as_text(value: Any) -> Any:
    """What JSON has no word for, as PostgreSQL reads it."""
    match value:
        case Decimal():
            return str(value)
        case bytes():
            return "\\x" + value.hex()
    raise TypeError(f"{type(value).__name__} has no place in a row")


# Storing a group of deliveries on PostgreSQL: one statement, which is a transaction by itself.
#
# Rows travel as one array for each column, so that the statement's text does not depend on how
# many there are. It goes to the driver directly: see `Database.send`.


# Rows come sorted by id, so that no two processes wait for each other in a circle. A body that
# retention has removed cannot be compared: what comes under its id is taken for a repetition. Of
# what is new, which is nearly all, nothing is sent back, so that nothing has to be read.
STORE: Final = """
WITH came AS (
    SELECT *
    FROM unnest(
        $1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
        $7::timestamptz[], $8::timestamptz[], $9::integer[], $10::bytea[], $11::text[]
    ) AS came (
        delivery_id, run_id, event_type, api_version, workspace_id, created_at,
        received_at, last_received_at, receipts, body, callback_token
    )
), stored AS (
    INSERT INTO deliveries (
        delivery_id, run_id, event_type, api_version, workspace_id, created_at,
        received_at, last_received_at, receipts, body, callback_token, outcome
    )
    SELECT
        delivery_id, run_id, event_type, api_version, workspace_id, created_at,
        received_at, coalesce(last_received_at, received_at), receipts, body, callback_token,
        'waiting'
    FROM came
    ON CONFLICT (delivery_id) DO UPDATE SET
        receipts = deliveries.receipts + excluded.receipts,
        last_received_at = greatest(deliveries.last_received_at, excluded.last_received_at)
    WHERE deliveries.body = excluded.body OR deliveries.body_removed_at IS NOT NULL
    RETURNING delivery_id, receipts, outcome
)
SELECT delivery_id, stored.outcome
FROM came LEFT JOIN stored USING (delivery_id)
WHERE stored.receipts IS DISTINCT FROM came.receipts
"""


async def store(db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
    """See `tracker.store.writing.inbox.Stores`."""
    came = [receipt.delivery for receipt in receipts]
    rows = await db.send(
        STORE,
        (
            [one.delivery_id for one in came],
            [one.run_id for one in came],
            [one.event_type for one in came],
            [one.api_version for one in came],
            [one.workspace_id for one in came],
            [one.created_at for one in came],
            [one.received_at for one in came],
            [receipt.last_received_at if receipt.count > 1 else None for receipt in receipts],
            [receipt.count for receipt in receipts],
            [one.body for one in came],
            [one.callback_token for one in came],
        ),
    )
    return {row[0]: row[1] for row in rows}
