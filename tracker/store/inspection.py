"""What `tracker doctor` reads of a database, and its test deliveries in it.

The inspections use connections of their own, and create, migrate and change nothing.
"""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import and_, delete, select

from tracker.core.clock import Clock
from tracker.core.record import TEST_DELIVERY, TEST_DELIVERY_IDS
from tracker.core.waiting import wait_for
from tracker.store.engine import Database
from tracker.store.errors import postgres_errors, translate
from tracker.store.postgres import connect_postgres
from tracker.store.schema import deliveries, metadata
from tracker.store.url import DatabaseUrl

PATIENCE: Final = 2.0
"""Seconds for a lock, and for a notification, which takes milliseconds."""
_INSERT_DELIVERY: Final = (
    "INSERT INTO deliveries "
    "(delivery_id, received_at, last_received_at, receipts, outcome, body) VALUES "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteInspection:
    """A SQLite file. `refuses_writes` is why no row can be written; `None` if one can."""

    path: Path
    directory_writable: bool
    exists: bool
    journal_mode: str | None = None
    revision: str | None = None
    refuses_writes: str | None = None


async def inspect_sqlite(url: DatabaseUrl, *, patience: float = PATIENCE) -> SqliteInspection:
    """Inspect the file, waiting `patience` seconds for a lock.

    Raises `StoreError` if it exists and cannot be read.
    """
    return await asyncio.to_thread(_inspect_sqlite, url.path, patience)


def _inspect_sqlite(file: str, patience: float) -> SqliteInspection:
    path = Path(file).resolve()
    is_writable = os.access(path.parent, os.W_OK | os.X_OK)
    inspection = SqliteInspection(path=path, directory_writable=is_writable, exists=path.exists())
    if not inspection.exists:
        return inspection
    # Not `rwc`, which creates. A file that is write-protected is opened for reading.
    address = f"file:{quote(os.fsencode(path))}?mode=rw"
    try:
        with closing(
            sqlite3.connect(address, uri=True, isolation_level=None, timeout=patience)
        ) as connection:
            (journal_mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            revision = _sqlite_revision(connection)
            refusal = _sqlite_refuses_writes(connection, has_tables=revision is not None)
    except sqlite3.Error as exc:
        raise translate(exc) from exc
    return replace(inspection, journal_mode=journal_mode, revision=revision, refuses_writes=refusal)


def _sqlite_revision(connection: sqlite3.Connection) -> str | None:
    there = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
    if connection.execute(there).fetchone() is None:
        return None
    found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if found is None else str(found[0])


def _sqlite_refuses_writes(connection: sqlite3.Connection, *, has_tables: bool) -> str | None:
    try:
        connection.execute("BEGIN IMMEDIATE")
        if has_tables:
            connection.execute(f"{_INSERT_DELIVERY} ('tracker.doctor', '', '', 1, 'applied', x'')")
            connection.execute("DELETE FROM deliveries WHERE delivery_id = 'tracker.doctor'")
        else:
            connection.execute("CREATE TABLE tracker_doctor (n)")
            connection.execute("DROP TABLE tracker_doctor")
        connection.execute("COMMIT")  # only that writes: a full disk takes everything before it
    except sqlite3.Error as exc:
        return str(exc)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return None


NAME: Final = "tracker-doctor"


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresInspection:
    """A PostgreSQL database.

    `major` is the first number of `version`. `refuses_writes` is why no row can be written,
    `lacking` names the tables that this role may not read and change. `connections` of
    `most_connections` are in use, by the limit of which the greatest share is: that of the server,
    of the database or of the role. `own` of them are the tracker's. `notifies` is whether a
    notification arrives. `clock_ahead` is the server's clock minus ours, `size` is in bytes on
    disk.
    """

    version: str
    major: int
    standby: bool
    encoding: str
    revision: str | None
    refuses_writes: str | None
    lacking: tuple[str, ...]
    connections: int
    most_connections: int
    own: int
    notifies: bool
    clock_ahead: timedelta
    size: int


_FACTS: Final = """
WITH limits (connections, most_connections) AS (
    SELECT (SELECT sum(numbackends)::int FROM pg_stat_database),
           current_setting('max_connections')::int
               - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true)::int, 0)
    UNION ALL
    SELECT numbackends, datconnlimit
    FROM pg_database JOIN pg_stat_database ON datid = pg_database.oid
    WHERE pg_database.datname = current_database() AND datconnlimit >= 0
    UNION ALL
    SELECT (SELECT count(*)::int FROM pg_stat_activity WHERE usesysid = pg_roles.oid), rolconnlimit
    FROM pg_roles WHERE rolname = current_user AND rolconnlimit >= 0 AND NOT rolsuper
)
SELECT current_setting('server_version') AS version,
       current_setting('server_version_num')::int / 10000 AS major,
       pg_is_in_recovery() AS standby,
       current_setting('server_encoding') AS encoding,
       to_regclass('alembic_version') IS NOT NULL AS has_tables,
       pg_database_size(current_database()) AS size,
       (SELECT count(*)::int FROM pg_stat_activity
        WHERE application_name LIKE 'tracker%' AND application_name <> $1) AS own,
       connections, most_connections
FROM limits ORDER BY connections::float / greatest(most_connections, 1) DESC LIMIT 1
"""
_LACKING: Final = """
SELECT name FROM unnest($1::text[]) AS name
WHERE NOT (has_table_privilege(to_regclass(name), 'SELECT')
       AND has_table_privilege(to_regclass(name), 'INSERT')
       AND has_table_privilege(to_regclass(name), 'UPDATE')
       AND has_table_privilege(to_regclass(name), 'DELETE'))
"""


async def inspect_postgres(
    url: DatabaseUrl, *, clock: Clock, patience: float = PATIENCE
) -> PostgresInspection:
    """Inspect the database, waiting `patience` seconds for a notification.

    Raises `StoreError` if it cannot be read.
    """
    async with _connected(url) as connection:
        before = clock()
        now = await connection.fetchval("SELECT clock_timestamp()")
        clock_ahead = now - (before + (clock() - before) / 2)
        facts = dict(await connection.fetchrow(_FACTS, NAME))
        revision, lacking, refuses_writes = None, (), None
        if facts.pop("has_tables"):
            revision = await connection.fetchval("SELECT version_num FROM alembic_version")
            rows = await connection.fetch(_LACKING, sorted(metadata.tables))
            lacking = tuple(row["name"] for row in rows)
        if revision is not None:
            refuses_writes = await _postgres_refuses_writes(connection)
        return PostgresInspection(
            **facts,
            revision=revision,
            refuses_writes=refuses_writes,
            lacking=lacking,
            # A standby takes no notifications; that is reported by itself.
            notifies=facts["standby"] or await _notifies(url, connection, patience),
            clock_ahead=clock_ahead,
        )


async def _postgres_refuses_writes(connection: Any) -> str | None:
    import asyncpg  # noqa: PLC0415 - not loaded for SQLite

    transaction = connection.transaction()
    try:
        await transaction.start()
        await connection.execute(f"{_INSERT_DELIVERY} ($1, now(), now(), 1, 'applied', '')", NAME)
    except asyncpg.PostgresError as exc:
        return str(exc).partition("\n")[0]
    finally:
        await transaction.rollback()
    return None


async def _notifies(url: DatabaseUrl, connection: Any, patience: float) -> bool:
    """Whether a notification of one connection reaches another one.

    It does not behind a pooler that hands each transaction to another connection of the server.
    """
    channel = f"tracker_doctor_{token_hex(4)}"
    arrived = asyncio.Event()
    async with _connected(url) as listener:
        await listener.add_listener(channel, lambda *_: arrived.set())
        await connection.execute("SELECT pg_notify($1, '')", channel)
        return await wait_for(arrived, patience)


@asynccontextmanager
async def _connected(url: DatabaseUrl) -> AsyncIterator[Any]:
    try:
        connection = await connect_postgres(url, NAME)
        try:
            yield connection
        finally:
            connection.terminate()
    except postgres_errors() as exc:
        raise translate(exc) from exc


# The test deliveries of `tracker doctor` are stored like every callback, so that a 2xx means the
# same for them. They do not belong to the history, so the doctor removes them again.


async def stored_test_deliveries(db: Database, delivery_ids: Sequence[str]) -> set[str]:
    """Which of these test deliveries are stored. Raises `StoreUnavailable`."""
    statement = select(deliveries.c.delivery_id).where(deliveries.c.delivery_id.in_(delivery_ids))
    return set(await db.fetchcol(statement))


async def remove_test_deliveries(
    db: Database, delivery_ids: Sequence[str], *, left_before: datetime
) -> None:
    """Remove these test deliveries, and all that were received before that time and left behind.

    Nothing but a test delivery is ever removed. Raises `StoreUnavailable`.
    """
    key = deliveries.c.delivery_id
    # A range of the primary key: no digit sorts after "g".
    left = key.between(TEST_DELIVERY_IDS, f"{TEST_DELIVERY_IDS}g")
    for which in (key.in_(delivery_ids), and_(left, deliveries.c.received_at < left_before)):
        is_test = deliveries.c.event_type == TEST_DELIVERY
        await db.execute(delete(deliveries).where(which, is_test))
