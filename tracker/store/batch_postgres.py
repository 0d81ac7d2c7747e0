"""A batch's statements for PostgreSQL.

Rows travel as one array for each column and become rows again by `unnest`. So the text of a
statement does not depend on how many rows there are, it is planned once for each connection, and a
batch is a handful of round trips. Rows come sorted by key, so that no two processes deadlock.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    Connection,
    DateTime,
    Numeric,
    Text,
    any_,
    bindparam,
    column,
    delete,
    func,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import TypeEngine

from tracker.core.record import Record
from tracker.store.batch import DELIVERY_COLUMNS, EVENT_COLUMNS, OUTPUT_COLUMNS, Changes, Rows
from tracker.store.faults import WriteConflict
from tracker.store.notices import due_notice, run_notices
from tracker.store.rows import (
    RUN_COLUMNS,
    ids_with_outputs,
    outputs_by_run,
    run_row,
    with_outputs,
)
from tracker.store.tables import deliveries, run_events, run_outputs, runs, starts
from tracker.store.types import CleanText, Json, Money, UtcDateTime

Typed = tuple[tuple[str, TypeEngine[Any]], ...]


def _plain(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """The type under ours: entries are cleaned before they are merged, so arrays need no more."""
    match kind:
        case CleanText():
            return Text()
        case UtcDateTime():
            return DateTime(timezone=True)
        case Money():
            return Numeric()
    return JSONB(none_as_null=True) if kind is Json else kind


def _typed(columns: Iterable[Any]) -> Typed:
    return tuple((each.name, _plain(each.type)) for each in columns)


def _incoming(name: str, columns: Typed) -> TableValuedAlias:
    """The rows given as arrays called `NAME_COLUMN`; `n` counts them from 1."""
    # One dimension, said out loud: else a JSON list would be taken for a further one.
    arrays = [
        bindparam(f"{name}_{each}", type_=ARRAY(kind, dimensions=1)) for each, kind in columns
    ]
    return (
        func.unnest(*arrays)
        .table_valued(*(column(each, kind) for each, kind in columns), with_ordinality="n")
        .render_derived(name=name)
    )


def _arrays(name: str, columns: Typed, rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """The parameters of `_incoming`."""
    if not rows:
        return {f"{name}_{each}": [] for each, _ in columns}
    turned = zip(*rows, strict=True)
    return {
        f"{name}_{each}": list(values) for (each, _), values in zip(columns, turned, strict=True)
    }


def _is_any_of(of: Any, parameter: str) -> Any:
    return of == any_(bindparam(parameter, type_=ARRAY(Text(), dimensions=1)))


_DELIVERIES: Final = _typed(DELIVERY_COLUMNS)
_RUNS: Final = _typed(RUN_COLUMNS)
_EVENTS: Final = _typed(run_events.c[name] for name in EVENT_COLUMNS)
_OUTPUTS: Final = _typed(run_outputs.c[name] for name in OUTPUT_COLUMNS)
_STARTED: Final[Typed] = (("slot", Text()), ("key", Text()), ("run_id", Text()))
_NOTICES: Final[Typed] = (("channel", Text()), ("payload", Text()))


def _count_deliveries() -> Any:
    came = _incoming("came", _DELIVERIES)
    names = [name for name, _ in _DELIVERIES]
    upsert = insert(deliveries).from_select(names, select(*(came.c[name] for name in names)))
    return upsert.on_conflict_do_update(
        index_elements=[deliveries.c.delivery_id],
        set_={
            "receipts": deliveries.c.receipts + upsert.excluded.receipts,
            "last_received_at": func.greatest(
                deliveries.c.last_received_at, upsert.excluded.last_received_at
            ),
        },
    ).returning(deliveries.c.delivery_id, deliveries.c.receipts)


def _write() -> Any:
    """Runs, their events and the notices in one statement; answers how many runs were written."""
    new = _incoming("new", _RUNS)
    names = [name for name, _ in _RUNS]
    upsert = insert(runs).from_select(names, select(*(new.c[name] for name in names)))
    written = (
        upsert.on_conflict_do_update(
            index_elements=[runs.c.run_id],
            set_={name: upsert.excluded[name] for name in names if name != "run_id"},
            # A run that was new to us and is there now was not merged with what it says.
            where=_is_any_of(runs.c.run_id, "known"),
        )
        .returning(runs.c.run_id)
        .cte("written")
    )
    seen = _incoming("seen", _EVENTS)
    kept = (
        insert(run_events)
        .from_select(EVENT_COLUMNS, select(*(seen.c[name] for name in EVENT_COLUMNS)).order_by("n"))
        .cte("kept")
    )
    notice = _incoming("notice", _NOTICES)
    notified = select(func.count(func.pg_notify(notice.c.channel, notice.c.payload)))
    return select(
        select(func.count()).select_from(written).scalar_subquery(), notified.scalar_subquery()
    ).add_cte(kept)


def _keep_outputs() -> Any:
    made = _incoming("made", _OUTPUTS)
    return insert(run_outputs).from_select(
        OUTPUT_COLUMNS, select(*(made.c[name] for name in OUTPUT_COLUMNS))
    )


def _close_starts() -> Any:
    started = _incoming("started", _STARTED)
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


class PostgresStatements:
    """See `tracker.store.batch.Statements`. `origin` signs the notices."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def count_deliveries(self, connection: Connection, rows: Rows) -> dict[str, int]:
        """One upsert."""
        answer = connection.execute(COUNT_DELIVERIES, _arrays("came", _DELIVERIES, rows))
        return dict(answer.all())

    def lock_runs(self, connection: Connection, run_ids: list[str]) -> dict[str, Record]:
        """One select for update, and one for the outputs where there are any."""
        rows = connection.execute(LOCK_RUNS, {"run_ids": run_ids}).all()
        made = ids_with_outputs(rows)
        outputs = outputs_by_run(connection.execute(OUTPUTS, {"run_ids": made})) if made else {}
        return {record.run.run_id: record for record in with_outputs(rows, outputs)}

    def write(self, connection: Connection, changes: Changes) -> None:
        """One statement, and up to three more where outputs or starts are among the changes."""
        notices = run_notices(self._origin, changes.news)
        if changes.due:
            notices.append(due_notice(self._origin))
        written = connection.execute(
            WRITE,
            {
                "known": changes.known,
                **_arrays("new", _RUNS, [run_row(record) for record in changes.records]),
                **_arrays("seen", _EVENTS, changes.events),
                **_arrays("notice", _NOTICES, notices),
            },
        ).scalar_one()
        if written < len(changes.records):
            raise WriteConflict
        if changes.outputs_gone:
            connection.execute(DROP_OUTPUTS, {"run_ids": changes.outputs_gone})
        if changes.outputs:
            connection.execute(KEEP_OUTPUTS, _arrays("made", _OUTPUTS, changes.outputs))
        if changes.started:
            connection.execute(CLOSE_STARTS, _arrays("started", _STARTED, changes.started))
