"""Runs that wait for a retry stay overdue.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It does not read this view, which is for SQL dashboards.

The view gets more rows, the active runs whose last read brought no answer of FLORA (as the pages
and metrics count them), and `retrying` as its last column, which is true for these. Every step may
be done twice.

Revision: 0019
Follows: 0018
"""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

RETRYING = "(last_error IS NOT NULL AND missing = 0 AND tracking = 'active')"


# As revision 0003 has them.
POSTGRES = {
    "now": "now()",
    "seconds": "CAST(extract(epoch FROM now() - {0}) AS double precision)",
}
_MICROSECONDS = (
    "(CAST(strftime('%s', substr({0}, 1, 19)) AS INTEGER) * 1000000"
    " + CAST(substr({0}, 21, 6) AS INTEGER))"
)
_SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
SQLITE = {
    "now": _SQLITE_NOW,
    "seconds": f"(({_MICROSECONDS.format(_SQLITE_NOW)} - {_MICROSECONDS}) / 1000000.0)",
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        make("CREATE OR REPLACE VIEW", **POSTGRES)
    else:
        op.execute("DROP VIEW IF EXISTS v_overdue_runs")
        make("CREATE VIEW", **SQLITE)


def make(create: str, now: str, seconds: str) -> None:
    op.get_bind().exec_driver_sql(f"""
        {create} v_overdue_runs AS
        SELECT run_id, workspace_id, technique_id, technique_name, status, created_at, source,
            callback_expected, callback_at, next_check_at,
            {seconds.format("next_check_at")} AS overdue_seconds,
            {seconds.format("created_at")} AS age_seconds, checks, last_error,
            {RETRYING} AS retrying
        FROM runs
        WHERE next_check_at IS NOT NULL AND (next_check_at <= {now} OR {RETRYING})""")
