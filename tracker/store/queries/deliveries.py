"""Callbacks as they were received: stored, taken to be applied, finished, and shown.

One that is waiting becomes applied or quarantined; a quarantined one can wait again, or be
acknowledged.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

import orjson
from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Row,
    and_,
    bindparam,
    case,
    func,
    null,
    select,
    update,
)

from tracker.core.record import Delivery, DeliveryOutcome
from tracker.core.run import known
from tracker.store.engine import Database, dump_json
from tracker.store.errors import StoreRefused
from tracker.store.queries.paging import between, matching, newest_first
from tracker.store.schema import UtcDateTime, deliveries, is_any_of, retention, word
from tracker.store.sqlite import driver_execute
from tracker.store.writing.statements import RowInsert, Rows

# Storing.


@dataclass(slots=True)
class Receipt:
    """A delivery, with the positions at which a group of deliveries holds it."""

    delivery: Delivery
    last_received_at: datetime
    positions: list[int]


_COLUMNS: Final = (
    *("delivery_id", "run_id", "event_type", "api_version", "workspace_id", "created_at"),
    *("received_at", "last_received_at", "receipts", "callback_token", "outcome"),
)
"""The columns of a new delivery beside its body."""


def _values(receipt: Receipt) -> dict[str, Any]:
    """The values of `_COLUMNS`, in their order."""
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


async def store_deliveries(db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
    """Store deliveries, or count their receipts where they are stored already, in one commit.

    They are sorted by id, each id once. Returns the outcome of those that were stored before;
    `None` for an id under which another body is stored.
    """
    if db.dialect == "postgresql":
        incoming = orjson.dumps([*map(_values, receipts)]).decode()
        bodies = [receipt.delivery.body for receipt in receipts]
        return {row[0]: row[1] for row in await db.send(STORE, (incoming, bodies))}
    whole = [*_INSERT.statements(_rows(receipts))]
    if len(whole) == 1:
        with suppress(StoreRefused):  # nothing is stored: perhaps one of them was before
            await db.send(*whole[0])
            return {}
    return await db.write(partial(_store, receipts))


def _rows(receipts: Sequence[Receipt]) -> Rows:
    return [(*_values(one).values(), one.delivery.body) for one in receipts]


# One statement, which is a transaction by itself, goes to the driver directly: see `Database.send`.
# Bodies are bytes, so they travel beside the JSON. A body that retention has removed cannot be
# compared: what comes under its id counts as a repetition. Of new deliveries, which are nearly all,
# nothing is sent back.
_TYPES: Final = {UtcDateTime: "timestamptz", Integer: "integer"}
_TYPED: Final = ", ".join(
    f"{name} {_TYPES.get(type(deliveries.c[name].type), 'text')}" for name in _COLUMNS
)
_DELIVERY: Final = ", ".join(_COLUMNS)
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

_INSERT: Final = RowInsert(deliveries, (*_COLUMNS, "body"))
_SELECT_STORED: Final = """
SELECT delivery_id, outcome, body, body_removed_at IS NOT NULL
FROM deliveries
WHERE delivery_id IN (SELECT value FROM json_each(?))
"""
_COUNT_RECEIPTS: Final = (
    update(deliveries)
    .where(deliveries.c.delivery_id == bindparam("stored"))
    .values(
        receipts=deliveries.c.receipts + bindparam("more"),
        last_received_at=func.max(
            deliveries.c.last_received_at,
            bindparam("last", type_=deliveries.c.last_received_at.type),
        ),
    )
)


def _store(receipts: Sequence[Receipt], connection: Connection) -> dict[str, str | None]:
    keys = dump_json([receipt.delivery.delivery_id for receipt in receipts])
    before = {row[0]: row for row in driver_execute(connection)(_SELECT_STORED, (keys,))}
    outcomes: dict[str, str | None] = {}
    new: list[Receipt] = []
    repeated = []
    for receipt in receipts:
        one = receipt.delivery
        if (row := before.get(one.delivery_id)) is None:
            new.append(receipt)
            continue
        _, outcome, body, body_is_gone = row
        # A body that retention has removed cannot be compared: see the statement above.
        is_same = body == one.body or body_is_gone
        outcomes[one.delivery_id] = outcome if is_same else None
        if is_same:
            more, last = len(receipt.positions), receipt.last_received_at
            repeated.append({"stored": one.delivery_id, "more": more, "last": last})
    _INSERT(connection, _rows(new))
    if repeated:
        connection.execute(_COUNT_RECEIPTS, repeated)
    return outcomes


# Applying.

_APPLIED_COLUMNS: Final = (
    *("delivery_id", "received_at", "run_id", "event_type", "workspace_id", "callback_token"),
)
"""What applying a delivery needs of its row, beside the body."""
SMALL_BODY: Final = 16 * 1024
MAX_LARGE: Final = 32
"""Bytes that nearly every body has at most, and how many larger ones are applied together: at 256
KiB each, they take at most eight megabytes of memory."""
_SMALL_BODY: Final = case((func.length(deliveries.c.body) <= SMALL_BODY, deliveries.c.body))
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


def take_waiting(
    connection: Connection, limit: int, held_up: Sequence[str]
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
    _remove_bodies_again(connection, delivery.received_at)
    return True


def _remove_bodies_again(connection: Connection, since: datetime) -> None:
    """Let retention go back to that time: bodies as old are removed once they are applied."""
    beyond = (retention.c.what == "bodies", retention.c.through > since)
    connection.execute(update(retention).where(*beyond).values(through=since))


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
        _remove_bodies_again(connection, min(received))
    return bool(received)


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


# Showing.


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRow:
    """A stored callback. `body` is read only for a single delivery; retention may have removed
    it."""

    delivery_id: str
    run_id: str | None
    event_type: str | None
    api_version: str | None
    workspace_id: str | None
    created_at: datetime | None
    received_at: datetime
    last_received_at: datetime
    receipts: int
    outcome: DeliveryOutcome | str
    reason: str | None
    applied_at: datetime | None = None
    body_removed_at: datetime | None = None
    acknowledged_at: datetime | None = None
    body: bytes | None = None


async def list_deliveries(
    db: Database,
    *,
    outcome: str | None = None,
    run_id: str | None = None,
    workspace_id: str | None = None,
    since: datetime | None = None,
    acknowledged: bool | None = None,
    cause: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> tuple[list[DeliveryRow], str | None]:
    """A page of callbacks without their bodies, newest first, and the cursor of the next page.

    `since` is when they were first received, `cause` that of `causes`.

    Raises `InvalidRequest` for an invalid cursor.
    """
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    columns = (column for column in deliveries.c if column.name != "body")
    of = matching(deliveries, run_id=run_id, workspace_id=workspace_id)
    statement = select(*columns).where(*of, *between(deliveries.c.received_at, since))
    if outcome is not None:  # `word`: matches the partial index
        statement = statement.where(deliveries.c.outcome == word(DeliveryOutcome(outcome).value))
    if acknowledged is not None:
        statement = statement.where(deliveries.c.acknowledged_at.is_not(None) == acknowledged)
    if cause is not None:
        statement = statement.where(has_cause(cause))
    async with db.read() as connection:
        rows, following = await newest_first(connection, statement, key, cursor=cursor, limit=limit)
    return [_delivery(row) for row in rows], following


async def get_delivery(db: Database, delivery_id: str) -> DeliveryRow | None:
    """The delivery with its body, if known."""
    found = await db.fetchrow(select(deliveries).where(deliveries.c.delivery_id == delivery_id))
    return None if found is None else _delivery(found)


def _delivery(row: Row[Any]) -> DeliveryRow:
    values = row._asdict()
    del values["callback_token"]  # a secret: it authenticates callbacks of the start
    if row.body_removed_at is not None:
        values["body"] = None  # emptied by retention
    return DeliveryRow(**values | {"outcome": known(DeliveryOutcome, values["outcome"])})


# Queries of quarantined deliveries: the causes, and which deliveries have one of them.

IS_UNSEEN: Final = and_(
    deliveries.c.outcome == word("quarantined"), deliveries.c.acknowledged_at.is_(None)
)
"""The delivery is quarantined, and nobody has acknowledged it."""
AMONG: Final = 10_000
"""The newest unseen deliveries, which are grouped."""
CAUSE_LENGTH: Final = 200
"""Characters of a reason by which deliveries are grouped."""
_CAUSE: Final = func.trim(func.substr(func.coalesce(deliveries.c.reason, ""), 1, CAUSE_LENGTH))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Unseen deliveries with one reason: how many, and when the first and the last came."""

    text: str
    count: int
    first_at: datetime
    last_at: datetime


