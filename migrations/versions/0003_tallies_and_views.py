"""Tallies of runs, and the views that dashboards read: docs/views.md describes each column.

Until every process has been restarted the old code still writes runs, and counts nothing. Whoever
upgrades a tracker that is in use lets `tracker db recount` make the tallies right afterwards.

Revision: 0003
Follows: 0002
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True)
SerialId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

KEY = ("measure", "since", "workspace_id", "technique_id", "status", "word", "bucket")
EDGES = (
    *(100, 200, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 15_000, 20_000, 30_000, 45_000),
    *(60_000, 90_000, 120_000, 180_000, 300_000, 600_000, 1_200_000, 1_800_000, 3_600_000),
    *(10_800_000, 21_600_000, 43_200_000, 86_400_000),
)
BEYOND = 2_147_483_647

# What the two databases say differently. Moments are text on SQLite, 26 characters long.
_MICROSECONDS = (
    "(CAST(strftime('%s', substr({0}, 1, 19)) AS INTEGER) * 1000000"
    " + CAST(substr({0}, 21, 6) AS INTEGER))"
)
WORDS: dict[str, dict[str, str]] = {
    "postgresql": {
        "always": "TIMESTAMPTZ '1970-01-01 00:00:00+00'",
        "now": "now()",
        "hour": "date_trunc('hour', {0}, 'UTC')",
        "day": "date_trunc('day', {0}, 'UTC')",
        "milliseconds": "CAST(floor(extract(epoch FROM {1} - {0}) * 1000) AS bigint)",
        "seconds": "CAST(extract(epoch FROM {1} - {0}) AS double precision)",
        "least": "least({0}, {1})",
        "greatest": "greatest({0}, {1})",
        "field": "{0} ->> '{1}'",
        "usd": "round({0} / 1000000000.0, 9)",
        "once": "OFFSET 0",  # what is selected is computed once, not wherever it is named
    },
    "sqlite": {
        "always": "'1970-01-01 00:00:00.000000'",
        "now": "strftime('%Y-%m-%d %H:%M:%f000', 'now')",
        "hour": "(substr({0}, 1, 13) || ':00:00.000000')",
        "day": "(substr({0}, 1, 10) || ' 00:00:00.000000')",
        "milliseconds": f"(({_MICROSECONDS.format('{1}')} - {_MICROSECONDS.format('{0}')}) / 1000)",
        "seconds": f"(({_MICROSECONDS.format('{1}')} - {_MICROSECONDS.format('{0}')}) / 1000000.0)",
        "least": "min({0}, {1})",
        "greatest": "max({0}, {1})",
        "field": "json_extract({0}, '$.{1}')",
        "usd": "({0} / 1000000000.0)",
        "once": "LIMIT -1",
    },
}


def upgrade() -> None:
    op.add_column("runs", sa.Column("end_seen_at", Moment))
    op.execute(END_SEEN)
    op.create_table(
        "run_tallies",
        *tally_columns(),
        sa.PrimaryKeyConstraint(*KEY, name=op.f("pk_run_tallies")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "run_tally_changes",
        sa.Column("id", SerialId, sa.Identity(), nullable=False),
        *tally_columns(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run_tally_changes")),
        postgresql_with={
            "autovacuum_vacuum_scale_factor": "0",
            "autovacuum_vacuum_threshold": "1000",
        },
    )
    op.create_index(
        "ix_sweeps_generations",
        "sweeps",
        ["workspace_id", "started_at"],
        postgresql_where=sa.text("generations_through IS NOT NULL"),
        sqlite_where=sa.text("generations_through IS NOT NULL"),
    )
    connection = op.get_bind()
    for name, query in views(WORDS[connection.dialect.name]).items():
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {query}")
    op.execute(COUNT)


def tally_columns() -> list[Any]:
    """What both tables have: columns cannot be shared."""
    return [
        sa.Column("measure", sa.Text(), nullable=False),
        sa.Column("since", Moment, nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in KEY[2:6]),
        sa.Column("bucket", sa.Integer(), nullable=False),
        sa.Column("runs", sa.BigInteger(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
    ]


# When the end was first known was not kept before; the timeline tells it where nothing else does.
END_SEEN = """
UPDATE runs SET end_seen_at = CASE
    WHEN ended_via = 'callback' AND callback_at IS NOT NULL THEN callback_at
    ELSE coalesce(
        settled_at,
        (SELECT min(e.at) FROM run_events e
         WHERE e.run_id = runs.run_id AND e.status IN ('completed', 'failed')),
        first_seen_at)
    END
