"""The waits that FLORA has asked for, kept for all processes that use the same key.

A wait is a row among the leases: until then FLORA is nobody's. The latest one holds.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from tracker.store.engine import Database
from tracker.store.schema import leases


async def keep(db: Database, slot: str, until: datetime, *, told: str) -> None:
    """FLORA has told the process `told` that the workspace in `slot` is to wait until then."""
    insert: Any = postgresql.insert if db.dialect == "postgresql" else sqlite.insert
    wanted = insert(leases).values(name=_name(slot), holder=told, until=until)
    statement = wanted.on_conflict_do_update(
        index_elements=[leases.c.name],
        set_={"holder": wanted.excluded.holder, "until": wanted.excluded.until},
        where=leases.c.until < wanted.excluded.until,
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def until(db: Database, slot: str) -> datetime | None:
    """Until when the workspace in `slot` was last told to wait; `None` where it never was."""
    statement = select(leases.c.until).where(leases.c.name == _name(slot))
    async with db.read() as connection:
        found: datetime | None = (await connection.execute(statement)).scalar()
    return found


def _name(slot: str) -> str:
    return f"wait:{slot}"
