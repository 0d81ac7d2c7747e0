"""Sessions of signed-in browsers."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, insert, select, update

from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries.audit import Action
from tracker.store.schema import sessions


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    """One session. `session_id` and `token_digest` are digests of the cookie and of the token."""

    session_id: str
    token_name: str
    token_digest: str
    secure: bool
    started_at: datetime
    last_used_at: datetime


async def begin_session(
    db: Database, row: SessionRow, *, idle: timedelta, lasts: timedelta
) -> None:
    """Store a session and delete expired ones. Raises `StoreUnavailable`."""
    now = row.started_at
    noted = audit.entry(Action.SIGN_IN, now)
    over = delete(sessions).where(
        (sessions.c.started_at <= now - lasts) | (sessions.c.last_used_at <= now - idle)
    )
    values = {name: getattr(row, name) for name in SessionRow.__slots__}

    def write(connection: Connection) -> None:
        connection.execute(over)
        connection.execute(insert(sessions).values(values))
        audit.note(connection, noted)

    await db.write(write)


async def find_session(db: Database, session_id: str) -> SessionRow | None:
    """The session with this id, expired or not. Raises `StoreUnavailable`."""
    statement = select(sessions).where(sessions.c.session_id == session_id)
    row = await db.fetchrow(statement)
    return None if row is None else SessionRow(**row._mapping)


async def use_session(db: Database, session_id: str, *, now: datetime) -> None:
    """Set the time of the last use. Raises `StoreUnavailable`."""
    statement = update(sessions).where(sessions.c.session_id == session_id).values(last_used_at=now)
    await db.execute(statement)


async def end_session(db: Database, session_id: str, *, now: datetime) -> None:
    """Delete the session. Raises `StoreUnavailable`."""
    statement = delete(sessions).where(sessions.c.session_id == session_id)
    noted = audit.entry(Action.SIGN_OUT, now)
    await db.write(lambda connection: audit.execute_noted(connection, statement, noted))
