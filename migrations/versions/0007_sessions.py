"""Sign-ins of the dashboard, so that signing out ends them for every copy of their cookie.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema: it does not know the table. Cookies of the version before hold no longer: whoever
was signed in signs in once more.

There is no way back but a backup: a downgrade would throw away what has been seen.

Revision: 0007
Follows: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("token_name", sa.Text(), nullable=False),
        sa.Column("token_digest", sa.Text(), nullable=False),
        sa.Column("secure", sa.Boolean(), nullable=False),
        sa.Column("started_at", Moment, nullable=False),
        sa.Column("last_used_at", Moment, nullable=False),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sessions")),
    )
