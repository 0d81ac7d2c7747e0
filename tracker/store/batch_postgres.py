"""A batch's statements for PostgreSQL.

Rows travel as one JSON text and become rows again in the server, by `json_to_recordset`. So a
statement's text does not depend on how many rows there are, it is planned once for each connection,
a batch is a handful of round trips, and one text costs this process a third of what an array for
each column costs. Rows come sorted by key, so that no two processes deadlock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import orjson
from sqlalchemy import (
    ARRAY,
    JSON,
    Column,
    ColumnElement,
    Connection,
    Text,
    TypeDecorator,
    any_,
    bindparam,
    cast,
    column,
    delete,
    func,
    null,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import TypeEngine

from tracker.core.record import Record
from tracker.store.batch import (
    DELIVERY_COLUMNS,
    EVENT_COLUMNS,
    OUTPUT_COLUMNS,
    TALLY_COLUMNS,
    Changes,
    Rows,
)
from tracker.store.faults import WriteConflict
from tracker.store.notices import due_notice, run_notices
from tracker.store.rows import (
    RUN_COLUMNS,
    ids_with_outputs,
    outputs_by_run,
    run_row,
    with_outputs,
)
from tracker.store.tables import (
    deliveries,
    run_events,
    run_outputs,
    run_tally_changes,
    runs,
    starts,
)


def incoming(name: str, columns: Sequence[Column[Any]]) -> TableValuedAlias:
    """The rows that the parameter `name` holds as JSON, in order, with these columns' types."""
    return (
        func.json_to_recordset(cast(bindparam(name, type_=Text()), JSON))
        .table_valued(*(column(each.name, _plain(each.type)) for each in columns))
        .render_derived(name=name, with_types=True)
    )


