"""A SQLite file as it is: looked at without creating, migrating or changing it."""

import asyncio
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tracker.store.faults import translate
from tracker.store.postgres_connection import LOCK_SECONDS
from tracker.store.url import DatabaseUrl

ONE_ROW: Final = (
    "INSERT INTO deliveries "
    "(delivery_id, received_at, last_received_at, receipts, outcome, body) VALUES "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteCondition:
    """What was seen of a file. `refuses_writes` says why no row can be written; `None`: one can."""

    path: Path
    directory_writable: bool
    exists: bool
    journal_mode: str | None = None
    revision: str | None = None
    refuses_writes: str | None = None


async def look_at_sqlite(url: DatabaseUrl) -> SqliteCondition:
    """Look at the file. Raises `StoreError` where it is there and cannot be read."""
    return await asyncio.to_thread(_look, url.path)


def _look(file: str) -> SqliteCondition:
    path = Path(file).resolve()
    directory_writable = os.access(path.parent, os.W_OK | os.X_OK)
    if not path.exists():
        return SqliteCondition(path=path, directory_writable=directory_writable, exists=False)
    try:
        # Not `rwc`, which creates. A file that is write-protected is opened for reading.
        with closing(
            sqlite3.connect(
                f"file:{quote(str(path))}?mode=rw",
                uri=True,
                isolation_level=None,
                timeout=LOCK_SECONDS,
            )
        ) as connection:
            (journal_mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            revision = _revision(connection)
            return SqliteCondition(
                path=path,
                directory_writable=directory_writable,
                exists=True,
                journal_mode=journal_mode,
                revision=revision,
                refuses_writes=_refuses_writes(connection, has_tables=revision is not None),
            )
    except sqlite3.Error as exc:
        raise translate(exc) from exc


def _revision(connection: sqlite3.Connection) -> str | None:
    there = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
    if connection.execute(there).fetchone() is None:
        return None
    found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if found is None else str(found[0])


def _refuses_writes(connection: sqlite3.Connection, *, has_tables: bool) -> str | None:
    try:
        connection.execute("BEGIN IMMEDIATE")
        if has_tables:
            connection.execute(f"{ONE_ROW} ('tracker.doctor', '', '', 1, 'applied', x'')")
        else:
            connection.execute("CREATE TABLE tracker_doctor (n)")
    except sqlite3.Error as exc:
        return str(exc)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return None
