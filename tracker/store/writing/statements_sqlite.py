"""A batch's statements for SQLite, whose single writer has the whole file locked while it runs.

Each statement takes all rows of its kind at once, in the driver's own loop and in SQLite's own
form: SQLAlchemy makes the text once and is then out of the way. Lists of keys travel as one JSON
text, so that the statements' text does not depend on how many there are.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any, Final

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Text,
    bindparam,
    case,
    delete,
    func,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import dialect, insert

from tracker.core.record import Delivery, Record
from tracker.store.engine import Database
from tracker.store.rows import RUN_COLUMNS, ids_with_outputs, outputs_by_run, run_row, with_outputs
from tracker.store.schema import (
    Money,
    UtcDateTime,
    deliveries,
    run_events,
    run_outputs,
    run_tally_changes,
    runs,
    starts,
)
from tracker.store.text import dump_json
from tracker.store.writing.delivery_rows import deliveries_of, quarantine, waiting_first
from tracker.store.writing.inbox import Receipt
from tracker.store.writing.writer import EVENT_COLUMNS, OUTPUT_COLUMNS, TALLY_COLUMNS, Changes, Rows

_RUNS: Final = tuple(column.name for column in RUN_COLUMNS)


def is_any_of(of: Any, parameter: str) -> Any:
    """Whether it is among the texts that this parameter lists, as JSON."""
    listed = func.json_each(bindparam(parameter, type_=Text())).table_valued("value")
    return of.in_(select(listed.c.value))


class Insert:
    """An insert of any number of rows, in few steps.

    At the end of each step the driver asks for Python's lock again, for which it may wait as long
    as others of this process compute. So rows go by the dozen, not one by one; as there are only
    a few sizes, each is prepared once.
    """

    def __init__(self, statement: Any, columns: Sequence[str]) -> None:
        one = str(statement.compile(dialect=dialect(paramstyle="qmark"), column_keys=columns))
        row = f"({', '.join('?' * len(columns))})"
        self._texts = {size: one.replace(row, ", ".join([row] * size)) for size in _SIZES}

    def __call__(self, connection: Connection, rows: Rows) -> None:
        done = 0
        for size, text in self._texts.items():
            while len(rows) - done >= size:
                values = tuple(chain.from_iterable(rows[done : done + size]))
                connection.exec_driver_sql(text, values)
                done += size


_SIZES: Final = (64, 16, 4, 1)
"""How many rows go together: as many as will, of these, down to each alone."""


def _write_runs() -> Insert:
    upsert = insert(runs)
    changed = {name: upsert.excluded[name] for name in _RUNS if name != "run_id"}
    return Insert(upsert.on_conflict_do_update(index_elements=[runs.c.run_id], set_=changed), _RUNS)


RUNS: Final = select(*RUN_COLUMNS).where(is_any_of(runs.c.run_id, "run_ids"))
OUTPUTS: Final = (
    select(*(run_outputs.c[name] for name in ("run_id", "output_id", "type", "url")))
    .where(is_any_of(run_outputs.c.run_id, "run_ids"))
    .order_by(run_outputs.c.run_id, run_outputs.c.position)
)
WRITE_RUNS: Final = _write_runs()
KEEP_EVENTS: Final = Insert(insert(run_events), EVENT_COLUMNS)
KEEP_TALLIES: Final = Insert(insert(run_tally_changes), TALLY_COLUMNS)
DROP_OUTPUTS: Final = delete(run_outputs).where(is_any_of(run_outputs.c.run_id, "run_ids"))
KEEP_OUTPUTS: Final = Insert(insert(run_outputs), OUTPUT_COLUMNS)
CLOSE_STARTS: Final = (
    starts.update()
    .where(
        starts.c.workspace_slot == bindparam("slot"),
        starts.c.idempotency_key == bindparam("key"),
        or_(starts.c.state != "started", bindparam("shown") > 0),
    )
    .values(
        state="started",
        run_id=func.coalesce(starts.c.run_id, bindparam("run")),
        reserved_runs=starts.c.reserved_runs
        - case((starts.c.state == "started", bindparam("shown")), else_=bindparam("others")),
        error=None,
        request_body=None,
        lease_until=None,
        lease_holder=None,
    )
)

TAKE_WAITING: Final = waiting_first().where(~is_any_of(deliveries.c.delivery_id, "held_up"))
APPLIED: Final = (
    update(deliveries)
    .where(is_any_of(deliveries.c.delivery_id, "delivery_ids"))
    .values(outcome="applied", reason=null(), applied_at=bindparam("at"))
)


def _moment(value: datetime) -> str:
    """As `UtcDateTime` has it on SQLite."""
    if value.tzinfo is not UTC:
        value = value.astimezone(UTC)
    return value.isoformat(" ", "microseconds")[:-6]  # without its +00:00


_FORMS: Final[dict[type, Callable[[Any], Any]]] = {
    UtcDateTime: _moment,
    Money: float,
    JSON: dump_json,
}
"""How SQLite holds what it has no type for: the same as `tracker.store.schema` says."""


def plain_rows(columns: Iterable[Column[Any]]) -> Callable[[Rows], Rows]:
    """What makes rows of these columns such as the driver takes them."""
    forms = [
        (position, form)
        for position, column in enumerate(columns)
        if (form := _FORMS.get(type(column.type))) is not None
    ]

    def plain(rows: Rows) -> Rows:
        made: Rows = []
        moments: dict[datetime, str] = {}  # most of a run's are one and the same
        for row in rows:
            values = list(row)
            for position, form in forms:
                value = values[position]
                if value is None:
                    continue
                if form is not _moment:
                    values[position] = form(value)
                elif (text := moments.get(value)) is not None:
                    values[position] = text
                else:
                    values[position] = moments[value] = _moment(value)
            made.append(tuple(values))
        return made

    return plain


_plain_runs: Final = plain_rows(RUN_COLUMNS)
_plain_events: Final = plain_rows(run_events.c[name] for name in EVENT_COLUMNS)
_plain_tallies: Final = plain_rows(run_tally_changes.c[name] for name in TALLY_COLUMNS)


class SqliteStatements:
    """See `tracker.store.writing.writer.Statements`."""

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
        if changes.records:
            rows = [run_row(record) for record in changes.records]
            WRITE_RUNS(connection, _plain_runs(rows))
        if changes.events:
            KEEP_EVENTS(connection, _plain_events(changes.events))
        if changes.tallies:
            KEEP_TALLIES(connection, _plain_tallies(changes.tallies))
        if changes.outputs_gone:
            connection.execute(DROP_OUTPUTS, {"run_ids": dump_json(changes.outputs_gone)})
        if changes.outputs:
            KEEP_OUTPUTS(connection, changes.outputs)
        if changes.started:
            names = ("slot", "key", "run", "shown", "others")
            connection.execute(
                CLOSE_STARTS, [dict(zip(names, row, strict=True)) for row in changes.started]
            )

    def take_waiting(
        self, connection: Connection, limit: int, held_up: Sequence[str]
    ) -> tuple[list[Delivery], int]:
        """Plain reads: the transaction has the file to itself."""
        values = {"most": limit, "held_up": dump_json(held_up)}
        rows = connection.execute(TAKE_WAITING, values).all()
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
            connection.execute(APPLIED, {"delivery_ids": dump_json(applied), "at": at})
        quarantine(connection, quarantined)


# Storing a group of deliveries on SQLite: one transaction, in which nobody can come in between.


_NAMES: Final = [
    *("delivery_id", "run_id", "event_type", "api_version", "workspace_id", "created_at"),
    *("received_at", "last_received_at", "receipts", "outcome", "body"),
    "callback_token",
]
KNOWN: Final = select(
    *[deliveries.c[name] for name in ("delivery_id", "outcome", "body")],
    deliveries.c.body_removed_at.is_not(None),
).where(is_any_of(deliveries.c.delivery_id, "delivery_ids"))
STORE: Final = Insert(insert(deliveries), _NAMES)
COUNT: Final = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("known"))
    .values(
        receipts=deliveries.c.receipts + bindparam("more"),
        last_received_at=func.max(
            deliveries.c.last_received_at,
            bindparam("last", type_=deliveries.c.last_received_at.type),
        ),
    )
)
_plain: Final = plain_rows(deliveries.c[name] for name in _NAMES)


async def store(db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
    """See `tracker.store.writing.inbox.Stores`."""
    return await db.write(partial(_store, receipts))


def _store(receipts: Sequence[Receipt], connection: Connection) -> dict[str, str | None]:
    keys = dump_json([receipt.delivery.delivery_id for receipt in receipts])
    before = {row[0]: row for row in connection.execute(KNOWN, {"delivery_ids": keys})}
    known: dict[str, str | None] = {}
    new: list[tuple[Any, ...]] = []
    counted = []
    for receipt in receipts:
        one = receipt.delivery
        if (row := before.get(one.delivery_id)) is None:
            new.append(_row(receipt))
            continue
        _, outcome, body, body_is_gone = tuple(row)
        # A body that retention has removed cannot be compared: see the statement for PostgreSQL.
        is_same = body == one.body or body_is_gone
        known[one.delivery_id] = outcome if is_same else None
        if is_same:
            more = {"known": one.delivery_id, "more": receipt.count}
            counted.append(more | {"last": receipt.last_received_at})
    STORE(connection, _plain(new))
    if counted:
        connection.execute(COUNT, counted)
    return known


def _row(receipt: Receipt) -> tuple[Any, ...]:
    """The row of a new delivery, in the order of `_NAMES`."""
    one = receipt.delivery
    return (
        one.delivery_id,
        one.run_id,
        one.event_type,
        one.api_version,
        one.workspace_id,
        one.created_at,
        one.received_at,
        receipt.last_received_at,
        receipt.count,
        "waiting",
        one.body,
        one.callback_token,
    )