WHERE ended_via IS NOT NULL
"""

COUNT = f"""
INSERT INTO run_tallies ({", ".join(KEY)}, runs, amount)
SELECT {", ".join(KEY)}, count(*), sum(amount) FROM run_facts GROUP BY {", ".join(KEY)}
"""


def views(words: dict[str, str]) -> dict[str, str]:
    """The views by name, each after those that it reads."""

    def say(word: str, *arguments: str) -> str:
        return words[word].format(*arguments)

    return {
        "run_facts": _facts(say),
        "run_tallies_now": " UNION ALL ".join(
            f"SELECT {', '.join(KEY)}, runs, amount FROM {table}"
            for table in ("run_tallies", "run_tally_changes")
        ),
        "v_run_states": _run_states(),
        "v_ends_hourly": _ends_hourly(),
        "v_lags_hourly": _lags_hourly(),
        "v_callback_health": _callback_health(say),
        "v_cost_daily": _cost_daily(say),
        "v_overdue_runs": _overdue_runs(say),
        "v_sweeps": _sweeps(),
        "v_open_starts": _open_starts(say),
        "v_quarantine": _quarantine(say),
    }


def _facts(say: Any) -> str:
    """What each run counts for: the same as `tracker.core.rollup.facts`, for counting anew."""
    bucket = " ".join(f"WHEN amount <= {edge} THEN {edge}" for edge in EDGES)
    adopted = (
        "(completed_at IS NOT NULL AND completed_at < first_seen_at"
        " AND source NOT IN ('start', 'callback'))"
    )
    hour = say("hour", "end_seen_at")
    ended_at = "coalesce(completed_at, end_seen_at)"
    ended = "end_seen_at IS NOT NULL AND ended_via IS NOT NULL"
    workspace = "coalesce(workspace_id, '')"
    technique = "coalesce(technique_id, '')"

    def lag(measure: str, until: str) -> str:
        took = say("milliseconds", "completed_at", until)
        took = say("least", say("greatest", took, "0"), str(BEYOND))
        return f"""
        SELECT run_id, '{measure}', since, workspace_id, '', '', word,
            CASE {bucket} ELSE {BEYOND} END, amount
        FROM (
            SELECT run_id, {hour} AS since, {workspace} AS workspace_id, ended_via AS word,
                {took} AS amount
            FROM runs
            WHERE {ended} AND completed_at IS NOT NULL AND {until} IS NOT NULL AND NOT {adopted}
            {say("once")}
        ) AS took"""

    cost = say("greatest", say("least", "charged_cost", "1000000"), "0")
    cost = f"floor(CAST({cost} AS double precision) * 1000000000 + 0.5)"
    return f"""
        SELECT run_id, 'state' AS measure, {say("always")} AS since, {workspace} AS workspace_id,
            {technique} AS technique_id, status, tracking AS word, 0 AS bucket,
            CAST(0 AS bigint) AS amount
        FROM runs
        UNION ALL
        SELECT run_id, 'end', {hour}, {workspace}, '', status, ended_via,
            CASE WHEN {adopted} THEN 1 ELSE 0 END, 0
        FROM runs WHERE {ended}
        UNION ALL {lag("seen", "end_seen_at")}
        UNION ALL {lag("settled", "settled_at")}
        UNION ALL
        SELECT run_id, 'callback', {hour}, {workspace}, '', '', CASE
            WHEN callback_at IS NULL THEN 'missed'
            WHEN NOT callback_expected THEN 'unexpected'
            WHEN ended_via = 'callback' THEN 'came' ELSE 'late' END, 0, 0
        FROM runs WHERE {ended} AND (callback_expected OR callback_at IS NOT NULL)
        UNION ALL
        SELECT run_id, 'cost', {say("day", ended_at)}, {workspace}, {technique}, status,
            CASE WHEN charged_cost IS NULL THEN 'unpriced' ELSE 'priced' END, 0,
            CASE WHEN charged_cost IS NULL THEN 0 ELSE CAST({cost} AS bigint) END
        FROM runs WHERE {ended} AND tracking = 'settled'"""


def _run_states() -> str:
    return """
        SELECT nullif(counted.workspace_id, '') AS workspace_id,
            nullif(counted.technique_id, '') AS technique_id, t.name AS technique_name,
            counted.status, counted.tracking, counted.runs
        FROM (
            SELECT workspace_id, technique_id, status, word AS tracking,
                CAST(sum(runs) AS bigint) AS runs
            FROM run_tallies_now WHERE measure = 'state'
            GROUP BY workspace_id, technique_id, status, word
            HAVING sum(runs) <> 0
        ) AS counted
        LEFT JOIN techniques t ON t.technique_id = counted.technique_id"""


def _count(column: str, *values: str) -> str:
    """How many runs have one of the values."""
    listed = ", ".join(f"'{value}'" for value in values)
    return _count_where(f"{column} IN ({listed})")


def _count_where(condition: str) -> str:
    return f"CAST(sum(CASE WHEN {condition} THEN runs ELSE 0 END) AS bigint)"


def _ends_hourly() -> str:
    """The quantiles come from how many runs there are up to each edge: plain sums, so that one
    pass over the tallies does, and conditions on the hour reach them."""
    measures = ("seen", "settled")

    def upto(measure: str, edge: int) -> str:
        return f"{_count_where(f'measure = {measure!r} AND bucket <= {edge}')} AS {measure}_{edge}"

    def quantile(measure: str, hundredths: int) -> str:
        edges = " ".join(
            f"WHEN {measure}_{edge} * 100 >= {measure}_count * {hundredths} THEN {edge / 1000}"
            for edge in EDGES[:-1]
        )
        # Of what took longer than the last edge nothing more is known.
        chosen = f"CASE WHEN {measure}_count > 0 THEN CASE {edges} ELSE {EDGES[-1] / 1000} END END"
        return f"CAST({chosen} AS double precision) AS {measure}_p{hundredths}"

    counted = ", ".join(
        f"{_count('measure', measure)} AS {measure}_count,"
        f" sum(CASE WHEN measure = '{measure}' THEN amount END) AS {measure}_amount, "
        + ", ".join(upto(measure, edge) for edge in EDGES[:-1])
        for measure in measures
    )
    shown = ", ".join(
        f"{measure}_count, CAST({measure}_amount / 1000.0 / nullif({measure}_count, 0)"
        f" AS double precision) AS {measure}_avg,"
        f" {quantile(measure, 50)}, {quantile(measure, 95)}"
        for measure in measures
    )
    return f"""
        SELECT hour, nullif(workspace_id, '') AS workspace_id, ended_via, ends, completed, failed,
            adopted, {shown}
        FROM (
            SELECT since AS hour, workspace_id, word AS ended_via,
                {_count("measure", "end")} AS ends,
                {_count_where("measure = 'end' AND status = 'completed'")} AS completed,
                {_count_where("measure = 'end' AND status = 'failed'")} AS failed,
                {_count_where("measure = 'end' AND bucket = 1")} AS adopted,
                {counted}
            FROM run_tallies_now WHERE measure IN ('end', 'seen', 'settled')
            GROUP BY since, workspace_id, word
            HAVING {_count("measure", "end")} <> 0
        ) AS counted"""


def _lags_hourly() -> str:
    return f"""
        SELECT since AS hour, nullif(workspace_id, '') AS workspace_id, word AS ended_via,
            measure AS lag,
            CAST(CASE WHEN bucket <= {EDGES[-1]} THEN bucket / 1000.0 END AS double precision)
                AS le_seconds,
            CAST(sum(runs) AS bigint) AS runs
        FROM run_tallies_now WHERE measure IN ('seen', 'settled')
        GROUP BY measure, since, workspace_id, word, bucket
        HAVING sum(runs) <> 0"""


def _callback_health(say: Any) -> str:
    expected = _count("word", "came", "late", "missed")
    rate = (
        "CAST(sum(CASE WHEN word = 'missed' THEN runs ELSE 0 END) AS double precision)"
        f" / nullif({expected}, 0)"
    )
    counts = ", ".join(
        f"{_count('word', name)} AS {name}" for name in ("came", "late", "missed", "unexpected")
    )
    return f"""
        SELECT {say("day", "since")} AS day, nullif(workspace_id, '') AS workspace_id,
            {expected} AS expected, {counts}, {rate} AS miss_rate
        FROM run_tallies_now WHERE measure = 'callback'
        GROUP BY {say("day", "since")}, workspace_id
        HAVING sum(runs) <> 0"""


def _cost_daily(say: Any) -> str:
    return f"""
        SELECT counted.day, nullif(counted.workspace_id, '') AS workspace_id,
            nullif(counted.technique_id, '') AS technique_id, t.name AS technique_name,
            counted.runs, counted.completed, counted.failed, counted.unpriced,
            {say("usd", "counted.amount")} AS cost
        FROM (
            SELECT since AS day, workspace_id, technique_id, CAST(sum(runs) AS bigint) AS runs,
                {_count("status", "completed")} AS completed,
                {_count("status", "failed")} AS failed,
                {_count("word", "unpriced")} AS unpriced, sum(amount) AS amount
            FROM run_tallies_now WHERE measure = 'cost'
            GROUP BY since, workspace_id, technique_id
            HAVING sum(runs) <> 0
        ) AS counted
        LEFT JOIN techniques t ON t.technique_id = counted.technique_id"""


def _overdue_runs(say: Any) -> str:
    overdue = say("seconds", "next_check_at", say("now"))
    age = say("seconds", "created_at", say("now"))
    return f"""
        SELECT run_id, workspace_id, technique_id, technique_name, status, created_at, source,
            callback_expected, callback_at, next_check_at, {overdue} AS overdue_seconds,
            {age} AS age_seconds, checks, last_error
        FROM runs
        WHERE next_check_at IS NOT NULL AND next_check_at <= {say("now")}"""


def _sweeps() -> str:
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
            reached.through AS through, generations.generations_through AS generations_through
        FROM ({named} UNION ALL {unnamed}) AS found
        LEFT JOIN sweeps newest ON newest.id = found.last_id
        LEFT JOIN sweeps complete ON complete.id = found.complete_id
        LEFT JOIN sweeps reached ON reached.id = found.through_id
        LEFT JOIN sweeps generations ON generations.id = found.generations_id"""


def _open_starts(say: Any) -> str:
    columns = f"""
        SELECT workspace_slot, idempotency_key, technique_id, state, created_at, sent_at,
            {say("seconds", "created_at", say("now"))} AS age_seconds,
            {say("field", "error", "code")} AS error_code,
            {say("field", "error", "message")} AS error_message
        FROM starts"""
    # Each half has its own index.
    return f"""
        {columns} WHERE state IN ('stored', 'sent')
        UNION ALL {columns} WHERE state = 'unresolved'"""


def _quarantine(say: Any) -> str:
    return f"""
        SELECT delivery_id, run_id, workspace_id, event_type, api_version, reason, received_at,
            last_received_at, receipts, {say("seconds", "received_at", say("now"))} AS age_seconds
        FROM deliveries WHERE outcome = 'quarantined'"""
