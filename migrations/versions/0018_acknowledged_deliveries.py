"""Quarantined deliveries that someone has marked as seen.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It leaves out the new column, and counts acknowledged deliveries as before.

The column is added without reading a row. The view gets it as its last column. Every step may be
done twice.

Revision: 0018
Follows: 0017
"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

NEW = "acknowledged_at"
LAST = " AS age_seconds"
"""The last column of `v_quarantine` until now."""


def upgrade() -> None:
    postgres = op.get_bind().dialect.name == "postgresql"
    column = sa.Column(NEW, sa.DateTime(timezone=True))
    op.add_column("deliveries", column, if_not_exists=postgres or None)
    if postgres:
        with op.get_context().autocommit_block():  # the lock on the table ends here
            remake_view(
                "CREATE OR REPLACE VIEW v_quarantine AS ",
                "SELECT pg_get_viewdef('v_quarantine', true)",
            )
    else:
        remake_view("", "SELECT sql FROM sqlite_schema WHERE name = 'v_quarantine'")


def remake_view(create: str, read: str) -> None:
    connection = op.get_bind()
    found = connection.exec_driver_sql(read).scalar_one()
    if NEW in found:
        return  # done before, where it was interrupted afterwards
    if found.count(LAST) != 1:
        raise RuntimeError(
            "the view v_quarantine is not as revision 0003 made it: drop it, and upgrade"
        )
    if not create:
        connection.exec_driver_sql("DROP VIEW v_quarantine")
    connection.exec_driver_sql(create + found.replace(LAST, f"{LAST}, {NEW}"))
