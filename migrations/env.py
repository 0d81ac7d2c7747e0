"""Where Alembic's commands meet a database, whether the tracker or a developer calls them.

One process migrates at a time: on PostgreSQL behind an advisory lock, held over all revisions, each
of which is a transaction of its own; on SQLite in one transaction that has the file to itself. A
statement that would wait long for a lock, or run long, is ended by the server: a migration that
fails can be tried again, one that blocks a table stops every callback.
"""

from logging.config import fileConfig
from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, func, select

from tracker.store.migrate import run_from_command_line
from tracker.store.tables import metadata
from tracker.store.types import CleanText, Money, UtcDateTime

ADVISORY_LOCK = 0x666C6F7261  # "flora"
LOCK_WAIT = "5min"
LOCK_TIMEOUT = "4s"
STATEMENT_TIMEOUT = "60s"

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
    set_timeouts(connection, statement_timeout=LOCK_WAIT, lock_timeout=LOCK_WAIT)
    connection.execute(select(func.pg_advisory_lock(ADVISORY_LOCK)))
    set_timeouts(connection, statement_timeout=STATEMENT_TIMEOUT, lock_timeout=LOCK_TIMEOUT)
    connection.commit()
    try:
        context.configure(
            connection=connection,
            target_metadata=metadata,
            render_item=render_item,
            transaction_per_migration=True,
        )
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    finally:
        connection.rollback()
        connection.execute(select(func.pg_advisory_unlock(ADVISORY_LOCK)))
        connection.commit()


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
            render_as_batch=True,
            transactional_ddl=True,
        )
        with context.begin_transaction():
            context.run_migrations()


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
