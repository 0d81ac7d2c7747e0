"""When a technique's definition was last read by itself, and when a list last showed it.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema: it ignores both columns, which are nullable.

There is no way back but a backup: a downgrade would throw away what has been seen.

Revision: 0004
Follows: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("techniques", sa.Column("defined_at", Moment))
    op.add_column("techniques", sa.Column("listed_at", Moment))
