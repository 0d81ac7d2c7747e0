"""The audit log: who started, resolved, replayed, pruned, signed in, or was refused.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema: it does not know the table, and what it does is not in the log.

There is no way back but a backup: a downgrade would throw away what has been noted.

Revision: 0011
Follows: 0010
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
REFUSED = sa.text("action = 'refused'")


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", Serial, sa.Identity(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("detail", Json, nullable=False),
        sa.Column("request_id", sa.Text()),
        sa.Column("address", sa.Text()),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.CheckConstraint("count >= 1", name=op.f("ck_audit_count")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
        if_not_exists=True,
    )
    op.create_index("ix_audit_newest", "audit", ["at", "id"], if_not_exists=True)
    op.create_index(
        "ix_audit_refused",
        "audit",
        ["address", "at", "actor"],
        unique=True,
        if_not_exists=True,
        postgresql_where=REFUSED,
        sqlite_where=REFUSED,
    )
