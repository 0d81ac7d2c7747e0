"""The ledger of starts: what was asked for, under which key, and what came of it.

A start's states::

    stored       the key is kept, nothing has left; leaves by SENT, or by REFUSED if it never will
    sent         a request has left, and nobody knows more; leaves by every other state but STORED
    started      it became a run, which the row names; the door sets it, together with the run
    refused      nothing was started, and FLORA does not hold the key; leaves by SENT, sent anew
    unresolved   nobody can tell; leaves by STARTED where the run is found, by SENT where it is
                 asked for again while FLORA surely knows the key

One process at a time sends a key: it holds the row's lease, and only the holder writes the state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, case, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from tracker.core.observation import Source
from tracker.store.engine import Database
from tracker.store.tables import runs, starts, word


class StartState(StrEnum):
    """See the module."""

    STORED = "stored"
    SENT = "sent"
    STARTED = "started"
    REFUSED = "refused"
    UNRESOLVED = "unresolved"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRow:
    """One start. `error` is FLORA's refusal: status, code, message and fields."""

    workspace_slot: str
    idempotency_key: str
    technique_id: str
    fingerprint: str
    inputs: list[dict[str, Any]]
    state: StartState
    created_at: datetime
    in_use_since: datetime | None = None
    callback_url: str | None = None
    sent_at: datetime | None = None
    run_id: str | None = None
    error: dict[str, Any] | None = None
    lease_until: datetime | None = None
    lease_holder: str | None = None


async def reserve(
    db: Database,
    *,
    workspace_slot: str,
    idempotency_key: str,
    technique_id: str,
    fingerprint: str,
    inputs: list[dict[str, Any]],
    at: datetime,
) -> StartRow:
    """Keep the key, once: the row as it now is.

    A row that was there stays as it is; whether it is the same request, the caller compares.
    """
    insert: Any = postgresql.insert if db.dialect == "postgresql" else sqlite.insert
    new = insert(starts).values(
        workspace_slot=workspace_slot,
        idempotency_key=idempotency_key,
        technique_id=technique_id,
        fingerprint=fingerprint,
        inputs=inputs,
        state=StartState.STORED.value,
        created_at=at,
    )
    statement = new.on_conflict_do_nothing().returning(*starts.c)
    existing = select(starts).where(_is(workspace_slot, idempotency_key))

    def work(connection: Connection) -> StartRow:
        made = connection.execute(statement).first()
        return _row(connection.execute(existing).one() if made is None else made)

    return await db.write(work)


async def get(db: Database, slot: str, key: str) -> StartRow | None:
    """The start of that key, if there is one."""
    async with db.read() as connection:
        found = (await connection.execute(select(starts).where(_is(slot, key)))).first()
    return None if found is None else _row(found)


async def of_run(db: Database, run_id: str) -> StartRow | None:
    """The start that became that run, the first where it answered several keys."""
    statement = select(starts).where(starts.c.run_id == run_id).order_by(starts.c.created_at)
    async with db.read() as connection:
        found = (await connection.execute(statement.limit(1))).first()
    return None if found is None else _row(found)


async def of_keys(db: Database, slot: str, keys: Sequence[str]) -> dict[str, StartRow]:
    """Those of the keys that have a start, by key; not more of them than one statement takes."""
    statement = select(starts).where(
        starts.c.workspace_slot == slot, starts.c.idempotency_key.in_(keys)
    )
    async with db.read() as connection:
        rows = [_row(row) for row in await connection.execute(statement)]
    return {row.idempotency_key: row for row in rows}


async def take(
    db: Database, slot: str, key: str, holder: str, now: datetime, lease: timedelta
) -> bool:
    """Take the right to send this key, until `now + lease`; false where another has it.

    A start that became a run is nobody's to send.
    """
    statement = (
        update(starts)
        .where(
            _is(slot, key),
            starts.c.state != StartState.STARTED,
            or_(
                starts.c.lease_until.is_(None),
                starts.c.lease_until <= now,
                starts.c.lease_holder == holder,
            ),
        )
        .values(lease_until=now + lease, lease_holder=holder)
    )
    return await db.write(lambda connection: connection.execute(statement).rowcount == 1)


