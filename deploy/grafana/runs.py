"""The dashboard of the runs, from the SQL views, for any time range.

It queries views only, so the read-only role of docs/views.md is enough. Unknown workspaces are
named "unknown", since a variable cannot hold NULL.
"""

from typing import Final

from panels import Row, Show

WORKSPACES: Final = """SELECT coalesce(workspace_id, 'unknown') FROM v_run_states
UNION SELECT coalesce(workspace_id, 'unknown') FROM v_sweeps
UNION SELECT 'unknown' ORDER BY 1"""

_W: Final = "coalesce(workspace_id, 'unknown') IN (${workspace:sqlstring})"
_DAYS: Final = "day >= date_trunc('day', $__timeFrom()::timestamptz) AND day <= $__timeTo()"


def _lags(lag: str) -> tuple[tuple[str, str], ...]:
    """Quantiles over all workspaces and sources of an hour: the upper edge of their bucket."""
    query = f"""SELECT hour AS time,
    min(CASE WHEN upto >= 0.5 * total THEN le END) AS p50,
    min(CASE WHEN upto >= 0.95 * total THEN le END) AS p95
FROM (
    SELECT hour, le, sum(runs) OVER (PARTITION BY hour ORDER BY le) AS upto,
        sum(runs) OVER (PARTITION BY hour) AS total
    FROM (
        SELECT hour, coalesce(le_seconds, 86400) AS le, sum(runs) AS runs
        FROM v_lags_hourly
        WHERE lag = '{lag}' AND $__timeFilter(hour) AND {_W}
        GROUP BY 1, 2
    ) AS counted
) AS ranked
GROUP BY hour ORDER BY hour"""
    return ((query, ""),)


GLANCE: Final = Row(
    "At a glance",
    (
        Show(
            title="Open runs",
            kind="stat",
            width=4,
            queries=(
                (
                    "SELECT coalesce(sum(runs), 0) AS open FROM v_run_states\n"
                    f"WHERE tracking = 'active' AND {_W}",
                    "",
                ),
            ),
            about="Runs that are not settled now: in progress, or finished and fetching results.",
        ),
        Show(
            title="Overdue",
            kind="stat",
            width=4,
            queries=(
                (
                    "SELECT count(*) AS overdue FROM v_overdue_runs\n"
                    f"WHERE (overdue_seconds > 60 OR retrying) AND {_W}",
                    "",
                ),
            ),
            about="Runs due to be polled for over a minute, or waiting for a retry.",
            limits=(1, 100),
        ),
        Show(
            title="Missed callbacks",
            kind="stat",
            width=4,
            unit="percentunit",
            queries=(
                (
                    "SELECT sum(missed)::float8 / nullif(sum(expected), 0) AS miss_rate\n"
                    f"FROM v_callback_health WHERE {_DAYS} AND {_W}",
                    "",
                ),
            ),
            about="Share of the runs whose end became known on these days.",
            limits=(0.05, 0.2),
        ),
        Show(
            title="Cost",
            kind="stat",
            width=4,
            unit="currencyUSD",
            queries=(
                (
                    "SELECT coalesce(sum(cost), 0)::float8 AS cost FROM v_cost_daily\n"
                    f"WHERE {_DAYS} AND {_W}",
                    "",
                ),
            ),
            about="Of the settled runs that ended on these days (UTC); more bills may follow, see "
            "“not final” below.",
            decimals=2,
        ),
        Show(
            title="Quarantined",
            kind="stat",
            width=4,
            queries=(
                (
                    "SELECT count(*) AS quarantined FROM v_quarantine\n"
                    f"WHERE acknowledged_at IS NULL AND {_W}",
                    "",
                ),
            ),
            about="Authentic callbacks that were not understood and are not acknowledged, now.",
            limits=(1, None),
        ),
        Show(
            title="Unresolved starts",
            kind="stat",
            width=4,
            queries=(
                (
                    "SELECT count(*) AS unresolved FROM v_open_starts\nWHERE state = 'unresolved'",
                    "",
                ),
            ),
            about="Starts whose outcome is not known, in all workspaces, now.",
            limits=(None, 1),
        ),
    ),
)