def _plain(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """The type under ours, as PostgreSQL names it."""
    return kind.impl_instance if isinstance(kind, TypeDecorator) else kind


def is_any_of(of: Any, parameter: str) -> Any:
    """Whether it is among the texts that this parameter lists."""
    return of == any_(bindparam(parameter, type_=ARRAY(Text(), dimensions=1)))


# Plain strings: SQLAlchemy's names are of a class of their own, which no JSON key may be.
RUNS: Final = tuple(f"{each.name}" for each in RUN_COLUMNS)
DELIVERIES: Final = tuple(f"{each.name}" for each in DELIVERY_COLUMNS)
_STARTED: Final = ("slot", "key", "run_id")
_NOTICES: Final = ("channel", "payload")


def _count_deliveries() -> Any:
    came = incoming("came", DELIVERY_COLUMNS)
    upsert = insert(deliveries).from_select(DELIVERIES, select(*(came.c[n] for n in DELIVERIES)))
    return upsert.on_conflict_do_update(
        index_elements=[deliveries.c.delivery_id],
        set_={
            "receipts": deliveries.c.receipts + upsert.excluded.receipts,
            "last_received_at": func.greatest(
                deliveries.c.last_received_at, upsert.excluded.last_received_at
            ),
        },
    ).returning(deliveries.c.delivery_id, deliveries.c.receipts)


@dataclass(frozen=True, slots=True)
class Writing:
    """Runs, their events, what they count for and the notices, as parts of one statement: how many
    runs are `written`, how many notices are `sent`, and what is done `besides`."""

    written: Any
    sent: Any
    besides: tuple[Any, ...]

    @classmethod
    def of(cls, *conditions: Any, version: ColumnElement[Any] | None = None) -> "Writing":
        """Of what the parameters `after` (for the runs that are `known`), `new`, `seen`, `tally`
        and `notice` hold. A run that is new to us and is there all the same is left.

        Where there is a `version`, each row of `after` has one too, and a run that has another by
        now is left. No run is written before the `conditions` are known to hold.
        """
        columns = [*RUN_COLUMNS]
        if version is not None:
            columns.append(Column("version", version.type))
        after = incoming("after", columns)
        is_as_read = true() if version is None else version == after.c.version
        changed = (
            update(runs)
            # The ids once more, because only an array is looked up in the index however small the
            # table was when this was planned.
            .where(runs.c.run_id == after.c.run_id, is_any_of(runs.c.run_id, "known"))
            .where(is_as_read, *conditions)
            .values({name: after.c[name] for name in RUNS if name != "run_id"})
            .returning(runs.c.run_id)
            .cte("changed")
        )
        new = incoming("new", RUN_COLUMNS)
        added = (
            insert(runs)
            .from_select(RUNS, select(*(new.c[name] for name in RUNS)).where(*conditions))
            .on_conflict_do_nothing(index_elements=[runs.c.run_id])
            .returning(runs.c.run_id)
            .cte("added")
        )
        seen = incoming("seen", [run_events.c[name] for name in EVENT_COLUMNS])
        kept = (
            insert(run_events)
            .from_select(EVENT_COLUMNS, select(*(seen.c[name] for name in EVENT_COLUMNS)))
            .cte("kept")
        )
        tally = incoming("tally", [run_tally_changes.c[name] for name in TALLY_COLUMNS])
        counted = (
            insert(run_tally_changes)
            .from_select(TALLY_COLUMNS, select(*(tally.c[name] for name in TALLY_COLUMNS)))
            .cte("counted")
        )
        notice = incoming("notice", [Column(name, Text()) for name in _NOTICES])
        notified = select(func.count(func.pg_notify(notice.c.channel, notice.c.payload)))
        return cls(how_many(changed) + how_many(added), notified.scalar_subquery(), (kept, counted))


def how_many(part: Any) -> Any:
    """How many rows a part of a statement has."""
    return select(func.count()).select_from(part).scalar_subquery()


def writing_values(
    changes: Changes, origin: str, *, versions: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The parameters of a `Writing`; `versions` are those of the known runs."""
    notices = run_notices(origin, changes.news)
    if changes.due:
        notices.append(due_notice(origin))
    known = set(changes.known)
    rows: dict[bool, Rows] = {True: [], False: []}
    for record in changes.records:
        rows[record.run.run_id in known].append(run_row(record))
    names = RUNS
    if versions is not None:
        names = (*RUNS, "version")
        rows[True] = [(*row, versions[row[0]]) for row in rows[True]]
    return {
        "known": changes.known,
        "after": to_json(names, rows[True]),
        "new": to_json(RUNS, rows[False]),
        "seen": to_json(EVENT_COLUMNS, changes.events),
        "tally": to_json(TALLY_COLUMNS, changes.tallies),
        "notice": to_json(_NOTICES, notices),
    }


def _write() -> Any:
    """How many runs were written. It waits for no row: those of `known` runs are locked."""
    writing = Writing.of()
    return select(writing.written, writing.sent).add_cte(*writing.besides)


def _keep_outputs() -> Any:
    made = incoming("made", [run_outputs.c[name] for name in OUTPUT_COLUMNS])
    return insert(run_outputs).from_select(
        OUTPUT_COLUMNS, select(*(made.c[name] for name in OUTPUT_COLUMNS))
    )


def _close_starts() -> Any:
    started = incoming("started", [Column(name, Text()) for name in _STARTED])
    return (
        update(starts)
        .where(
            starts.c.workspace_slot == started.c.slot,
            starts.c.idempotency_key == started.c.key,
            starts.c.state != "started",
        )
        .values(
            state="started",
            run_id=started.c.run_id,
            error=null(),
            lease_until=null(),
            lease_holder=null(),
        )
    )


COUNT_DELIVERIES: Final = _count_deliveries()
LOCK_RUNS: Final = (
    select(*RUN_COLUMNS)
    .where(is_any_of(runs.c.run_id, "run_ids"))
    .order_by(runs.c.run_id)
    .with_for_update(key_share=True)
)
# A statement of its own, after the lock: one that also takes the lock would show outputs as they
# were when it began to wait.
OUTPUTS: Final = (
    select(*(run_outputs.c[name] for name in ("run_id", "output_id", "type", "url")))
    .where(is_any_of(run_outputs.c.run_id, "run_ids"))
    .order_by(run_outputs.c.run_id, run_outputs.c.position)
)
WRITE: Final = _write()
DROP_OUTPUTS: Final = delete(run_outputs).where(is_any_of(run_outputs.c.run_id, "run_ids"))
KEEP_OUTPUTS: Final = _keep_outputs()
CLOSE_STARTS: Final = _close_starts()


class PostgresStatements:
    """See `tracker.store.batch.Statements`. `origin` signs the notices."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def count_deliveries(self, connection: Connection, rows: Rows) -> dict[str, int]:
        """One upsert."""
        answer = connection.execute(COUNT_DELIVERIES, {"came": to_json(DELIVERIES, rows)})
        return dict(answer.all())

    def lock_runs(self, connection: Connection, run_ids: list[str]) -> dict[str, Record]:
        """One select for update, and one for the outputs where there are any."""
        rows = connection.execute(LOCK_RUNS, {"run_ids": run_ids}).all()
        made = ids_with_outputs(rows)
        outputs = outputs_by_run(connection.execute(OUTPUTS, {"run_ids": made})) if made else {}
        return {record.run.run_id: record for record in with_outputs(rows, outputs)}

    def write(self, connection: Connection, changes: Changes) -> None:
        """One statement, and up to three more where outputs or starts are among the changes."""
        written = connection.execute(WRITE, writing_values(changes, self._origin)).scalar_one()
        if written < len(changes.records):
            raise WriteConflict
        if changes.outputs_gone:
            connection.execute(DROP_OUTPUTS, {"run_ids": changes.outputs_gone})
        if changes.outputs:
            connection.execute(KEEP_OUTPUTS, {"made": to_json(OUTPUT_COLUMNS, changes.outputs)})
        if changes.started:
            connection.execute(CLOSE_STARTS, {"started": to_json(_STARTED, changes.started)})


def to_json(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    """Rows as one JSON text for `incoming`; what is not there is null."""
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
