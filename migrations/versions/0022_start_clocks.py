"""When a start was last sent by a clock that only runs forward, and by how much ours was set back
since its key was first sent.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It leaves the new columns as they are: what the first says about another `sent_at`
is not used, and the second makes a start at most older.

The columns are added without reading a row.

Revision: 0022
Follows: 0021
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    postgres = op.get_bind().dialect.name == "postgresql"
    kind = sa.JSON().with_variant(JSONB(), "postgresql")
    for column in (sa.Column("sent_clock", kind), sa.Column("set_back", sa.Double())):
        op.add_column("starts", column, if_not_exists=postgres or None)