ENDS: Final = Row(
    "Finished runs",
    (
        Show(
            title="Finished runs per hour, by source",
            kind="bars",
            width=12,
            queries=(
                (
                    "SELECT hour AS time, ended_via AS metric, sum(ends - adopted) AS ends\n"
                    f"FROM v_ends_hourly WHERE $__timeFilter(hour) AND {_W}\n"
                    "GROUP BY 1, 2 ORDER BY 1, 2",
                    "",
                ),
            ),
            about="In the hour in which they became known, without runs that had ended before the "
            "tracker learned of them.",
        ),
        Show(
            title="Completed and failed",
            kind="bars",
            width=12,
            queries=(
                (
                    "SELECT hour AS time, sum(completed) AS completed, sum(failed) AS failed\n"
                    f"FROM v_ends_hourly WHERE $__timeFilter(hour) AND {_W}\n"
                    "GROUP BY 1 ORDER BY 1",
                    "",
                ),
            ),
            about="All finished runs, including those found later.",
        ),
        Show(
            title="Detection delay",
            unit="s",
            width=12,
            queries=_lags("seen"),
            about="From a run's end at FLORA until the tracker knows it. By hour, all sources.",
        ),
        Show(
            title="Time until settled",
            unit="s",
            width=12,
            queries=_lags("settled"),
            about="From a run's end at FLORA until outputs, cost and times are read. By hour.",
        ),
    ),
)

CALLBACKS: Final = Row(
    "Callbacks",
    (
        Show(
            title="Callbacks per day",
            kind="bars",
            width=12,
            queries=(
                (
                    "SELECT day AS time, sum(came) AS came, sum(late) AS late,\n"
                    "    sum(missed) AS missed, sum(unexpected) AS unexpected\n"
                    f"FROM v_callback_health WHERE {_DAYS} AND {_W}\n"
                    "GROUP BY 1 ORDER BY 1",
                    "",
                ),
            ),
            about="came: first source. late: not first. missed: not yet. unexpected: of "
            "runs started elsewhere.",
        ),
        Show(
            title="Miss rate per day",
            unit="percentunit",
            width=12,
            most=1,
            queries=(
                (
                    "SELECT day AS time, coalesce(workspace_id, 'unknown') AS metric, miss_rate\n"
                    f"FROM v_callback_health WHERE {_DAYS} AND {_W}\n"
                    "ORDER BY 1, 2",
                    "",
                ),
            ),
            about="By workspace.",
        ),
    ),
)

