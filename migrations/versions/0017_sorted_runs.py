"""Indexes for lists of runs by cost and by duration.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It does not use the new indexes. On PostgreSQL they are made beside the work, which
waits for nothing; where that was interrupted it begins again.

Revision: 0017
Follows: 0016
"""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

DURATIONS = {
    "postgresql": "(completed_at - created_at)",
    "sqlite": "(julianday(completed_at) - julianday(created_at))",
}
TIMEOUTS = ("statement_timeout", "lock_timeout")


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    indexes = {
        "ix_runs_by_cost": (["charged_cost", "run_id"], "charged_cost IS NOT NULL"),
        f"ix_runs_by_duration_{dialect}": (
            [sa.text(DURATIONS[dialect]), "run_id"],
            "completed_at IS NOT NULL",
        ),
    }
    if dialect == "postgresql":
        with op.get_context().autocommit_block(), patience():
            create(indexes, concurrently=True)
    else:
        create(indexes, concurrently=False)


def create(
    indexes: dict[str, tuple[list[str | sa.TextClause], str]], *, concurrently: bool
) -> None:
    for name, (columns, where) in indexes.items():
        beside = {"postgresql_concurrently": concurrently}
        op.drop_index(name, "runs", if_exists=True, **beside)
        condition = {"postgresql_where": sa.text(where), "sqlite_where": sa.text(where)}
        op.create_index(name, "runs", columns, **beside, **condition)


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
