"""Which workspace an API key is of, as FLORA told; and what was kept before that was known."""

from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Update, and_, exists, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from tracker.store.engine import Database
from tracker.store.schema import batches, runs, starts, workspace_keys

BEFORE_IDS: Final = "default"
"""What a version before 0009 calls the workspace of the top-level settings."""
_AT_ONCE: Final = 5000
"""Rows that one transaction moves."""


async def workspace_of(db: Database, key_fingerprint: str) -> str | None:
    """The id of the key's workspace; `None` where FLORA has not told it yet."""
    statement = select(workspace_keys.c.workspace_id).where(
        workspace_keys.c.key_fingerprint == key_fingerprint
    )
    async with db.read() as connection:
        found: str | None = await connection.scalar(statement)
    return found


async def last_at(db: Database, place: str) -> str | None:
    """The workspace of the key that was last learnt at that place in the settings."""
    statement = (
        select(workspace_keys.c.workspace_id)
        .where(workspace_keys.c.place == place)
        .order_by(workspace_keys.c.learnt_at.desc())
        .limit(1)
    )
    async with db.read() as connection:
        found: str | None = await connection.scalar(statement)
    return found


async def all_ids(db: Database) -> list[str]:
    """The workspaces of all keys that were ever used."""
    async with db.read() as connection:
        return list(await connection.scalars(select(workspace_keys.c.workspace_id).distinct()))


async def keep(
    db: Database, key_fingerprint: str, workspace_id: str, *, place: str, at: datetime
) -> None:
    """Keep what FLORA told of a key."""
    insert: Any = postgresql.insert if db.dialect == "postgresql" else sqlite.insert
    values = {"workspace_id": workspace_id, "place": place, "learnt_at": at}
    new = insert(workspace_keys).values(key_fingerprint=key_fingerprint, **values)
    statement = new.on_conflict_do_update(
        index_elements=[workspace_keys.c.key_fingerprint], set_=values
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def give_ids(db: Database, workspace_id: str) -> int:
    """Give the starts and batches of a version before 0009 the id of their workspace: how many.

    A start that became a run is of that run's workspace. Others are of the workspace whose key
    stands at the top of the settings, which is the one that asks. A key that was used in both
    places stays as it was in the first.
    """
    old = and_(starts.c.workspace_slot == BEFORE_IDS, starts.c.workspace_id.is_(None))
    other = starts.alias()
    taken = exists().where(
        other.c.workspace_slot == workspace_id,
        other.c.idempotency_key == starts.c.idempotency_key,
    )
    elsewhere = exists().where(
        runs.c.run_id == starts.c.run_id,
        runs.c.workspace_id.is_not(None),
        runs.c.workspace_id != workspace_id,
    )
    one = tuple_(starts.c.workspace_slot, starts.c.idempotency_key)
    some = (
        select(starts.c.workspace_slot, starts.c.idempotency_key)
        .where(old, ~taken, ~elsewhere)
        .limit(_AT_ONCE)
    )
    moved = (
        update(starts)
        .where(one.in_(some))
        .values(workspace_slot=workspace_id, workspace_id=workspace_id)
    )
    named = (
        update(starts)
        .where(
            one.in_(
                select(starts.c.workspace_slot, starts.c.idempotency_key)
                .where(starts.c.workspace_slot == workspace_id, starts.c.workspace_id.is_(None))
                .limit(_AT_ONCE)
            )
        )
        .values(workspace_id=workspace_id)
    )
    batched = (
        update(batches)
        .where(batches.c.workspace_slot == BEFORE_IDS)
        .values(workspace_slot=workspace_id)
    )
    total = 0
    for statement in (moved, named, batched):

        def give(connection: Connection, statement: Update = statement) -> int:
            return connection.execute(statement).rowcount

        while (count := await db.write(give)) and statement is not batched:
            total += count
    return total
