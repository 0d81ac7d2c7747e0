"""Webhooks out: events of runs, the endpoints that they are sent to, messages and attempts.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema: it does not know the tables, and the runs that it settles meanwhile cause no event.
An endpoint that is configured after the last restart misses none.

Every step may be repeated. There is no way back but a backup: a downgrade would delete messages
that were not delivered yet.

Revision: 0016
Follows: 0015
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True)
Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
EVENTS = "event IN ('run.settled', 'run.lost', 'run.cost_changed')"
STORAGE = {
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_vacuum_insert_scale_factor": "0.05",
    "autovacuum_analyze_scale_factor": "0.02",
}
EMPTIED = {"autovacuum_vacuum_scale_factor": "0", "autovacuum_vacuum_threshold": "1000"}
INDEXES: dict[str, tuple[list[str], str | None]] = {
    "ix_messages_due": (["endpoint_id", "next_attempt_at"], "state = 'pending'"),
    "ix_messages_leased": (["endpoint_id"], "lease_holder IS NOT NULL"),
    "ix_messages_newest": (["created_at", "message_id"], None),
    "ix_messages_newest_of_endpoint": (["endpoint_id", "created_at", "message_id"], None),
    "ix_messages_newest_not_delivered": (
        ["state", "created_at", "message_id"],
        "state <> 'delivered'",
    ),
    "ix_messages_newest_not_settled": (
        ["event", "created_at", "message_id"],
        "event <> 'run.settled'",
    ),
    "ix_messages_run": (["run_id"], None),
}
"""Of `messages`: columns, and the condition of a partial index."""


def upgrade() -> None:
    create_table(
        "outbox",
        sa.Column("id", Serial, sa.Identity(), nullable=False),
        text("event_id"),
        text("event"),
        text("run_id"),
        moment("at"),
        check("outbox", "event", EVENTS),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        postgresql_with=EMPTIED,
    )
    create_table(
        "endpoints",
        text("endpoint_id"),
        text("url"),
        sa.Column("events", Json, nullable=False),
        sa.Column("filters", Json, nullable=False),
        *(moment(name) for name in ("since", "configured_at")),
        text("state"),
        moment("disabled_at", nullable=True),
        text("disabled_reason", nullable=True),
        moment("enabled_at", nullable=True),
        *(
            moment(name, nullable=True)
            for name in ("failing_since", "last_success_at", "last_error_at")
        ),
        text("last_error", nullable=True),
        *(moment(name, nullable=True) for name in ("catch_up_from", "catch_up_to")),
        check("endpoints", "state", "state IN ('enabled', 'disabled')"),
        check(
            "endpoints",
            "disabled_has_a_time",
            "(state = 'disabled') = (disabled_at IS NOT NULL)",
        ),
        check(
            "endpoints",
            "catch_up_has_two_ends",
            "(catch_up_from IS NULL) = (catch_up_to IS NULL)",
        ),
        sa.PrimaryKeyConstraint("endpoint_id", name=op.f("pk_endpoints")),
        postgresql_with={"fillfactor": "50"} | STORAGE,
    )
    create_table(
        "messages",
        *(text(name) for name in ("message_id", "endpoint_id", "event_id", "event", "run_id")),
        text("body"),
        *(moment(name) for name in ("event_at", "created_at")),
        text("state"),
        sa.Column("attempts", sa.Integer(), nullable=False),
        *(
            moment(name, nullable=True)
            for name in ("tried_since", "last_attempt_at", "next_attempt_at", "delivered_at")
        ),
        sa.Column("last_status", sa.Integer()),
        text("last_error", nullable=True),
        moment("lease_until", nullable=True),
        text("lease_holder", nullable=True),
        check("messages", "event", EVENTS),
        check("messages", "state", "state IN ('pending', 'delivered', 'failed')"),
        check("messages", "attempts", "attempts >= 0"),
        check("messages", "pending_is_due", "(state = 'pending') = (next_attempt_at IS NOT NULL)"),
        check(
            "messages", "delivered_has_a_time", "(state = 'delivered') = (delivered_at IS NOT NULL)"
        ),
        check(
            "messages",
            "lease_has_holder_and_end",
            "(lease_until IS NULL) = (lease_holder IS NULL)",
        ),
        sa.PrimaryKeyConstraint("message_id", name=op.f("pk_messages")),
        postgresql_with={"fillfactor": "85"} | STORAGE,
    )
    op.create_index(
        "ix_messages_once", "messages", ["endpoint_id", "event_id"], unique=True, if_not_exists=True
    )
    for name, (columns, where) in INDEXES.items():
        condition = where and sa.text(where)
        op.create_index(
            name,
            "messages",
            columns,
            if_not_exists=True,
            postgresql_where=condition,
            sqlite_where=condition,
        )
    create_table(
        "message_attempts",
        text("message_id"),
        sa.Column("number", sa.Integer(), nullable=False, autoincrement=False),
        moment("at"),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("status", sa.Integer()),
        *(text(name, nullable=True) for name in ("answer", "error")),
        check("message_attempts", "number", "number >= 1"),
        sa.PrimaryKeyConstraint("message_id", "number", name=op.f("pk_message_attempts")),
        sa.ForeignKeyConstraint(
            ["message_id"],
            ["messages.message_id"],
            name=op.f("fk_message_attempts_message_id_messages"),
            ondelete="CASCADE",
        ),
        postgresql_with=STORAGE,
    )


def create_table(name: str, *parts: Any, **options: Any) -> None:
    op.create_table(name, *parts, if_not_exists=True, **options)


def text(name: str, *, nullable: bool = False) -> "sa.Column[str]":
    return sa.Column(name, sa.Text(), nullable=nullable)


def moment(name: str, *, nullable: bool = False) -> "sa.Column[Any]":
    return sa.Column(name, Moment, nullable=nullable)


def check(table: str, name: str, condition: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{name}"))
