"""Where Alembic's commands meet a database, whether the tracker or a developer calls them.

One process migrates at a time: on PostgreSQL behind an advisory lock, held over all revisions, each
of which is a transaction of its own; on SQLite in one transaction that has the file to itself.

A statement that waits for a lock has everybody who comes after it wait as well, every callback too.
So the server ends it soon, and it is tried again a little later: what is in use is migrated in
between, and nobody is kept for longer than they wait for a lock by themselves.
"""

import asyncio
import time
from logging.config import fileConfig
from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from tracker.core.errors import StoreUnavailable
from tracker.core.log import get_logger
from tracker.store.migrate import PATIENCE_SECONDS, run_from_command_line
from tracker.store.schema import CleanText, Money, UtcDateTime, metadata

ADVISORY_LOCK = 0x666C6F7261  # "flora"
TURN_SECONDS = 300.0
LOCK_TIMEOUT = "800ms"  # well below `DatabaseTimes.lock`: see above
STATEMENT_TIMEOUT = "60s"
PAUSE_SECONDS = 0.7
IN_THE_WAY = ("55P03", "40P01")  # someone holds a lock for longer than that; a deadlock

log = get_logger("tracker.migrations")

# A revision stays as it was written, whatever becomes of our types: it names what is under them.
PLAIN = {
    CleanText: "sa.Text()",
    UtcDateTime: "sa.DateTime(timezone=True)",
    Money: 'sa.Numeric().with_variant(sa.Double(), "sqlite")',
}


def migrate(connection: Connection) -> None:
    """Run what the command asks for over a connection that is in no transaction."""
    if connection.dialect.name == "postgresql":
        migrate_postgres(connection)
    else:
        migrate_sqlite(connection)


def migrate_postgres(connection: Connection) -> None:
    """One transaction for each revision, and the advisory lock around them all."""
    # The lock and the settings belong to the session, so they outlast each transaction.
    set_timeouts(connection, statement_timeout=STATEMENT_TIMEOUT, lock_timeout=LOCK_TIMEOUT)
    connection.commit()
    await_turn(connection)
    give_up = time.monotonic() + context.config.attributes.get("patience", PATIENCE_SECONDS)
    try:
        while not migrated(connection, last=time.monotonic() >= give_up):
            await_only(asyncio.sleep(PAUSE_SECONDS))
    finally:
        connection.rollback()
        connection.execute(select(func.pg_advisory_unlock(ADVISORY_LOCK)))
        connection.commit()


def await_turn(connection: Connection) -> None:
    """Take the advisory lock. It is asked for again and again: who waited for it in a statement
    would be waited for in turn, by an index that the one before makes CONCURRENTLY."""
    give_up = time.monotonic() + TURN_SECONDS
    while not connection.scalar(select(func.pg_try_advisory_lock(ADVISORY_LOCK))):
        connection.commit()
        if time.monotonic() >= give_up:
            raise StoreUnavailable("another process has been migrating this database for long")
        await_only(asyncio.sleep(PAUSE_SECONDS))
    connection.commit()


def migrated(connection: Connection, *, last: bool) -> bool:
    """Go on from the revision that is there; false where a lock of others was in the way.

    What was committed stays. At the `last` attempt the error is raised.
    """
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_item=render_item,
        include_object=is_of_postgres,
        transaction_per_migration=True,
    )
    try:
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    except DBAPIError as error:
        connection.rollback()
        if last or getattr(error.orig, "sqlstate", None) not in IN_THE_WAY:
            raise
        log.warning("migration.waits", reason="another transaction holds a lock that it needs")
        return False
    return True


def set_timeouts(connection: Connection, **settings: str) -> None:
    """Set what the server waits for, for this session."""
    for name, value in settings.items():
        connection.execute(select(func.set_config(name, value, False)))


def migrate_sqlite(connection: Connection) -> None:
    """One transaction for all: what SQLite locks, it locks whole."""
    with connection.begin():
        context.configure(
            connection=connection,
            target_metadata=metadata,
            render_item=render_item,
            include_object=is_of_sqlite,
            render_as_batch=True,
            transactional_ddl=True,
        )
        with context.begin_transaction():
            context.run_migrations()


def is_of_sqlite(item: Any, *_: Any) -> bool:
    """Whether SQLite has it: some indexes are of one database alone."""
    return item.info.get("dialect", "sqlite") == "sqlite"


def is_of_postgres(item: Any, *_: Any) -> bool:
    """Whether PostgreSQL has it."""
    return item.info.get("dialect", "postgresql") == "postgresql"


def render_item(kind: str, item: Any, _: AutogenContext) -> str | Literal[False]:
    """How `alembic revision --autogenerate` writes our own types."""
    return PLAIN.get(type(item), False) if kind == "type" else False


if context.is_offline_mode():
    raise SystemExit("the tracker's migrations need a database; there is no --sql mode")

given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    if context.config.config_file_name is not None:
        fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    run_from_command_line(migrate)
