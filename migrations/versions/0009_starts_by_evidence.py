"""Starts that are known by evidence: doubt is a state, each start has its own callback address, and
keys belong to a workspace's id.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It goes on to call its first workspace 'default' in `workspace_slot`; new code
writes the workspace's id there and in `workspace_id`, and gives the rows of old code their id as
soon as it knows it. The old code leaves starts 'in_doubt' alone, and stops with an error where it
is asked for one: nothing is sent by two rules. It leaves out the new columns: what it sends has the
bare callback address.

The CHECK is exchanged for one that allows more, which nothing that is written can break; it is
validated, and the indexes are made, beside the work. For these the usual time-outs do not count,
because nobody waits for them. Where it was interrupted it begins again.

There is no way back but a backup: a downgrade would forget which starts are in doubt.

Revision: 0009
Follows: 0008
"""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

STATE = "state IN ('stored', 'sent', 'in_doubt', 'started', 'refused', 'unresolved')"
TEXTS = ("workspace_id", "callback_token", "request_body", "started_by")
INDEXES = {
    "ix_starts_in_doubt": ("created_at", "state = 'in_doubt'", False),
    "ix_starts_without_workspace": ("workspace_slot", "workspace_id IS NULL", False),
    "ix_starts_callback_token": ("callback_token", "callback_token IS NOT NULL", True),
}
_MICROSECONDS = (
    "(CAST(strftime('%s', substr({0}, 1, 19)) AS INTEGER) * 1000000"
    " + CAST(substr({0}, 21, 6) AS INTEGER))"
)
_NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
EXPRESSIONS = {
    "postgresql": (
        "CAST(extract(epoch FROM now() - created_at) AS double precision)",
        "error ->> '{0}'",
    ),
    "sqlite": (
        f"(({_MICROSECONDS.format(_NOW)} - {_MICROSECONDS.format('created_at')}) / 1000000.0)",
        "json_extract(error, '$.{0}')",
    ),
}
"""Seconds since a start was stored, and a field of its error."""
TIMEOUTS = ("statement_timeout", "lock_timeout")


def upgrade() -> None:
    op.create_table(
        "workspace_keys",
        sa.Column("key_fingerprint", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("learnt_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key_fingerprint", name=op.f("pk_workspace_keys")),
        if_not_exists=True,
    )
    if op.get_bind().dialect.name == "postgresql":
        add_columns()
        show_open_starts("CREATE OR REPLACE VIEW")
        with op.get_context().autocommit_block(), patience():
            op.execute("ALTER TABLE starts VALIDATE CONSTRAINT ck_starts_state")
            for name in INDEXES:
                op.drop_index(name, "starts", if_exists=True, postgresql_concurrently=True)
            create_indexes(concurrently=True)
    else:
        op.add_column("deliveries", sa.Column("callback_token", sa.Text()))
        op.add_column("batches", sa.Column("mapping", sa.JSON()))
        make_anew()
        create_indexes(concurrently=False)
        op.execute("DROP VIEW v_open_starts")
        show_open_starts("CREATE VIEW")


def add_columns() -> None:
    """The new columns and the check, in one transaction that reads no row.

    Tables are locked in the order in which processes write them, deliveries before starts: in any
    other order this and they would wait for each other.
    """
    op.execute("ALTER TABLE deliveries ADD COLUMN IF NOT EXISTS callback_token text")
    op.execute("ALTER TABLE batches ADD COLUMN IF NOT EXISTS mapping jsonb")
    for name in TEXTS:
        op.execute(f"ALTER TABLE starts ADD COLUMN IF NOT EXISTS {name} text")
    op.execute("ALTER TABLE starts DROP CONSTRAINT IF EXISTS ck_starts_state")
    op.execute(f"ALTER TABLE starts ADD CONSTRAINT ck_starts_state CHECK ({STATE}) NOT VALID")


def make_anew() -> None:
    """SQLite changes no CHECK of a table that is there."""
    moment = sa.DateTime(timezone=True)
    before = sa.Table(
        "starts",
        sa.MetaData(),
        sa.Column("workspace_slot", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("technique_id", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("in_use_since", moment),
        sa.Column("callback_url", sa.Text()),
        sa.Column("sent_at", moment),
        sa.Column("run_id", sa.Text()),
        sa.Column("error", sa.JSON()),
        sa.Column("lease_until", moment),
        sa.Column("lease_holder", sa.Text()),
        sa.CheckConstraint(STATE, name=op.f("ck_starts_state")),
        sa.CheckConstraint(
            "(state = 'started') = (run_id IS NOT NULL)", name=op.f("ck_starts_started_has_a_run")
        ),
        sa.CheckConstraint(
            "(lease_until IS NULL) = (lease_holder IS NULL)",
            name=op.f("ck_starts_lease_has_holder_and_end"),
        ),
        sa.PrimaryKeyConstraint("workspace_slot", "idempotency_key", name=op.f("pk_starts")),
        sa.Index(
            "ix_starts_open", "created_at", sqlite_where=sa.text("state IN ('stored', 'sent')")
        ),
        sa.Index(
            "ix_starts_unresolved", "created_at", sqlite_where=sa.text("state = 'unresolved'")
        ),
        sa.Index("ix_starts_run", "run_id"),
        sa.Index("ix_starts_technique", "technique_id", "created_at"),
    )
    # A view names the table, which is not there for a moment.
    op.execute("PRAGMA legacy_alter_table=ON")
    with op.batch_alter_table("starts", copy_from=before, recreate="always") as batch:
        for name in TEXTS:
            batch.add_column(sa.Column(name, sa.Text()))
    op.execute("PRAGMA legacy_alter_table=OFF")


def create_indexes(*, concurrently: bool) -> None:
    for name, (column, where, unique) in INDEXES.items():
        op.create_index(
            name,
            "starts",
            [column],
            unique=unique,
            postgresql_concurrently=concurrently,
            postgresql_where=sa.text(where),
            sqlite_where=sa.text(where),
        )


def show_open_starts(create: str) -> None:
    """The view, with the starts in doubt and the workspace's id."""
    seconds, field = EXPRESSIONS[op.get_bind().dialect.name]
    columns = f"""
        SELECT workspace_slot, idempotency_key, technique_id, state, created_at, sent_at,
            {seconds} AS age_seconds, {field.format("code")} AS error_code,
            {field.format("message")} AS error_message, workspace_id, started_by
        FROM starts"""
    # Each part has its own index.
    op.get_bind().exec_driver_sql(f"""{create} v_open_starts AS
        {columns} WHERE state IN ('stored', 'sent')
        UNION ALL {columns} WHERE state = 'in_doubt'
        UNION ALL {columns} WHERE state = 'unresolved'""")


@contextmanager
def patience() -> Iterator[None]:
    connection = op.get_bind()
    settings = sa.select(*(sa.func.current_setting(name) for name in TIMEOUTS))
    usual = dict(zip(TIMEOUTS, connection.execute(settings).one(), strict=True))
    try:
        for name in TIMEOUTS:
            set_to(connection, name, "0")
        yield
    finally:
        for name, value in usual.items():
            set_to(connection, name, value)


def set_to(connection: sa.Connection, name: str, value: str) -> None:
    connection.execute(sa.select(sa.func.set_config(name, value, False)))
