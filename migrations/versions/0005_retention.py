"""Retention: when a callback's body was removed, and how far runs and bodies have been.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema: it ignores the column, which is nullable, and shows a removed body as an empty one.
The storage parameters of `starts`, whose rows are updated several times each, change what comes
after them; to set them takes a lock that nobody who reads or writes waits for.

There is no way back but a backup: a downgrade would throw away what has been seen.

Revision: 0005
Follows: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True)

# The same as the other tables that grow without end have from the first.
STARTS = """
ALTER TABLE starts SET (
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_insert_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.02
)
"""


def upgrade() -> None:
    op.create_table(
        "retention",
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("through", Moment, nullable=False),
        sa.CheckConstraint("what IN ('runs', 'bodies')", name=op.f("ck_retention_what")),
        sa.PrimaryKeyConstraint("what", "workspace_id", name=op.f("pk_retention")),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(STARTS)
    op.add_column("deliveries", sa.Column("body_removed_at", Moment))
