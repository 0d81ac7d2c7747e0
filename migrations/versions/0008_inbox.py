"""Deliveries that wait: a callback is stored and acknowledged first, and applied after.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It stores and applies in one transaction, and writes its rows as 'applied' or
'quarantined': these are done, and nobody applies them again. It leaves `applied_at` alone, which is
null then: such a delivery was applied in the moment of its receipt, and a backfill of every row
would say nothing more. What new code stores as 'waiting' the old code counts where it comes again,
and leaves to new code.

The CHECK is exchanged for one that allows more, which nothing that is written can break; it is
validated, and the index of what waits is made, beside the work. For these the usual time-outs do
not count, because nobody waits for them. Where it was interrupted it begins again.

There is no way back but a backup: a downgrade would throw away what has been seen.

Revision: 0008
Follows: 0007
"""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

OUTCOME = "outcome IN ('waiting', 'applied', 'quarantined')"
APPLIED_AT = "applied_at IS NULL OR outcome = 'applied'"
CHECKS = {
    "ck_deliveries_outcome": OUTCOME,
    "ck_deliveries_applied_has_its_time": APPLIED_AT,
}
INDEX = "ix_deliveries_waiting"
TIMEOUTS = ("statement_timeout", "lock_timeout")


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        add_columns()
        with op.get_context().autocommit_block(), patience():
            for name in CHECKS:
                op.execute(f"ALTER TABLE deliveries VALIDATE CONSTRAINT {name}")
            op.drop_index(INDEX, "deliveries", if_exists=True, postgresql_concurrently=True)
            create_index(concurrently=True)
    else:
        make_anew()
        create_index(concurrently=False)


def add_columns() -> None:
    """The new column and the checks, in one transaction that reads no row."""
    op.execute("ALTER TABLE deliveries ADD COLUMN IF NOT EXISTS applied_at timestamptz")
    for name, condition in CHECKS.items():
        op.execute(f"ALTER TABLE deliveries DROP CONSTRAINT IF EXISTS {name}")
        op.execute(f"ALTER TABLE deliveries ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID")


def make_anew() -> None:
    """SQLite changes no CHECK of a table that is there."""
    moment = sa.DateTime(timezone=True)
    before = sa.Table(
        "deliveries",
        sa.MetaData(),
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text()),
        sa.Column("event_type", sa.Text()),
        sa.Column("api_version", sa.Text()),
        sa.Column("workspace_id", sa.Text()),
        sa.Column("created_at", moment),
        sa.Column("received_at", moment, nullable=False),
        sa.Column("last_received_at", moment, nullable=False),
        sa.Column("receipts", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("body_removed_at", moment),
        *(sa.CheckConstraint(condition, name=op.f(name)) for name, condition in CHECKS.items()),
        sa.CheckConstraint("receipts >= 1", name=op.f("ck_deliveries_receipts")),
        sa.PrimaryKeyConstraint("delivery_id", name=op.f("pk_deliveries")),
        sa.Index("ix_deliveries_newest", "received_at", "delivery_id"),
        sa.Index(
            "ix_deliveries_quarantined",
            *("received_at", "delivery_id"),
            sqlite_where=sa.text("outcome = 'quarantined'"),
        ),
        sa.Index("ix_deliveries_run", "run_id"),
    )
    # A view names the table, which is not there for a moment.
    op.execute("PRAGMA legacy_alter_table=ON")
    with op.batch_alter_table("deliveries", copy_from=before, recreate="always") as batch:
        batch.add_column(sa.Column("applied_at", moment))
    op.execute("PRAGMA legacy_alter_table=OFF")


def create_index(*, concurrently: bool) -> None:
    waiting = sa.text("outcome = 'waiting'")
    op.create_index(
        INDEX,
        "deliveries",
        ["received_at", "delivery_id"],
        postgresql_concurrently=concurrently,
        postgresql_where=waiting,
        sqlite_where=waiting,
    )


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
