"""Statuses that only a newer FLORA knows, and lost runs that are read again.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It writes nothing that the new checks forbid. It reads a run with a new status by
how it stands (running, or failed), and never polls a run again that it calls lost itself.

On PostgreSQL the checks are exchanged in one transaction that reads no row, and validated beside
the work. On SQLite they are edited in the schema, as its documentation describes for checks: the
table is not copied. Lost runs become due at once. Every step may be done twice.

Revision: 0014
Follows: 0013
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

STATUSES = "status IN ('pending', 'running', 'completed', 'failed')"
CHECKS = {
    "status_as_it_stands": (
        "(status IN ('completed', 'failed')) = (standing >= 2)",
        "CASE WHEN status IN ('completed', 'failed') THEN standing >= 2"
        " WHEN status IN ('pending', 'running') THEN standing < 2"
        " ELSE status <> '' AND standing IN (1, 4) END",
    ),
    "settled_has_ended": (
        "tracking <> 'settled' OR status IN ('completed', 'failed')",
        "tracking <> 'settled' OR standing >= 4",
    ),
    "active_is_checked": (
        "(tracking = 'active') = (next_check_at IS NOT NULL)",
        "tracking = 'lost' OR (tracking = 'active') = (next_check_at IS NOT NULL)",
    ),
}
"""Of `runs`: what each check said, and what it says now."""
UNPRICED = re.compile(
    r"((?:runs\.)?status) = ('completed'(?:::text)?)(?= AND (?:runs\.)?charged_cost IS NULL)"
)
"""In `run_facts`: of which runs a missing bill that is not asked for any more is told."""
TIMEOUTS = ("statement_timeout", "lock_timeout")
AT_ONCE = 1000

runs = sa.table(
    "runs",
    *(sa.column(name, sa.Text()) for name in ("run_id", "tracking")),
    sa.column("next_check_at", sa.DateTime(timezone=True)),
)


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        read = "SELECT pg_get_viewdef('run_facts', true)"
        remake_facts("CREATE OR REPLACE VIEW run_facts AS ", read)
        exchange_checks()
        with op.get_context().autocommit_block(), patience():
            for name in CHECKS:
                op.execute(f"ALTER TABLE runs VALIDATE CONSTRAINT ck_runs_{name}")
            read_lost_again(op.get_bind())
    else:
        edit_schema(op.get_bind())
        remake_facts("", "SELECT sql FROM sqlite_schema WHERE name = 'run_facts'")
        read_lost_again(op.get_bind())


def exchange_checks() -> None:
    op.execute("ALTER TABLE runs DROP CONSTRAINT IF EXISTS ck_runs_status")
    for name, (_, now) in CHECKS.items():
        op.execute(f"ALTER TABLE runs DROP CONSTRAINT IF EXISTS ck_runs_{name}")
        op.execute(f"ALTER TABLE runs ADD CONSTRAINT ck_runs_{name} CHECK ({now}) NOT VALID")
    op.execute("ALTER TABLE run_events DROP CONSTRAINT IF EXISTS ck_run_events_status")


def edit_schema(connection: sa.Connection) -> None:
    edits = {"run_events": [(f"CONSTRAINT ck_run_events_status CHECK ({STATUSES}),", "")]}
    edits["runs"] = [(f"CONSTRAINT ck_runs_status CHECK ({STATUSES}),", "")]
    edits["runs"] += [(f"CHECK ({before})", f"CHECK ({now})") for before, now in CHECKS.values()]
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    for table, changes in edits.items():
        for before, now in changes:
            connection.exec_driver_sql(
                "UPDATE sqlite_schema SET sql = replace(sql, ?, ?)"
                " WHERE type = 'table' AND name = ?",
                (before, now, table),
            )
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = OFF")


def remake_facts(create: str, read: str) -> None:
    """An ended run without a bill is unpriced, whatever its end is called; a failed one costs
    nothing."""
    connection = op.get_bind()
    found = connection.exec_driver_sql(read).scalar_one()
    query, count = UNPRICED.subn(r"\1 <> 'failed'", found)
    if count == 0 and "<> 'failed'" in found:
        return  # done before, where it was interrupted afterwards
    if count != 2:
        raise RuntimeError(
            "the view run_facts is not as revision 0010 made it: drop it, and upgrade"
        )
    if not create:
        connection.exec_driver_sql("DROP VIEW run_facts")
    connection.exec_driver_sql(create + query)


def read_lost_again(connection: sa.Connection) -> None:
    now = datetime.now(UTC)  # noqa: TID251
    waiting = (runs.c.tracking == "lost", runs.c.next_check_at.is_(None))
    page = sa.select(runs.c.run_id).where(*waiting).order_by(runs.c.run_id).limit(AT_ONCE)
    while some := list(connection.execute(page).scalars()):
        # Locked in the order of those who write.
        among = sa.select(runs.c.run_id).where(runs.c.run_id.in_(some), *waiting)
        among = among.order_by(runs.c.run_id).with_for_update()
        due = sa.update(runs).where(runs.c.run_id.in_(among)).values(next_check_at=now)
        connection.execute(due)


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
