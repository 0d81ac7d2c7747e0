"""Quotes apart from bills, and when a bill was read; what to do about failed runs.

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. It knows none of the new columns: a cost that it writes may be a quote, and a run
that it settles is not read again by itself. New code takes what was shown before the end for a
quote, whoever wrote it. Once the last old process is gone, `tracker reconcile --since 1d` reads the
bills of what the old ones settled meanwhile, and `tracker db recount` counts anew.

Stored costs: what was shown of a run that has not ended, or of one that failed, becomes a quote,
and so does what a completed run still has from before its end. The costs of the last
`TRACKER_HISTORY_SINCE` are read again: the next sweep goes back so far, and what it does not show
is read alone an hour later. An older cost stays, and is not called final.

On PostgreSQL the columns are added in a transaction that reads no row; index, rows and tallies
follow beside the work, a thousand rows in a transaction. Where that was interrupted it begins
again: every step may be done twice.

Revision: 0010
Follows: 0009
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from alembic import context, op

from tracker.core.run import retry_advice

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True)
INDEXES = {
    "ix_runs_recheck": (["recheck_at"], "recheck_at IS NOT NULL"),
    "ix_runs_newest_of_advice": (
        ["retry_advice", "created_at", "run_id"],
        "retry_advice IS NOT NULL",
    ),
}
TIMEOUTS = ("statement_timeout", "lock_timeout")
AT_ONCE = 1000
SINCE = timedelta(days=7)
SWEEPS_FIRST = timedelta(hours=1)

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


runs = sa.table(
    "runs",
    *(sa.column(name, sa.Text()) for name in ("run_id", "status", "error_code", "error_message")),
    *(sa.column(name, sa.Text()) for name in ("tracking", "retry_advice")),
    *(sa.column(name, Moment) for name in ("completed_at", "settled_at", "recheck_at")),
    *(sa.column(name, sa.Numeric()) for name in ("quoted_cost", "charged_cost")),
)
sweeps = sa.table(
    "sweeps",
    sa.column("id", sa.BigInteger()),
    *(sa.column(name, Moment) for name in ("started_at", "through", "generations_through")),
)


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        add_columns()
        with op.get_context().autocommit_block(), patience():
            for name in INDEXES:
                op.drop_index(name, "runs", if_exists=True, postgresql_concurrently=True)
            create_indexes(concurrently=True)
            convert(op.get_bind())
    else:
        for column in columns():
            op.add_column("runs", column)
        create_indexes(concurrently=False)
        for name in ("v_cost_daily", "run_facts"):
            op.execute(f"DROP VIEW {name}")
        make_views()
        convert(connection)


def columns() -> list[sa.Column[Any]]:
    money = sa.Numeric().with_variant(sa.Double(), "sqlite")
    return [
        sa.Column("quoted_cost", money),
        sa.Column("cost_read_at", Moment),
        sa.Column("cost_final", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("retry_advice", sa.Text()),
        sa.Column("outputs_read_at", Moment),
        sa.Column("recheck_at", Moment),
    ]


def add_columns() -> None:
    """The columns, and the views that read them, in one transaction that reads no row."""
    for column in columns():
        op.add_column("runs", column, if_not_exists=True)
    make_views()


def create_indexes(*, concurrently: bool) -> None:
    for name, (names, where) in INDEXES.items():
        op.create_index(
            name,
            "runs",
            names,
            postgresql_concurrently=concurrently,
            postgresql_where=sa.text(where),
            sqlite_where=sa.text(where),
        )


def make_views() -> None:
    connection = op.get_bind()
    words = WORDS[connection.dialect.name]

    def say(word: str, *arguments: str) -> str:
        return words[word].format(*arguments)

    made = {
        "run_facts": _facts(say),
        "v_cost_daily": _cost_daily(say),
        "v_failures_daily": _failures_daily(),
    }
    replace = "OR REPLACE " if connection.dialect.name == "postgresql" else ""
    for name, query in made.items():
        connection.exec_driver_sql(f"CREATE {replace}VIEW {name} AS {query}")


def convert(connection: sa.Connection) -> None:
    """Bring the stored rows to the new meaning, so many in a transaction, and count them anew."""
    now = datetime.now(UTC)  # noqa: TID251
    since = now - context.config.attributes.get("history_since", SINCE)
    before = ""
    while some := _next(connection, runs.c.run_id, before):
        before = some[-1]
        _convert_costs(connection, some, now, since)
        _advise(connection, some)
    place = 0
    while some := _next(connection, sweeps.c.id, place):
        place = some[-1]
        # Then the next one goes back to the first sweep before them, or as far as a first sweep.
        connection.execute(
            sa.update(sweeps)
            .where(sweeps.c.id.in_(some), sweeps.c.started_at > since)
            .values(through=None, generations_through=None)
        )
    connection.execute(sa.text(COUNT))


def _next(connection: sa.Connection, key: Any, after: Any) -> list[Any]:
    """The next keys of a table."""
    page = sa.select(key).where(key > after).order_by(key).limit(AT_ONCE)
    return list(connection.execute(page).scalars())


def _convert_costs(
    connection: sa.Connection, run_ids: list[str], now: datetime, since: datetime
) -> None:
    c = runs.c
    # The digit of `ranks` that says on whose word the cost stands: 4 and more is the API's, of the
    # end.
    of_the_end = sa.and_(c.status == "completed", sa.text("ranks / 134217728 % 8 >= 4"))
    quoted = sa.and_(c.charged_cost.is_not(None), sa.not_(of_the_end))
    recent = sa.and_(
        c.tracking == "settled", sa.func.coalesce(c.completed_at, c.settled_at) > since
    )
    among = _locked(c.run_id.in_(run_ids), sa.or_(quoted, recent))
    due = sa.literal(now + SWEEPS_FIRST, Moment)
    connection.execute(
        sa.update(runs)
        .where(c.run_id.in_(among))
        .values(
            quoted_cost=sa.case((quoted, c.charged_cost), else_=c.quoted_cost),
            charged_cost=sa.case((quoted, sa.null()), else_=c.charged_cost),
            recheck_at=sa.case((recent, due), else_=c.recheck_at),
        )
    )


def _advise(connection: sa.Connection, run_ids: list[str]) -> None:
    """What to do about failed runs, by the table of the version that runs this."""
    c = runs.c
    failed = sa.select(c.run_id, c.error_code, c.error_message).where(
        c.run_id.in_(run_ids), c.status == "failed", c.retry_advice.is_(None)
    )
    advised: dict[str, list[str]] = {}
    for run_id, code, message in connection.execute(failed):
        advised.setdefault(retry_advice(code or "", message or ""), []).append(run_id)
    for advice, some in advised.items():
        among = _locked(c.run_id.in_(some))
        connection.execute(
            sa.update(runs).where(c.run_id.in_(among)).values(retry_advice=str(advice))
        )


def _locked(*conditions: Any) -> Any:
    """These runs, locked in the order of those who write."""
    among = sa.select(runs.c.run_id).where(*conditions)
    return among.order_by(runs.c.run_id).with_for_update()


# The difference between what is tallied and what is true, as one more change: whoever writes runs
# meanwhile is not kept, and is counted exactly once. What retention has removed stays.
_MEASURES = "measure IN ('cost', 'quote', 'failure')"
_MARK = "(SELECT max(since) FROM run_tallies WHERE measure = 'pruned')"
_STILL_HERE = f"({_MARK} IS NULL OR since > {_MARK})"
COUNT = f"""
INSERT INTO run_tally_changes ({", ".join(KEY)}, runs, amount)
SELECT {", ".join(KEY)}, CAST(sum(runs) AS bigint), CAST(sum(amount) AS bigint) FROM (
    SELECT {", ".join(KEY)}, count(*) AS runs, sum(amount) AS amount
    FROM run_facts WHERE {_MEASURES} AND {_STILL_HERE} GROUP BY {", ".join(KEY)}
    UNION ALL
    SELECT {", ".join(KEY)}, -sum(runs), -sum(amount)
    FROM run_tallies_now WHERE {_MEASURES} AND {_STILL_HERE} GROUP BY {", ".join(KEY)}
) AS difference
GROUP BY {", ".join(KEY)} HAVING sum(runs) <> 0 OR sum(amount) <> 0
"""


def _facts(say: Any) -> str:
    """What each run counts for: the same as `tracker.core.rollup.facts`, for counting anew."""
    billed = (
        "CASE WHEN cost_final THEN 'final'"
        " WHEN status = 'completed' AND charged_cost IS NULL AND recheck_at IS NULL"
        " THEN 'unpriced' ELSE 'open' END"
    )
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

    def billionths(column: str) -> str:
        usd = say("greatest", say("least", column, "1000000"), "0")
        usd = f"floor(CAST({usd} AS double precision) * 1000000000 + 0.5)"
        return f"CASE WHEN {column} IS NULL THEN 0 ELSE CAST({usd} AS bigint) END"

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
            {billed}, 0, {billionths("charged_cost")}
        FROM runs WHERE {ended} AND tracking = 'settled'
        UNION ALL
        SELECT run_id, 'quote', {say("day", ended_at)}, {workspace}, {technique}, status,
            {billed}, 0, {billionths("quoted_cost")}
        FROM runs WHERE {ended} AND tracking = 'settled' AND NOT cost_final
            AND charged_cost IS NULL AND quoted_cost IS NOT NULL
        UNION ALL
        SELECT run_id, 'failure', {say("day", ended_at)}, {workspace}, {technique}, status,
            coalesce(retry_advice, 'not_retryable'), 0, 0
        FROM runs WHERE {ended} AND status = 'failed'"""


