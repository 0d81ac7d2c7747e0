"""The statements that write runs and deliveries, as far as both databases share them.

A write batch and a group of deliveries take a fixed number of statements, however large they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Integer,
    Update,
    bindparam,
    case,
    delete,
    exists,
    func,
    null,
    or_,
    select,
    update,
)

from tracker.core.observation import Source
from tracker.core.record import Delivery, Record
from tracker.core.rollup import RollupKey
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries.deliveries import IS_UNSEEN
from tracker.store.rows import RUN_COLUMNS, records
from tracker.store.schema import deliveries, is_any_of, run_events, run_outputs, runs, starts, word
from tracker.store.writing import retention, rollups

EVENT_COLUMNS: Final = ("run_id", "at", "source", "status", "progress", "detail")
OUTBOX_COLUMNS: Final = ("event_id", "event", "run_id", "at")
OUTPUT_COLUMNS: Final = ("run_id", "position", "output_id", "type", "url")
ROLLUP_COLUMNS: Final = (*RollupKey._fields, "runs", "amount")
STARTED_COLUMNS: Final = ("workspace", "key", "run", "shown", "others")
Rows = list[tuple[Any, ...]]


@dataclass(slots=True)
class BatchChanges:
    """What a write batch changes, in rows sorted by key."""

    records: list[Record] = field(default_factory=list)
    """New and changed records."""
    existing: list[str] = field(default_factory=list)
    """Their runs that have a row already."""
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


@dataclass(slots=True)
class Receipt:
    """A delivery, with the positions at which a group of deliveries holds it."""

    delivery: Delivery
    last_received_at: datetime
    positions: list[int]


DELIVERY_COLUMNS: Final = (
    *("delivery_id", "run_id", "event_type", "api_version", "workspace_id", "created_at"),
    *("received_at", "last_received_at", "receipts", "callback_token", "outcome"),
)
"""The columns of a new delivery beside its body."""


def new_delivery(receipt: Receipt) -> dict[str, Any]:
    """The values of `DELIVERY_COLUMNS`, in their order."""
    one = receipt.delivery
    return {
        "delivery_id": one.delivery_id,
        "run_id": one.run_id,
        "event_type": one.event_type,
        "api_version": one.api_version,
        "workspace_id": one.workspace_id,
        "created_at": one.created_at,
        "received_at": one.received_at,
        "last_received_at": receipt.last_received_at,
        "receipts": len(receipt.positions),
        "callback_token": one.callback_token,
        "outcome": "waiting",
    }


class Statements(ABC):
    """The statements, of which two depend on the kind of database."""

    def lock_runs(self, connection: Connection, run_ids: list[str]) -> dict[str, Record]:
        """The records of those of the runs that exist, locked until the commit."""
        rows = connection.execute(LOCK_RUNS, {"run_ids": run_ids}).all()
        return {record.run.run_id: record for record in records(connection, rows)}

    @abstractmethod
    def write(self, connection: Connection, changes: BatchChanges) -> None:
        """Write all changes. Raises `WriteConflict` if another process has added a new run."""

    @abstractmethod
    async def store(self, db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
        """Store deliveries, or count their receipts where they are stored already, in one commit.

        They are sorted by id, each id once. Returns the outcome of those that were stored before;
        `None` for an id under which another body is stored.
        """

    def take_waiting(
        self, connection: Connection, limit: int, held_up: Sequence[str]
    ) -> tuple[list[Delivery], int]:
        """The oldest waiting deliveries without those `held_up`, locked until the commit.

        Also returns how many rows were found: large ones may be left for the next time. Rows that
        another process has locked are skipped.
        """
        values = {"most": limit, "held_up": held_up}
        rows = connection.execute(SELECT_WAITING, values).all()
        large = [row.delivery_id for row in rows if row.body is None][:MAX_LARGE]
        bodies: dict[str, bytes] = {}
        if large:
            whole = select(deliveries.c.delivery_id, deliveries.c.body)
            found = connection.execute(whole.where(deliveries.c.delivery_id.in_(large)))
            bodies = dict(found.all())
        taken = []
        for key, received_at, run_id, kind, workspace_id, token, small in map(tuple, rows):
            if (body := bodies.get(key) if small is None else small) is not None:
                one = Delivery(
                    delivery_id=key,
                    received_at=received_at,
                    body=body,
                    run_id=run_id,
                    event_type=kind,
                    workspace_id=workspace_id,
                    callback_token=token,
                )
                taken.append(one)
        return taken, len(rows)

    def finish(
        self,
        connection: Connection,
        applied: Sequence[str],
        quarantined: Sequence[tuple[str, str]],
        at: datetime,
    ) -> None:
        """Mark deliveries as applied at that time, and others as quarantined, with the reason."""
        if applied:
            connection.execute(UPDATE_APPLIED, {"delivery_ids": applied, "at": at})
        if quarantined:
            quarantine(connection, quarantined)


def statements_for(db: Database) -> Statements:
    """The statements for this database; only its own dialect is loaded."""
    if db.dialect == "sqlite":
        from tracker.store.writing.statements_sqlite import SqliteStatements  # noqa: PLC0415

        return SqliteStatements()
    from tracker.store.writing.statements_postgres import PostgresStatements  # noqa: PLC0415

    return PostgresStatements(db.origin)


_APPLIED_COLUMNS: Final = (
    *("delivery_id", "received_at", "run_id", "event_type", "workspace_id", "callback_token"),
)
"""What applying a delivery needs of its row, beside the body."""
SMALL_BODY: Final = 16 * 1024
MAX_LARGE: Final = 32
"""Bytes that nearly every body has at most, and how many larger ones are applied together: at 256
KiB each, they take at most eight megabytes of memory."""
_SMALL_BODY: Final = case((func.length(deliveries.c.body) <= SMALL_BODY, deliveries.c.body))
LOCK_RUNS: Final = (
    select(*RUN_COLUMNS)
    .where(is_any_of(runs.c.run_id, "run_ids"))
    .order_by(runs.c.run_id)
    .with_for_update(key_share=True)
)
DELETE_OUTPUTS: Final = delete(run_outputs).where(is_any_of(run_outputs.c.run_id, "run_ids"))
SELECT_WAITING: Final = (
    select(*(deliveries.c[name] for name in _APPLIED_COLUMNS), _SMALL_BODY.label("body"))
    .where(deliveries.c.outcome == word("waiting"))
    .where(~is_any_of(deliveries.c.delivery_id, "held_up"))
    .order_by(deliveries.c.received_at, deliveries.c.delivery_id)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)
UPDATE_APPLIED: Final = (
    update(deliveries)
    .where(is_any_of(deliveries.c.delivery_id, "delivery_ids"))
    .values(outcome=word("applied"), reason=null(), applied_at=bindparam("at"))
)


def close_starts(workspace: Any, key: Any, run: Any, shown: Any, others: Any) -> Update:
    """Starts that became runs, with the values of `STARTED_COLUMNS`: each keeps its first run, and
    no longer reserves the runs that appeared."""
    is_started = starts.c.state == "started"
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
            reserved_runs=starts.c.reserved_runs - case((is_started, shown), else_=others),
            error=null(),
            request_body=null(),
            lease_until=null(),
            lease_holder=null(),
        )
    )


_QUARANTINE: Final = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("quarantined"))
    .where(deliveries.c.outcome == word("waiting"))
    .values(
        outcome="quarantined",
        reason=bindparam("because", type_=deliveries.c.reason.type),
        acknowledged_at=null(),
    )
)


def quarantine(connection: Connection, reasons: Sequence[tuple[str, str]]) -> None:
    """Quarantine waiting deliveries, one at least, by id, each with its reason."""
    rows = [{"quarantined": key, "because": reason} for key, reason in reasons]
    connection.execute(_QUARANTINE, rows)


_PARSED: Final = {
    name: deliveries.c[name]
    for name in ("run_id", "event_type", "api_version", "workspace_id", "created_at")
}
"""What a newer version, or other settings, may read differently from the same body."""
_REQUEUE: Final = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("requeued"))
    .where(deliveries.c.outcome == word("quarantined"))
    .values(
        outcome="waiting",
        reason=null(),
        **{name: bindparam(f"as_{name}", type_=column.type) for name, column in _PARSED.items()},
    )
)


def requeue(connection: Connection, delivery: Delivery) -> bool:
    """Let a quarantined delivery wait again, as it is parsed now; whether it was quarantined."""
    parsed = {f"as_{name}": getattr(delivery, name) for name in _PARSED}
    if not connection.execute(_REQUEUE, {"requeued": delivery.delivery_id, **parsed}).rowcount:
        return False
    # Once applied, its body is to be removed, though retention may have passed its time already.
    retention.step_back(connection, "bodies", delivery.received_at)
    return True


def acknowledge(connection: Connection, delivery_ids: Sequence[str], at: datetime) -> list[str]:
    """Mark quarantined deliveries as seen; returns the ids of those that were not yet."""
    new = (
        select(deliveries.c.delivery_id)
        .where(deliveries.c.delivery_id.in_(delivery_ids))
        .where(IS_UNSEEN)
        .order_by(deliveries.c.delivery_id)
        .with_for_update()
    )
    found = list(connection.execute(new).scalars())
    if found:
        marked = update(deliveries).where(deliveries.c.delivery_id.in_(found))
        connection.execute(marked.values(acknowledged_at=at))
    return found


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
    statements = statements_for(db)

    def work(connection: Connection) -> Record | None:
        record = statements.lock_runs(connection, [run_id]).get(run_id)
        if record is None:
            return None
        mine = run_events.c.run_id == run_id
        shown = exists().where(mine, run_events.c.source != Source.TRACK.value)
        if not (force or record.lost) and connection.execute(select(shown)).scalar():
            raise ShownByFlora
        rollups.remove(connection, record)
        connection.execute(delete(runs).where(runs.c.run_id == run_id))
        audit.note(connection, entry)
        return record

    return await db.write(work)


def requeue_runs(connection: Connection, run_ids: Sequence[str]) -> bool:
    """Let the quarantined deliveries of these runs wait again; whether there were any."""
    statement = (
        update(deliveries)
        .where(deliveries.c.run_id.in_(run_ids), deliveries.c.outcome == word("quarantined"))
        .values(outcome="waiting", reason=null())
        .returning(deliveries.c.received_at)
    )
    received = connection.execute(statement).scalars().all()
    if received:
        retention.step_back(connection, "bodies", min(received))
    return bool(received)
