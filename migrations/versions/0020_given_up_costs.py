"""Runs whose cost was given up count as unpriced in what was spent too, with their quote beside it.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It counts such runs as quoted, as before. Once the last old process is gone,
`tracker db recount` counts anew. Amounts are the same either way: budgets add up both.

Three views are replaced. What is tallied follows, on PostgreSQL beside the work, with one statement
that reads the runs. Where that was interrupted it begins again: every step may be done twice.

Revision: 0020
Follows: 0019
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

TIMEOUTS = ("statement_timeout", "lock_timeout")
KEY = ("measure", "since", "workspace_id", "technique_id", "status", "word", "bucket")

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
    postgres = connection.dialect.name == "postgresql"
    make_views(connection, postgres=postgres)
    if postgres:
        with op.get_context().autocommit_block(), patience():
            op.get_bind().execute(sa.text(COUNT))
    else:
        connection.execute(sa.text(COUNT))


def make_views(connection: sa.Connection, *, postgres: bool) -> None:
    words = WORDS[connection.dialect.name]

    def say(word: str, *arguments: str) -> str:
        return words[word].format(*arguments)

    made = {
        "run_spending": _spending(say),
        "v_spending_daily": _daily(say, "spent"),
        "v_spending_daily_by_tag": _daily(say, "tagged"),
    }
    for name, query in made.items():
        if not postgres:
            connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")
        replace = "OR REPLACE " if postgres else ""
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
        WHEN tracking = 'settled' AND recheck_at IS NULL AND status <> 'failed' THEN 'unpriced'
        WHEN {quote} IS NOT NULL OR tracking = 'settled' THEN 'quoted' END"""
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
    def of(column: str, *parts: str) -> str:
        among = ", ".join(f"'{part}'" for part in parts)
        return f"CAST(sum(CASE WHEN status IN ({among}) THEN {column} ELSE 0 END) AS bigint)"

    tag = "counted.word AS tag, " if measure == "tagged" else ""
    return f"""
        SELECT counted.day, nullif(counted.workspace_id, '') AS workspace_id,
            nullif(counted.technique_id, '') AS technique_id, t.name AS technique_name, {tag}
            counted.runs, {say("usd", "counted.charged")} AS charged,
            {say("usd", "counted.quoted")} AS quoted, counted.unpriced
        FROM (
            SELECT since AS day, workspace_id, technique_id, word,
                CAST(sum(runs) AS bigint) AS runs, {of("amount", "charged")} AS charged,
                {of("amount", "quoted", "unpriced")} AS quoted,
                {of("runs", "unpriced")} AS unpriced
            FROM run_tallies_now WHERE measure = '{measure}'
            GROUP BY since, workspace_id, technique_id, word HAVING sum(runs) <> 0
        ) AS counted
        LEFT JOIN techniques t ON t.technique_id = counted.technique_id"""


# The difference between what is tallied and what is true, as one more change: whoever writes runs
# meanwhile is not kept, and is counted exactly once. What retention has removed stays.
_MEASURES = "measure IN ('spent', 'tagged')"
_MARK = "(SELECT max(since) FROM run_tallies WHERE measure = 'pruned')"
_STILL_HERE = f"({_MARK} IS NULL OR since > {_MARK})"
COUNT = f"""
INSERT INTO run_tally_changes ({", ".join(KEY)}, runs, amount)
SELECT {", ".join(KEY)}, CAST(sum(runs) AS bigint), CAST(sum(amount) AS bigint) FROM (
    SELECT {", ".join(KEY)}, count(*) AS runs, sum(amount) AS amount
    FROM run_spending WHERE {_STILL_HERE} GROUP BY {", ".join(KEY)}
    UNION ALL
    SELECT {", ".join(KEY)}, -sum(runs), -sum(amount)
    FROM run_tallies_now WHERE {_MEASURES} AND {_STILL_HERE} GROUP BY {", ".join(KEY)}
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
