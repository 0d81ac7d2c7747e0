"""Tags, reservations, and what was spent by the day on which it was started.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It leaves out the new columns: what it starts reserves nothing and has no tags, and
a cost that it writes is not counted as spent. Once the last old process is gone, `tracker db
recount` counts anew.

On PostgreSQL the columns are added in a transaction that reads no row; indexes and tallies follow
beside the work. Where that was interrupted it begins again: every step may be done twice.

Revision: 0012
Follows: 0011
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

TIMEOUTS = ("statement_timeout", "lock_timeout")
KEY = ("measure", "since", "workspace_id", "technique_id", "status", "word", "bucket")
INDEXES: dict[str, tuple[str, list[str], str, dict[str, Any]]] = {
    "ix_runs_newest_of_project": (
        "runs",
        ["project_id", "created_at", "run_id"],
        "project_id IS NOT NULL",
        {},
    ),
    "ix_starts_several": (
        "starts",
        ["reserved_at"],
        "state = 'started' AND reserved_runs > 1",
        {},
    ),
    "ix_run_tallies_tagged": ("run_tallies", ["word", "since"], "measure = 'tagged'", {}),
    "ix_run_tally_changes_spent": (
        "run_tally_changes",
        ["measure", "word"],
        "measure IN ('spent', 'tagged')",
        {},
    ),
}

OF_TAGS = {
    "postgresql": {
        "ix_runs_tags": (
            "runs",
            ["tags"],
            "tags IS NOT NULL",
            {"postgresql_using": "gin", "postgresql_ops": {"tags": "jsonb_path_ops"}},
        )
    },
    "sqlite": {
        "ix_runs_newest_tagged": (
            "runs",
            ["created_at", "run_id", "tags"],
            "tags IS NOT NULL",
            {},
        )
    },
}

# What the two databases say differently. Moments are text on SQLite, 26 characters long.
WORDS = {
    "postgresql": {
        "day": "date_trunc('day', {0}, 'UTC')",
        "least": "least({0}, {1})",
        "greatest": "greatest({0}, {1})",
        "each": "jsonb_each_text(tags) AS tag",
        "usd": "round({0} / 1000000000.0, 9)",
    },
    "sqlite": {
        "day": "(substr({0}, 1, 10) || ' 00:00:00.000000')",
        "least": "min({0}, {1})",
        "greatest": "max({0}, {1})",
        "each": "json_each(tags) AS tag",
        "usd": "({0} / 1000000000.0)",
    },
}


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        add_columns(if_not_exists=True)
        make_views(connection)
        with op.get_context().autocommit_block(), patience():
            for name, (table, *_) in indexes().items():
                op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
            create_indexes(concurrently=True)
            op.get_bind().execute(sa.text(COUNT))
    else:
        add_columns(if_not_exists=False)
        create_indexes(concurrently=False)
        make_views(connection)
        connection.execute(sa.text(COUNT))


def add_columns(*, if_not_exists: bool) -> None:
    """Runs before starts: the order in which processes write them."""
    for table in ("runs", "starts"):
        columns = [
            sa.Column("tags", sa.JSON().with_variant(JSONB(), "postgresql")),
            sa.Column("reserved_at", sa.DateTime(timezone=True)),
            sa.Column("reserved_cost", sa.Numeric().with_variant(sa.Double(), "sqlite")),
        ]
        if table == "starts":
            columns.append(sa.Column("reserved_runs", sa.Integer()))
        for column in columns:
            op.add_column(table, column, if_not_exists=if_not_exists or None)


def indexes() -> dict[str, Any]:
    return INDEXES | OF_TAGS[op.get_bind().dialect.name]


def create_indexes(*, concurrently: bool) -> None:
    for name, (table, columns, where, how) in indexes().items():
        op.create_index(
            name,
            table,
            columns,
            postgresql_concurrently=concurrently,
            postgresql_where=sa.text(where),
            sqlite_where=sa.text(where),
            **how,
        )


def make_views(connection: sa.Connection) -> None:
    words = WORDS[connection.dialect.name]

    def say(word: str, *arguments: str) -> str:
        return words[word].format(*arguments)

    made = {
        "run_spending": _spending(say),
        "v_spending_daily": _daily(say, "spent"),
        "v_spending_daily_by_tag": _daily(say, "tagged"),
    }
    replace = "OR REPLACE " if connection.dialect.name == "postgresql" else ""
    for name, query in made.items():
        connection.exec_driver_sql(f"CREATE {replace}VIEW {name} AS {query}")


def _spending(say: Any) -> str:
    """What each run counts for as spent: the same as `tracker.core.rollup` has it."""
    usd = say("greatest", say("least", "coalesce(cost, 0)", "1000000"), "0")
    amount = f"CAST(floor(CAST({usd} AS double precision) * 1000000000 + 0.5) AS bigint)"
    quote = say(
        "greatest",
        "coalesce(quoted_cost, reserved_cost)",
        "coalesce(reserved_cost, quoted_cost)",
    )
    part = f"""CASE WHEN charged_cost IS NOT NULL OR cost_final THEN 'charged'
        WHEN {quote} IS NOT NULL THEN 'quoted' WHEN tracking = 'settled' THEN 'unpriced' END"""
    cost = f"CASE WHEN charged_cost IS NOT NULL OR cost_final THEN charged_cost ELSE {quote} END"
    day = say("day", "coalesce(reserved_at, created_at)")
    of = f"""(SELECT run_id, tags, {day} AS since, coalesce(workspace_id, '') AS workspace_id,
            coalesce(technique_id, '') AS technique_id, {part} AS part, {cost} AS cost
        FROM runs) AS spent"""
    columns = f"workspace_id, technique_id, part AS status, {{0}} AS word, 0 AS bucket, {amount}"
    return f"""
        SELECT run_id, 'spent' AS measure, since, {columns.format("''")} AS amount
        FROM {of} WHERE part IS NOT NULL
        UNION ALL
        SELECT run_id, 'tagged', since, {columns.format("tag.key || '=' || tag.value")}
        FROM {of} CROSS JOIN {say("each")} WHERE part IS NOT NULL"""


def _daily(say: Any, measure: str) -> str:
    def of(part: str, column: str) -> str:
        return f"CAST(sum(CASE WHEN status = '{part}' THEN {column} ELSE 0 END) AS bigint)"

    tag = "counted.word AS tag, " if measure == "tagged" else ""
    return f"""
        SELECT counted.day, nullif(counted.workspace_id, '') AS workspace_id,
            nullif(counted.technique_id, '') AS technique_id, t.name AS technique_name, {tag}
            counted.runs, {say("usd", "counted.charged")} AS charged,
            {say("usd", "counted.quoted")} AS quoted, counted.unpriced
        FROM (
            SELECT since AS day, workspace_id, technique_id, word,
                CAST(sum(runs) AS bigint) AS runs, {of("charged", "amount")} AS charged,
                {of("quoted", "amount")} AS quoted, {of("unpriced", "runs")} AS unpriced
            FROM run_tallies_now WHERE measure = '{measure}'
            GROUP BY since, workspace_id, technique_id, word HAVING sum(runs) <> 0
        ) AS counted
        LEFT JOIN techniques t ON t.technique_id = counted.technique_id"""


# The difference between what is tallied and what is true, as one more change: whoever writes runs
# meanwhile is not kept, and is counted exactly once. What retention has removed stays away.
COUNT = f"""
INSERT INTO run_tally_changes ({", ".join(KEY)}, runs, amount)
SELECT {", ".join(KEY)}, CAST(sum(runs) AS bigint), CAST(sum(amount) AS bigint) FROM (
    SELECT {", ".join(KEY)}, count(*) AS runs, sum(amount) AS amount
    FROM run_spending GROUP BY {", ".join(KEY)}
    UNION ALL
    SELECT {", ".join(KEY)}, -sum(runs), -sum(amount)
    FROM run_tallies_now WHERE measure IN ('spent', 'tagged') GROUP BY {", ".join(KEY)}
) AS difference
GROUP BY {", ".join(KEY)} HAVING sum(runs) <> 0 OR sum(amount) <> 0
"""


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