COSTS: Final = Row(
    "Cost",
    (
        Show(
            title="Cost per day",
            kind="bars",
            unit="currencyUSD",
            width=12,
            queries=(
                (
                    "SELECT day AS time, coalesce(technique_name, technique_id, 'other') AS metric,"
                    f"\n    sum(cost)::float8 AS cost\nFROM v_cost_daily WHERE {_DAYS} AND {_W}\n"
                    "GROUP BY 1, 2 ORDER BY 1, 2",
                    "",
                ),
            ),
            about="By technique, on the day (UTC) on which the run ended.",
        ),
        Show(
            title="Cost by technique",
            kind="table",
            width=12,
            queries=(
                (
                    "SELECT coalesce(technique_name, technique_id, 'other') AS technique,\n"
                    "    sum(runs) AS runs, sum(completed) AS completed, sum(failed) AS failed,\n"
                    "    sum(cost)::float8 AS usd_at_least, sum(not_final) AS not_final,\n"
                    "    sum(quoted)::float8 AS usd_quoted, sum(unpriced) AS never_billed,\n"
                    "    (sum(cost) / nullif(sum(completed), 0))::float8 AS usd_a_completed_run\n"
                    f"FROM v_cost_daily WHERE {_DAYS} AND {_W}\n"
                    "GROUP BY 1 ORDER BY usd_at_least DESC",
                    "",
                ),
            ),
            about="On these days. The cost is a minimum while some bills are not final; quotes of "
            "runs without a bill are in their own column.",
        ),
        Show(
            title="Spending per day, by technique",
            kind="bars",
            unit="currencyUSD",
            width=12,
            queries=(
                (
                    "SELECT day AS time, coalesce(technique_name, technique_id, 'other') AS metric,"
                    "\n    sum(charged + quoted)::float8 AS usd\n"
                    f"FROM v_spending_daily WHERE {_DAYS} AND {_W}\n"
                    "GROUP BY 1, 2 ORDER BY 1, 2",
                    "",
                ),
            ),
            about="Charged and quoted, on the day (UTC) on which the run was started, as budgets "
            "count.",
        ),
        Show(
            title="Spending by tag",
            kind="table",
            width=12,
            queries=(
                (
                    "SELECT tag, sum(runs) AS runs, sum(charged)::float8 AS usd_charged,\n"
                    "    sum(quoted)::float8 AS usd_quoted\n"
                    f"FROM v_spending_daily_by_tag WHERE {_DAYS} AND {_W}\n"
                    "GROUP BY 1 ORDER BY sum(charged + quoted) DESC LIMIT 200",
                    "",
                ),
            ),
            about="On these days. A run with several tags is in several rows.",
        ),
        Show(
            title="Failed runs by retry advice",
            kind="table",
            width=24,
            queries=(
                (
                    "SELECT coalesce(technique_name, technique_id, 'other') AS technique,\n"
                    "    retry_advice, sum(runs) AS runs\n"
                    f"FROM v_failures_daily WHERE {_DAYS} AND {_W}\n"
                    "GROUP BY 1, 2 ORDER BY runs DESC LIMIT 200",
                    "",
                ),
            ),
            about="On these days, by FLORA's error codes.",
        ),
    ),
)

NOW: Final = Row(
    "Now",
    (
        Show(
            title="Runs by state",
            kind="table",
            width=12,
            queries=(
                (
                    "SELECT coalesce(technique_name, technique_id, 'not known') AS technique,\n"
                    "    status, tracking, sum(runs) AS runs\n"
                    f"FROM v_run_states WHERE tracking <> 'settled' AND {_W}\n"
                    "GROUP BY 1, 2, 3 ORDER BY runs DESC LIMIT 200",
                    "",
                ),
            ),
            about="Without settled runs.",
        ),
        Show(
            title="Sweeps",
            kind="table",
            width=12,
            queries=(
                (
                    "SELECT workspace_id, last_started_at, last_error, complete_finished_at,\n"
                    "    complete_pages, complete_discovered, complete_repaired, through\n"
                    f"FROM v_sweeps WHERE {_W} ORDER BY complete_finished_at NULLS FIRST",
                    "",
                ),
            ),
            about="Through: checked against FLORA up to this time, on FLORA's clock.",
        ),
        Show(
            title="Overdue runs",
            kind="table",
            width=24,
            queries=(
                (
                    "SELECT run_id, workspace_id, technique_name, status, overdue_seconds,\n"
                    "    checks, callback_expected, last_error\n"
                    f"FROM v_overdue_runs WHERE {_W} ORDER BY next_check_at LIMIT 100",
                    "",
                ),
            ),
            about="Longest overdue first. Empty while workers keep up.",
        ),
        Show(
            title="Quarantined callbacks",
            kind="table",
            width=12,
            queries=(
                (
                    "SELECT received_at, delivery_id, run_id, event_type, reason, receipts\n"
                    f"FROM v_quarantine WHERE acknowledged_at IS NULL AND {_W}\n"
                    "ORDER BY received_at DESC LIMIT 100",
                    "",
                ),
            ),
            about="tracker deliveries show prints the body; tracker deliveries replay tries again.",
        ),
        Show(
            title="Starts without a known outcome",
            kind="table",
            width=12,
            queries=(
                (
                    "SELECT created_at, state, workspace_id, technique_id, idempotency_key,\n"
                    "    error_code, error_message\n"
                    "FROM v_open_starts ORDER BY created_at LIMIT 100",
                    "",
                ),
            ),
            about="In all workspaces. Unresolved ones need a person.",
        ),
    ),
)

RUNS: Final = (GLANCE, ENDS, CALLBACKS, COSTS, NOW)
