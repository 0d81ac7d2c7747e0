"""All runs of a start belong to it: each has its key, and the start has their number.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It leaves the new columns as they are: a further run that it stores meanwhile
belongs to no start.

The columns are added without reading a row, and the index holds no run yet. Then the further runs
of earlier starts are found: those that are the first run of none, by the address that their
callback came to. That reads the runs once, beside the work, and changes only those.
Where it was interrupted it begins again.

Revision: 0023
Follows: 0022
"""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

TIMEOUTS = ("statement_timeout", "lock_timeout")
INDEX = "ix_runs_start"


def upgrade() -> None:
    postgres = op.get_bind().dialect.name == "postgresql"
    for table, column in (
        ("runs", sa.Column("idempotency_key", sa.Text())),
        ("starts", sa.Column("run_count", sa.Integer())),
    ):
        op.add_column(table, column, if_not_exists=postgres or None)
    if postgres:
        with op.get_context().autocommit_block(), patience():
            create_index(concurrently=True)
            link_runs()
    else:
        create_index(concurrently=False)
        link_runs()


def create_index(*, concurrently: bool) -> None:
    beside = {"postgresql_concurrently": concurrently}
    op.drop_index(INDEX, "runs", if_exists=True, **beside)
    where = sa.text("idempotency_key IS NOT NULL")
    op.create_index(
        INDEX, "runs", ["idempotency_key"], **beside, postgresql_where=where, sqlite_where=where
    )


FURTHER_RUNS = """
SELECT DISTINCT runs.run_id, starts.workspace_slot, starts.idempotency_key
FROM runs
JOIN deliveries ON deliveries.run_id = runs.run_id AND deliveries.outcome = 'applied'
JOIN starts ON starts.callback_token = deliveries.callback_token AND starts.state = 'started'
    AND starts.workspace_slot = runs.workspace_id
WHERE NOT EXISTS (SELECT 1 FROM starts AS of_first WHERE of_first.run_id = runs.run_id)
ORDER BY runs.run_id
"""
LINK_RUN = "UPDATE runs SET idempotency_key = :key WHERE run_id = :run_id"
COUNT_RUNS = """
UPDATE starts SET run_count = 1 + (
    SELECT count(*) FROM runs
    WHERE runs.idempotency_key = starts.idempotency_key
        AND runs.workspace_id = starts.workspace_slot AND runs.run_id <> starts.run_id
)
WHERE workspace_slot = :workspace AND idempotency_key = :key
"""


def link_runs() -> None:
    connection = op.get_bind()
    found = connection.execute(sa.text(FURTHER_RUNS)).all()
    for run_id, _, key in found:
        connection.execute(sa.text(LINK_RUN), {"run_id": run_id, "key": key})
    for workspace, key in sorted({(workspace, key) for _, workspace, key in found}):
        connection.execute(sa.text(COUNT_RUNS), {"workspace": workspace, "key": key})


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
