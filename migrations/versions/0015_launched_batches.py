"""Batches with everything that is needed to launch them without their sheet.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It leaves out the new columns: rows that it stores can be launched by its command
alone, as before.

On PostgreSQL the columns are added in a transaction that reads no row; the index follows beside the
work. Every step may be done twice.

Revision: 0015
Follows: 0014
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

INDEX = "ix_batches_open"
WHERE = "launch IS NOT NULL AND finished_at IS NULL"
Json = sa.JSON().with_variant(JSONB(), "postgresql")
Moment = sa.DateTime(timezone=True)
COLUMNS = {
    "batches": {
        "source": sa.Text(),
        "columns": Json,
        "launch": Json,
        "launch_at": Moment,
        "stopped": sa.Text(),
        "lease_until": Moment,
        "lease_holder": sa.Text(),
    },
    "batch_rows": {"inputs": Json, "tags": Json, "carried": Json, "error": sa.Text()},
}
"""By table, in the order in which processes write them."""


def upgrade() -> None:
    postgres = op.get_bind().dialect.name == "postgresql"
    for table, columns in COLUMNS.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind), if_not_exists=postgres or None)
    if not postgres:
        create_index(concurrently=False)
        return
    with op.get_context().autocommit_block():
        op.drop_index(INDEX, "batches", if_exists=True, postgresql_concurrently=True)
        create_index(concurrently=True)


def create_index(*, concurrently: bool) -> None:
    op.create_index(
        INDEX,
        "batches",
        ["launch_at"],
        postgresql_concurrently=concurrently,
        postgresql_where=sa.text(WHERE),
        sqlite_where=sa.text(WHERE),
    )