async def prolong(
    db: Database, slot: str, key: str, holder: str, now: datetime, lease: timedelta
) -> None:
    """Prolong the right that `take` gave to `holder`, where it still has it: one that comes late,
    after it was given back, is not to take it again."""
    statement = (
        update(starts)
        .where(_is(slot, key), starts.c.lease_holder == holder)
        .values(lease_until=now + lease)
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def give_back(db: Database, slot: str, key: str, holder: str) -> None:
    """End the right that `take` gave to `holder`, where it still has it."""
    statement = (
        update(starts)
        .where(_is(slot, key), starts.c.lease_holder == holder)
        .values(lease_until=None, lease_holder=None)
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def mark_sent(
    db: Database, slot: str, key: str, *, holder: str, at: datetime, callback_url: str | None
) -> StartRow | None:
    """Note that a request is about to leave; the row as it now is, `None` if `holder` lost it.

    `callback_url` is kept with the first request of a key, and every later one asks for the same:
    FLORA takes another body under one key for a conflict.
    """
    fresh = starts.c.state.in_([word("stored"), word("refused")])
    return await _mark(
        db,
        slot,
        key,
        holder,
        state=StartState.SENT.value,
        sent_at=at,
        in_use_since=case((fresh, at), else_=starts.c.in_use_since),
        callback_url=case((fresh, callback_url), else_=starts.c.callback_url),
        error=None,
    )


async def mark(
    db: Database,
    slot: str,
    key: str,
    *,
    holder: str,
    state: StartState,
    error: dict[str, Any],
) -> StartRow | None:
    """Note what is known of a start: the row as it now is, `None` if `holder` lost it.

    `STARTED` is set by the door alone, with the run.
    """
    return await _mark(db, slot, key, holder, state=state.value, error=error)


async def _mark(db: Database, slot: str, key: str, holder: str, **values: Any) -> StartRow | None:
    statement = (
        update(starts)
        .where(
            _is(slot, key),
            starts.c.state != StartState.STARTED,
            starts.c.lease_holder == holder,
        )
        .values(**values)
        .returning(*starts.c)
    )

    def work(connection: Connection) -> StartRow | None:
        found = connection.execute(statement).first()
        return None if found is None else _row(found)

    return await db.write(work)


async def open_starts(db: Database, before: datetime) -> list[StartRow]:
    """Starts last touched before that moment of which nobody knows what came of them."""
    statement = (
        select(starts)
        .where(_open(), func.coalesce(starts.c.sent_at, starts.c.created_at) < before)
        .order_by(starts.c.created_at, starts.c.idempotency_key)
    )
    async with db.read() as connection:
        return [_row(row) for row in await connection.execute(statement)]


async def rivals(db: Database, slot: str, technique_id: str, key: str) -> list[StartRow]:
    """Other starts of the technique of which no run is known: a run may be theirs as well."""
    statement = select(starts).where(
        starts.c.workspace_slot == slot,
        starts.c.technique_id == technique_id,
        starts.c.idempotency_key != key,
        starts.c.state.in_([word("stored"), word("sent"), word("unresolved")]),
    )
    async with db.read() as connection:
        return [_row(row) for row in await connection.execute(statement)]


async def accounted(db: Database, run_ids: Sequence[str]) -> set[str]:
    """Those of the runs whose origin is known: a start owns them, or they were given to track."""
    if not run_ids:
        return set()
    by_start = select(starts.c.run_id).where(starts.c.run_id.in_(run_ids))
    by_source = select(runs.c.run_id).where(
        runs.c.run_id.in_(run_ids), runs.c.source.in_([Source.START, Source.TRACK])
    )
    async with db.read() as connection:
        return set((await connection.execute(by_start.union(by_source))).scalars())


def _is(slot: str, key: str) -> ColumnElement[bool]:
    return and_(starts.c.workspace_slot == slot, starts.c.idempotency_key == key)


def _open() -> ColumnElement[bool]:
    return starts.c.state.in_([word("stored"), word("sent")])


def _row(row: Row[Any]) -> StartRow:
    values = row._asdict()
    return StartRow(**values | {"state": StartState(values["state"])})
