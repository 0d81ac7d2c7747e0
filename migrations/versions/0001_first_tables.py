"""The first tables: runs with their outputs and timeline, callbacks, starts, sweeps, the catalogue.

Revision: 0001
Follows: nothing
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True)
Money = sa.Numeric().with_variant(sa.Double(), "sqlite")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
SerialId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

# Tables that grow without end: PostgreSQL's defaults would vacuum them far too late.
BUSY = {
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_vacuum_insert_scale_factor": "0.05",
    "autovacuum_analyze_scale_factor": "0.02",
}


def where(condition: str) -> dict[str, Any]:
    """The options of an index of some rows alone."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("run_type", sa.Text()),
        sa.Column("workspace_id", sa.Text()),
        sa.Column("project_id", sa.Text()),
        sa.Column("technique_id", sa.Text()),
        sa.Column("technique_name", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("created_at", Moment, nullable=False),
        sa.Column("created_at_known", sa.Boolean(), nullable=False),
        sa.Column("started_at", Moment),
        sa.Column("completed_at", Moment),
        sa.Column("charged_cost", Money),
        sa.Column("error_code", sa.Text()),
        sa.Column("error_message", sa.Text()),
        sa.Column("output_count", sa.Integer(), nullable=False),
        sa.Column("poll_url", sa.Text()),
        sa.Column("standing", sa.SmallInteger(), nullable=False),
        sa.Column("details", sa.SmallInteger(), nullable=False),
        sa.Column("ranks", sa.BigInteger(), nullable=False),
        sa.Column("conflict", sa.Boolean(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("first_seen_at", Moment, nullable=False),
        sa.Column("callback_at", Moment),
        sa.Column("callback_expected", sa.Boolean(), nullable=False),
        sa.Column("ended_via", sa.Text()),
        sa.Column("tracking", sa.Text(), nullable=False),
        sa.Column("settled_at", Moment),
        sa.Column("inputs", Json),
        sa.Column("next_check_at", Moment),
        sa.Column("looks", sa.Integer(), nullable=False),
        sa.Column("checks", sa.Integer(), nullable=False),
        sa.Column("missing", sa.Integer(), nullable=False),
        sa.Column("missing_since", Moment),
        sa.Column("last_error", sa.Text()),
        sa.Column("lease_until", Moment),
        sa.Column("lease_holder", sa.Text()),
        sa.CheckConstraint(
            "status IN ('pending', 'running', 'completed', 'failed')", name=op.f("ck_runs_status")
        ),
        sa.CheckConstraint(
            "tracking IN ('active', 'settled', 'lost')", name=op.f("ck_runs_tracking")
        ),
        sa.CheckConstraint(
            "source IN ('start', 'track', 'callback', 'poll', 'history')",
            name=op.f("ck_runs_source"),
        ),
        sa.CheckConstraint(
            "ended_via IN ('start', 'track', 'callback', 'poll', 'history')",
            name=op.f("ck_runs_ended_via"),
        ),
        sa.CheckConstraint("progress BETWEEN 0 AND 100", name=op.f("ck_runs_progress")),
        sa.CheckConstraint("standing BETWEEN 0 AND 5", name=op.f("ck_runs_standing")),
        sa.CheckConstraint("details BETWEEN 0 AND 2", name=op.f("ck_runs_details")),
        sa.CheckConstraint(
            "(status IN ('completed', 'failed')) = (standing >= 2)",
            name=op.f("ck_runs_status_as_it_stands"),
        ),
        sa.CheckConstraint(
            "(tracking = 'settled') = (settled_at IS NOT NULL)",
            name=op.f("ck_runs_settled_has_a_time"),
        ),
        sa.CheckConstraint(
            "tracking <> 'settled' OR status IN ('completed', 'failed')",
            name=op.f("ck_runs_settled_has_ended"),
        ),
        sa.CheckConstraint(
            "(tracking = 'active') = (next_check_at IS NOT NULL)",
            name=op.f("ck_runs_active_is_checked"),
        ),
        sa.CheckConstraint(
            "(lease_until IS NULL) = (lease_holder IS NULL)",
            name=op.f("ck_runs_lease_has_holder_and_end"),
        ),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_runs")),
        postgresql_with={"fillfactor": "85", **BUSY},
    )
    op.create_index("ix_runs_due", "runs", ["next_check_at"], **where("next_check_at IS NOT NULL"))
    op.create_index(
        "ix_runs_durations",
        "runs",
        ["technique_id", "completed_at"],
        **where("status = 'completed'"),
    )
    op.create_index(
        "ix_runs_generations", "runs", ["workspace_id"], **where("run_type = 'generation'")
    )
    op.create_index("ix_runs_newest", "runs", ["created_at", "run_id"])
    op.create_index("ix_runs_newest_of_status", "runs", ["status", "created_at", "run_id"])
    op.create_index("ix_runs_newest_of_technique", "runs", ["technique_id", "created_at", "run_id"])
    op.create_index("ix_runs_newest_of_tracking", "runs", ["tracking", "created_at", "run_id"])
    op.create_index("ix_runs_newest_of_workspace", "runs", ["workspace_id", "created_at", "run_id"])
    op.create_table(
        "run_outputs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("output_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name=op.f("fk_run_outputs_run_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "position", name=op.f("pk_run_outputs")),
        postgresql_with=BUSY,
    )
    op.create_table(
        "run_events",
        sa.Column("id", SerialId, sa.Identity(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("at", Moment, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("progress", sa.Double()),
        sa.Column("detail", Json, nullable=False),
        sa.CheckConstraint(
            "source IN ('start', 'track', 'callback', 'poll', 'history')",
            name=op.f("ck_run_events_source"),
        ),
        sa.CheckConstraint(
            "status IN ('pending', 'running', 'completed', 'failed')",
            name=op.f("ck_run_events_status"),
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name=op.f("fk_run_events_run_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run_events")),
        postgresql_with=BUSY,
    )
    op.create_index("ix_run_events_timeline", "run_events", ["run_id", "id"])
    op.create_table(
        "deliveries",
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text()),
        sa.Column("event_type", sa.Text()),
        sa.Column("api_version", sa.Text()),
        sa.Column("workspace_id", sa.Text()),
        sa.Column("created_at", Moment),
        sa.Column("received_at", Moment, nullable=False),
        sa.Column("last_received_at", Moment, nullable=False),
        sa.Column("receipts", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint(
            "outcome IN ('applied', 'quarantined')", name=op.f("ck_deliveries_outcome")
        ),
        sa.CheckConstraint("receipts >= 1", name=op.f("ck_deliveries_receipts")),
        sa.PrimaryKeyConstraint("delivery_id", name=op.f("pk_deliveries")),
        postgresql_with={"fillfactor": "85", **BUSY},
    )
    op.create_index("ix_deliveries_newest", "deliveries", ["received_at", "delivery_id"])
    op.create_index(
        "ix_deliveries_quarantined",
        "deliveries",
        ["received_at", "delivery_id"],
        **where("outcome = 'quarantined'"),
    )
    op.create_index("ix_deliveries_run", "deliveries", ["run_id"])
    op.create_table(
        "starts",
        sa.Column("workspace_slot", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("technique_id", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("inputs", Json, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created_at", Moment, nullable=False),
        sa.Column("in_use_since", Moment),
        sa.Column("callback_url", sa.Text()),
        sa.Column("sent_at", Moment),
        sa.Column("run_id", sa.Text()),
        sa.Column("error", Json),
        sa.Column("lease_until", Moment),
        sa.Column("lease_holder", sa.Text()),
        sa.CheckConstraint(
            "state IN ('stored', 'sent', 'started', 'refused', 'unresolved')",
            name=op.f("ck_starts_state"),
        ),
        sa.CheckConstraint(
            "(state = 'started') = (run_id IS NOT NULL)", name=op.f("ck_starts_started_has_a_run")
        ),
        sa.CheckConstraint(
            "(lease_until IS NULL) = (lease_holder IS NULL)",
            name=op.f("ck_starts_lease_has_holder_and_end"),
        ),
        sa.PrimaryKeyConstraint("workspace_slot", "idempotency_key", name=op.f("pk_starts")),
    )
    op.create_index(
        "ix_starts_open", "starts", ["created_at"], **where("state IN ('stored', 'sent')")
    )
    op.create_index("ix_starts_run", "starts", ["run_id"])
    op.create_index(
        "ix_starts_unresolved", "starts", ["created_at"], **where("state = 'unresolved'")
    )
    op.create_index("ix_starts_technique", "starts", ["technique_id", "created_at"])
    op.create_table(
        "sweeps",
        sa.Column("id", SerialId, sa.Identity(), nullable=False),
        sa.Column("workspace_id", sa.Text()),
        sa.Column("started_at", Moment, nullable=False),
        sa.Column("finished_at", Moment),
        sa.Column("pages", sa.Integer(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("discovered", sa.Integer(), nullable=False),
        sa.Column("repaired", sa.Integer(), nullable=False),
        sa.Column("unreadable", sa.Integer(), nullable=False),
        sa.Column("through", Moment),
        sa.Column("generations_through", Moment),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    op.create_index("ix_sweeps_newest", "sweeps", ["workspace_id", "started_at"])
    op.create_table(
        "techniques",
        sa.Column("technique_id", sa.Text(), nullable=False),
        sa.Column("slug", sa.Text()),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text()),
        sa.Column("run_cost", Money),
        sa.Column("inputs", Json, nullable=False),
        sa.Column("outputs", Json, nullable=False),
        sa.Column("synced_at", Moment, nullable=False),
        sa.Column("gone_at", Moment),
        sa.PrimaryKeyConstraint("technique_id", name=op.f("pk_techniques")),
    )
    op.create_index("ix_techniques_slug", "techniques", ["slug"])
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("until", Moment, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