def has_cause(text: str) -> ColumnElement[bool]:
    """The reason of the delivery begins with this text of a `Cause`."""
    return _CAUSE.is_not_distinct_from(text)


async def causes(db: Database, *, limit: int) -> list[Cause]:
    """The causes of the newest `AMONG` unseen deliveries, the most frequent first."""
    newest = (
        select(_CAUSE.label("text"), deliveries.c.received_at)
        .where(IS_UNSEEN)
        .order_by(deliveries.c.received_at.desc())
        .limit(AMONG)
        .subquery()
    )
    count, at = func.count().label("count"), newest.c.received_at
    statement = (
        select(newest.c.text, count, func.min(at).label("first_at"), func.max(at).label("last_at"))
        .group_by(newest.c.text)
        .order_by(count.desc(), newest.c.text)
        .limit(limit)
    )
    return [Cause(**row._asdict()) for row in await db.fetch(statement)]


async def unseen_deliveries(db: Database, *, cause: str, until: datetime, limit: int) -> list[str]:
    """The ids of unseen deliveries with this cause that were received until then, oldest first."""
    statement = select(deliveries.c.delivery_id).where(
        IS_UNSEEN, has_cause(cause), deliveries.c.received_at <= until
    )
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    return await db.fetchcol(statement.order_by(*key).limit(limit))
