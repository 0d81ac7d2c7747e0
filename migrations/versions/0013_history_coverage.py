"""Coverage: the stretches of FLORA's history that have been read without a gap.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema: it goes on by the `through` of its own sweeps, and leaves the new table and column
alone. What it reads meanwhile is read once more by the new code.

The old code knew one moment through which a history was here, by sweeps that each reached back to
the one before. It becomes one interval: from as far back as the first of them had gone, until two
minutes before that moment, because a run may be listed late.

There is no way back but a backup: a downgrade would throw away what has been seen.

Revision: 0013
Follows: 0012
"""

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True)
SerialId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SINCE = timedelta(days=7)
LISTED_LATE = timedelta(minutes=2)

sweeps = sa.table(
    "sweeps",
    sa.column("workspace_id", sa.Text()),
    sa.column("error", sa.Text()),
    *(
        sa.column(name, Moment)
        for name in ("started_at", "finished_at", "through", "generations_through")
    ),
)
tallies = sa.table(
    "run_tallies",
    sa.column("measure", sa.Text()),
    sa.column("workspace_id", sa.Text()),
    sa.column("since", Moment),
)


def upgrade() -> None:
    connection = op.get_bind()
    postgres = connection.dialect.name == "postgresql"
    coverage = op.create_table(
        "history_coverage",
        sa.Column("id", SerialId, sa.Identity(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("run_type", sa.Text(), nullable=False),
        sa.Column("from_at", Moment, nullable=False),
        sa.Column("to_at", Moment, nullable=False),
        sa.Column("read_at", Moment, nullable=False),
        sa.Column("cursor", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("retry_at", Moment),
        sa.CheckConstraint("from_at <= to_at", name=op.f("ck_history_coverage_in_order")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_history_coverage")),
        if_not_exists=True,
    )
    op.create_index(
        "ix_history_coverage_newest",
        "history_coverage",
        ["workspace_id", "run_type", "to_at"],
        if_not_exists=True,
    )
    if found := _horizons(connection):
        connection.execute(coverage.insert(), found)
    # Last, because it locks what is in use.
    error = sa.Column("generations_error", sa.Text())
    op.add_column("sweeps", error, if_not_exists=True if postgres else None)
    if postgres:
        connection.exec_driver_sql(f"CREATE OR REPLACE VIEW v_sweeps AS {_sweeps()}")
    else:
        op.execute("DROP VIEW v_sweeps")
        connection.exec_driver_sql(f"CREATE VIEW v_sweeps AS {_sweeps()}")


def _horizons(connection: sa.Connection) -> list[dict[str, Any]]:
    """What the old code's sweeps had read, as rows of the new table."""
    back = context.config.attributes.get("history_since", SINCE)
    c = sweeps.c
    found: list[dict[str, Any]] = []
    for kind, through in (("technique", c.through), ("generation", c.generations_through)):
        counts = (c.finished_at.is_not(None), c.error.is_(None), through.is_not(None))
        first = sa.select(c.workspace_id, sa.func.min(c.started_at).label("at"))
        first = first.where(*counts, c.workspace_id.is_not(None)).group_by(c.workspace_id)
        for workspace_id, begun in connection.execute(first).all():
            last = sa.select(through.label("through"), c.finished_at).where(
                *counts, c.workspace_id == workspace_id
            )
            newest = connection.execute(last.order_by(c.started_at.desc()).limit(1)).one()
            if kind == "technique":
                begun = min(begun, _first_end(connection, workspace_id) or begun)
            from_at, to_at = begun - back, newest.through - LISTED_LATE
            if from_at < to_at:
                found.append(
                    {
                        "workspace_id": workspace_id,
                        "run_type": kind,
                        "from_at": from_at,
                        "to_at": to_at,
                        "read_at": newest.finished_at,
                        "failures": 0,
                    }
                )
    return found


def _first_end(connection: sa.Connection, workspace_id: str) -> Any:
    """When the tracker first knew an end: retention removes old sweeps, and leaves the tallies."""
    c = tallies.c
    first = sa.select(sa.func.min(c.since))
    return connection.scalar(first.where(c.measure == "end", c.workspace_id == workspace_id))


def _sweeps() -> str:
    """As it was, and why generations could not be swept."""

    def of(workspace: str, condition: str, among: str) -> str:
        def newest(what: str) -> str:
            return (
                f"(SELECT s.id FROM sweeps s WHERE s.workspace_id {condition} AND {what}"
                " ORDER BY s.started_at DESC, s.id DESC LIMIT 1)"
            )

        complete = "s.finished_at IS NOT NULL AND s.error IS NULL"
        return f"""
            SELECT {workspace} AS workspace_id, {newest("TRUE")} AS last_id,
                {newest(complete)} AS complete_id,
                {newest(f"{complete} AND s.through IS NOT NULL")} AS through_id,
                {newest(f"{complete} AND s.generations_through IS NOT NULL")} AS generations_id
            {among}"""

    named = of("w.workspace_id", "= w.workspace_id", "FROM w WHERE w.workspace_id IS NOT NULL")
    unnamed = of(
        "CAST(NULL AS text)",
        "IS NULL",
        "WHERE EXISTS (SELECT 1 FROM sweeps s WHERE s.workspace_id IS NULL)",
    )
    return f"""
        WITH RECURSIVE w(workspace_id) AS (
            SELECT min(s.workspace_id) FROM sweeps s
            UNION ALL
            SELECT (SELECT min(s.workspace_id) FROM sweeps s WHERE s.workspace_id > w.workspace_id)
            FROM w WHERE w.workspace_id IS NOT NULL
        )
        SELECT found.workspace_id, newest.started_at AS last_started_at,
            newest.finished_at AS last_finished_at, newest.error AS last_error,
            newest.unreadable AS last_unreadable,
            complete.started_at AS complete_started_at,
            complete.finished_at AS complete_finished_at, complete.pages AS complete_pages,
            complete.items AS complete_items, complete.discovered AS complete_discovered,
            complete.repaired AS complete_repaired,
            reached.through AS through, generations.generations_through AS generations_through,
            newest.generations_error AS last_generations_error
        FROM ({named} UNION ALL {unnamed}) AS found
        LEFT JOIN sweeps newest ON newest.id = found.last_id
        LEFT JOIN sweeps complete ON complete.id = found.complete_id
        LEFT JOIN sweeps reached ON reached.id = found.through_id
        LEFT JOIN sweeps generations ON generations.id = found.generations_id"""