def _count(column: str, *values: str) -> str:
    """How many runs have one of the values."""
    listed = ", ".join(f"'{value}'" for value in values)
    return _count_where(f"{column} IN ({listed})")


def _count_where(condition: str) -> str:
    return f"CAST(sum(CASE WHEN {condition} THEN runs ELSE 0 END) AS bigint)"


def _cost_daily(say: Any) -> str:
    of_costs = "measure = 'cost'"
    return f"""
        SELECT counted.day, nullif(counted.workspace_id, '') AS workspace_id,
            nullif(counted.technique_id, '') AS technique_id, t.name AS technique_name,
            counted.runs, counted.completed, counted.failed, counted.unpriced,
            {say("usd", "counted.amount")} AS cost, counted.not_final,
            {say("usd", "counted.quoted")} AS quoted
        FROM (
            SELECT since AS day, workspace_id, technique_id,
                {_count_where(of_costs)} AS runs,
                {_count_where(f"{of_costs} AND status = 'completed'")} AS completed,
                {_count_where(f"{of_costs} AND status = 'failed'")} AS failed,
                {_count_where(f"{of_costs} AND word = 'unpriced'")} AS unpriced,
                {_count_where(f"{of_costs} AND word IN ('open', 'unpriced')")} AS not_final,
                sum(CASE WHEN {of_costs} THEN amount ELSE 0 END) AS amount,
                sum(CASE WHEN {of_costs} THEN 0 ELSE amount END) AS quoted
            FROM run_tallies_now WHERE measure IN ('cost', 'quote')
            GROUP BY since, workspace_id, technique_id
            HAVING {_count_where(of_costs)} <> 0
        ) AS counted
        LEFT JOIN techniques t ON t.technique_id = counted.technique_id"""


def _failures_daily() -> str:
    return """
        SELECT counted.day, nullif(counted.workspace_id, '') AS workspace_id,
            nullif(counted.technique_id, '') AS technique_id, t.name AS technique_name,
            counted.retry_advice, counted.runs
        FROM (
            SELECT since AS day, workspace_id, technique_id, word AS retry_advice,
                CAST(sum(runs) AS bigint) AS runs
            FROM run_tallies_now WHERE measure = 'failure'
            GROUP BY since, workspace_id, technique_id, word
            HAVING sum(runs) <> 0
        ) AS counted
        LEFT JOIN techniques t ON t.technique_id = counted.technique_id"""


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
