"""Indexes for lists of runs that leave out what most runs are: completed, settled, of no technique.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. Its lists by status and by tracking go on: PostgreSQL plans them by the values that
they ask for, and so finds the new indexes for all that is rare; what is not is found among the
newest. Each new index is there before the old one goes, and neither holds up who writes.

To make an index beside the work takes as long as the table is big, and waits for every transaction
that is older: nobody waits for it meanwhile, so the usual time-outs do not count. Where it was
interrupted it begins again.

There is no way back but a backup: a downgrade would throw away what has been seen.

Revision: 0006
Follows: 0005
"""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

CHANGED = (
    (
        "ix_runs_newest_of_status",
        "ix_runs_newest_not_completed",
        ["status", "created_at", "run_id"],
        "status <> 'completed'",
    ),
    (
        "ix_runs_newest_of_tracking",
        "ix_runs_newest_not_settled",
        ["tracking", "created_at", "run_id"],
        "tracking <> 'settled'",
    ),
    (
        "ix_runs_newest_of_technique",
        "ix_runs_newest_of_a_technique",
        ["technique_id", "created_at", "run_id"],
        "technique_id IS NOT NULL",
    ),
)
TIMEOUTS = ("statement_timeout", "lock_timeout")


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        with op.get_context().autocommit_block(), patience():
            change(concurrently=True)
    else:
        change(concurrently=False)


def change(*, concurrently: bool) -> None:
    for old, new, columns, where in CHANGED:
        beside = {"postgresql_concurrently": concurrently}
        op.drop_index(new, "runs", if_exists=True, **beside)
        condition = {"postgresql_where": sa.text(where), "sqlite_where": sa.text(where)}
        op.create_index(new, "runs", columns, **beside, **condition)
        op.drop_index(old, "runs", if_exists=True, **beside)


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
