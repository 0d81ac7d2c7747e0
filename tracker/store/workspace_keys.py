"""Which workspace an API key is of, as FLORA told: by the key's fingerprint."""

from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from tracker.store.engine import Database
from tracker.store.tables import workspace_keys


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
