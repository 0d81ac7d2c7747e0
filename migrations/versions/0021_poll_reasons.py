"""Why a run is polled next, beside when.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It leaves out the new column: where it moves a run's next poll, the reason may be
that of the poll before.

The column is added without reading a row.

Revision: 0021
Follows: 0020
"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    postgres = op.get_bind().dialect.name == "postgresql"
    op.add_column("runs", sa.Column("next_check_reason", sa.Text()), if_not_exists=postgres or None)
