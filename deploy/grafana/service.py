"""The dashboard of the service, from Prometheus.

Values of the database are the same in every process (docs/metrics.md) and taken once, by `max`; the
rest is added up.
"""

from typing import Final

from panels import Row, Show

YES_IS_BAD: Final = {"0": ("no", "green"), "1": ("yes", "red")}
NO_IS_BAD: Final = {"0": ("no", "red"), "1": ("yes", "green")}

_W: Final = 'workspace_id=~"$workspace"'
_AT: Final = "[$__rate_interval]"


def _quantiles(histogram: str, *shares: float) -> tuple[tuple[str, str], ...]:
    return tuple(
        (
            f"histogram_quantile({share}, sum by (le) (rate({histogram}_bucket{_AT})))",
            f"p{share * 100:.0f}",
        )
        for share in shares
    )


GLANCE: Final = Row(
    "At a glance",
    (
        Show(
            title="Open runs",
            kind="stat",
            width=3,
            queries=(
                (
                    "sum(max by (workspace_id, status) "
                    f'(tracker_runs{{tracking="active", {_W}}})) or vector(0)',
                    "",
                ),
            ),
            about="Runs that are not settled: in progress, or finished and fetching results.",
        ),
        Show(
            title="Overdue",
            kind="stat",
            width=3,
            queries=(("max(tracker_runs_overdue)", ""),),
            about="Runs due to be polled for over a minute.",
            limits=(1, 100),
        ),
        Show(
            title="Missed callbacks",
            kind="stat",
            width=3,
            unit="percentunit",
            queries=((f"max(tracker_recent_callback_miss_ratio{{{_W}}})", ""),),
            about="Of runs that ended in this hour or the one before; the worst workspace.",
            limits=(0.05, 0.2),
        ),
        Show(
            title="Quarantined",
            kind="stat",
            width=3,
            queries=(("max(tracker_deliveries_quarantined)", ""),),
            about="Authentic callbacks that were not understood.",
            limits=(1, None),
        ),
        Show(
            title="Unresolved starts",
            kind="stat",
            width=3,
            queries=(("max(tracker_starts_unresolved)", ""),),
            about="Starts whose outcome is not known. They are not sent again.",
            limits=(None, 1),
        ),
        Show(
            title="Key refused",
            kind="stat",
            width=3,
            queries=((f"max(tracker_flora_breaker_open{{{_W}}})", ""),),
            about="Whether FLORA refuses the key of a workspace.",
            words=YES_IS_BAD,
        ),
        Show(
            title="FLORA answers",
            kind="stat",
            width=3,
            queries=((f"min(tracker_flora_up{{{_W}}})", ""),),
            about="Whether FLORA has answered in the last 30 s, as far as it was asked.",
            words=NO_IS_BAD,
        ),
        Show(
            title="Database answers",
            kind="stat",
            width=3,
            queries=(("min(tracker_database_up)", ""),),
            about="Whether the database answered each process at its last scrape.",
            words=NO_IS_BAD,
        ),
        Show(
            title="Workers",
            kind="stat",
            width=3,
            queries=(("sum(tracker_worker_running) or vector(0)", ""),),
            about="Processes that poll and sweep.",
            limits=(None, None),
        ),
    ),
)

ENDS: Final = Row(
    "Finished runs and callbacks",
    (
        Show(
            title="Finished runs per minute, by source",
            queries=((f"sum by (source) (rate(tracker_run_ends_total{_AT})) * 60", "{{source}}"),),
            about="Runs found by poll or history had no callback in time.",
        ),
        Show(
            title="Callbacks per minute",
            queries=(
                (
                    f"sum by (outcome) (rate(tracker_callbacks_total{{{_W}}}{_AT})) * 60",
                    "{{outcome}}",
                ),
                (
                    f"sum by (reason) (rate(tracker_callbacks_refused_total{_AT})) * 60 > 0",
                    "refused: {{reason}}",
                ),
            ),
            about="Anyone can post: unsigned and forged requests count as missing and mismatch.",
        ),
        Show(
            title="Callbacks applied per minute",
            queries=(
                (
                    f"sum by (outcome) (rate(tracker_callbacks_applied_total{_AT})) * 60",
                    "{{outcome}}",
                ),
            ),
            about="Acknowledged callbacks applied to their runs. Quarantined: not understood.",
        ),
        Show(
            title="Inbox",
            queries=(
                ("max(tracker_inbox_waiting)", "waiting"),
                ("max(tracker_inbox_oldest_seconds)", "age of the oldest, seconds"),
            ),
            about="Acknowledged callbacks not applied yet. Under load, acknowledging has priority.",
        ),
        Show(
            title="Callbacks by secret",
            queries=(
                (
                    "sum by (workspace_id, secret) "
                    f"(rate(tracker_callbacks_total{{{_W}}}{_AT})) * 60",
                    "{{workspace_id}}, secret {{secret}}",
                ),
            ),
            about="By position in the configured list. A secret without callbacks can be removed.",
        ),
        Show(
            title="Miss rate",
            unit="percentunit",
            queries=(
                (
                    f"max by (workspace_id) (tracker_recent_callback_miss_ratio{{{_W}}})",
                    "{{workspace_id}}",
                ),
            ),
            about="Share of expected callbacks that did not arrive, this hour and the one before.",
            most=1,
        ),
        Show(
            title="Callbacks of recently finished runs",
            kind="bars",
            queries=(
                (
                    "sum by (outcome) (max by (workspace_id, outcome) "
                    f"(tracker_recent_callbacks{{{_W}}}))",
                    "{{outcome}}",
                ),
            ),
            about="came: first source. late: not first. missed: not yet. Up to two hours.",
        ),
        Show(
            title="Time since the last callback",
            unit="s",
            queries=(
                ("time() - max(tracker_callback_last_received_timestamp_seconds > 0)", "age"),
            ),
            about="A long time while runs are open means that callbacks do not arrive.",
        ),
    ),
)

TIMES: Final = Row(
    "Times",
    (
        Show(
            title="Detection delay",
            unit="s",
            queries=_quantiles("tracker_end_lag_seconds", 0.5, 0.95),
            about="From a run's end at FLORA until the tracker knows it. Without adopted runs.",
        ),
        Show(
            title="Time until settled",
            unit="s",
            queries=_quantiles("tracker_settle_lag_seconds", 0.5, 0.95),
            about="From a run's end at FLORA until outputs, cost and times are read.",
        ),
        Show(
            title="Callback response time",
            unit="s",
            queries=_quantiles("tracker_callback_seconds", 0.5, 0.99),
            about="Including the commit. FLORA gives up after ten seconds.",
        ),
        Show(
            title="Commit duration",
            unit="s",
            queries=_quantiles("tracker_commit_seconds", 0.5, 0.95),
            about="One transaction with a write batch.",
        ),
        Show(
            title="Entries per commit, and queued",
            queries=(
                (
                    f"sum(rate(tracker_commit_entries_sum{_AT})) "
                    f"/ sum(rate(tracker_commit_entries_count{_AT}))",
                    "entries per commit",
                ),
                ("sum(tracker_queue_entries)", "queued"),
            ),
            about="Commits grow with the load; queued entries are in the next one.",
        ),
        Show(
            title="Failed writes per minute",
            queries=(
                (
                    f"sum by (reason) (rate(tracker_database_write_failures_total{_AT})) * 60",
                    "{{reason}}",
                ),
            ),
            about="Attempts to commit. Those that fail as unavailable are repeated.",
        ),
    ),
)

FLORA: Final = Row(
    "FLORA's API",
    (
        Show(
            title="Requests per minute, by endpoint",
            queries=(
                (
                    f"sum by (endpoint) (rate(tracker_flora_requests_total{{{_W}}}{_AT})) * 60",
                    "{{endpoint}}",
                ),
            ),
            about="Requests of the tracker to FLORA.",
        ),
        Show(
            title="Requests per minute, by status",
            queries=(
                (
                    f"sum by (status) (rate(tracker_flora_requests_total{{{_W}}}{_AT})) * 60",
                    "{{status}}",
                ),
            ),
            about="none: no answer. 429: rate-limited; the tracker adapts to the limit.",
        ),
        Show(
            title="Request duration",
            unit="s",
            queries=_quantiles("tracker_flora_request_seconds", 0.5, 0.95),
            about="Per attempt, until the whole answer has arrived.",
        ),
        Show(
            title="Allowed requests per second",
            queries=(
                (
                    f"sum by (workspace_id) (tracker_flora_budget_rate{{{_W}}})",
                    "{{workspace_id}}",
                ),
            ),
            about="Of all processes together; empty while FLORA's limit is not reached.",
        ),
        Show(
            title="Queued requests",
            queries=(
                (f"sum(tracker_flora_requests_waiting{{{_W}}})", "queued"),
                (f"sum(tracker_flora_requests_in_flight{{{_W}}})", "in flight"),
                (
                    f"sum(rate(tracker_flora_budget_wait_seconds_total{{{_W}}}{_AT}))",
                    "waiting time, seconds per second",
                ),
            ),
            about="Requests wait for a free slot, the rate limit, or a pause set by FLORA.",
        ),
        Show(
            title="Rate-limited requests",
            queries=(
                (
                    "sum by (workspace_id) "
                    f"(rate(tracker_flora_rate_limited_total{{{_W}}}{_AT})) * 60",
                    "{{workspace_id}}, per minute",
                ),
                (f"max(tracker_flora_paused_seconds{{{_W}}})", "remaining pause, seconds"),
            ),
            about="Each 429 halves the rate; each answer raises it a little.",
        ),
        Show(
            title="Time since FLORA's last answer",
            unit="s",
            width=24,
            queries=(
                (
                    "time() - max by (workspace_id)"
                    f" (tracker_flora_last_answer_timestamp_seconds{{{_W}}} > 0)",
                    "{{workspace_id}}",
                ),
            ),
            about="To any process. A worker asks if no process has for 25 seconds.",
        ),
    ),
)

POLLING: Final = Row(
    "Polling and sweeps",
    (
        Show(
            title="Due and overdue",
            queries=(
                ("max(tracker_runs_due)", "due"),
                ("max(tracker_runs_overdue)", "overdue"),
            ),
            about="Runs due to be polled. Overdue: for over a minute; zero while workers keep up.",
        ),
        Show(
            title="Reads per minute",
            queries=(
                (f"sum(rate(tracker_poll_pages_total{_AT})) * 60", "history pages"),
                (f"sum(rate(tracker_poll_reads_total{_AT})) * 60", "single reads"),
                (f"sum(rate(tracker_poll_settled_total{_AT})) * 60", "runs settled"),
                (f"sum(rate(tracker_poll_failures_total{_AT})) * 60", "failed reads"),
            ),
            about="A page reads up to a hundred runs.",
        ),
        Show(
            title="Late bills",
            queries=(
                (f"sum(rate(tracker_recheck_pages_total{_AT})) * 60", "history pages per minute"),
                (f"sum(rate(tracker_recheck_reads_total{_AT})) * 60", "single reads per minute"),
                (f"sum(max by (workspace_id) (tracker_runs_cost_not_final{{{_W}}}))", "not final"),
                (f"sum(max by (workspace_id) (tracker_runs_unpriced{{{_W}}}))", "never billed"),
            ),
            about="FLORA bills after the end. Not final, never billed: runs of the last 7 days.",
        ),
        Show(
            title="Time since the last poll round",
            unit="s",
            queries=(
                (
                    "time() - max(tracker_worker_last_round_timestamp_seconds > 0)",
                    "the latest worker",
                ),
            ),
            about="A worker checks for due runs at least once a minute.",
        ),
        Show(
            title="Time since the last complete sweep",
            unit="s",
            queries=(
                (
                    "time() - max by (workspace_id) "
                    f"(tracker_sweep_last_complete_timestamp_seconds{{{_W}}} > 0)",
                    "{{workspace_id}}",
                ),
            ),
            about="Grows while sweeps fail or do not run.",
        ),
        Show(
            title="Found by sweeps, per hour",
            kind="bars",
            queries=(
                (
                    f"sum(increase(tracker_sweep_discovered_total{{{_W}}}[1h]))",
                    "discovered",
                ),
                (f"sum(increase(tracker_sweep_repaired_total{{{_W}}}[1h]))", "repaired"),
                (f"sum(increase(tracker_sweep_unreadable_total{{{_W}}}[1h]))", "not understood"),
            ),
            about="Discovered: runs not known before. Repaired: ends or details not known before.",
        ),
        Show(
            title="Sweeps per hour",
            kind="bars",
            queries=(
                (
                    f"sum by (result) (increase(tracker_sweeps_total{{{_W}}}[1h]))",
                    "{{result}}",
                ),
                (f"sum(increase(tracker_sweep_pages_total{{{_W}}}[1h]))", "pages"),
            ),
            about="Skipped: another process was sweeping.",
        ),
    ),
)

PROCESSES: Final = Row(
    "Processes",
    (
        Show(
            title="Runs by state",
            queries=(
                (
                    "sum by (status, tracking) (max by (workspace_id, status, tracking) "
                    f'(tracker_runs{{{_W}, tracking!="settled"}}))',
                    "{{status}}, {{tracking}}",
                ),
            ),
            about="Without settled runs.",
        ),
        Show(
            title="Cost today (UTC)",
            unit="currencyUSD",
            queries=(
                (
                    f"max by (workspace_id) (tracker_cost_today_usd{{{_W}}})",
                    "{{workspace_id}}, billed",
                ),
                (
                    f"max by (workspace_id) (tracker_quoted_today_usd{{{_W}}})",
                    "{{workspace_id}}, quoted, not billed yet",
                ),
            ),
            about="Of the settled runs that ended today; more bills may follow.",
        ),
        Show(
            title="Used budgets",
            unit="percentunit",
            queries=(
                (
                    "sum by (budget) (max by (budget, part) (tracker_budget_used_usd))"
                    " / max by (budget) (tracker_budget_usd)",
                    "{{budget}}",
                ),
            ),
            about="Charged, quoted and reserved. At 100 % no further run is started; bills above "
            "their quotes can exceed it.",
            limits=(0.8, 1),
        ),
        Show(
            title="Failed today (UTC), by retry advice",
            queries=(
                (
                    "sum by (retry_advice) (max by (workspace_id, retry_advice) "
                    f"(tracker_failed_today{{{_W}}}))",
                    "{{retry_advice}}",
                ),
                (
                    f"sum(increase(tracker_unknown_error_codes_total{_AT}))",
                    "unknown codes",
                ),
            ),
            about="By FLORA's error codes. Unknown codes count as not retryable.",
        ),
        Show(
            title="Memory",
            unit="bytes",
            queries=(
                (
                    "process_resident_memory_bytes and on (instance) tracker_build_info",
                    "{{instance}}",
                ),
            ),
            about="Per process.",
        ),
        Show(
            title="Processor",
            unit="percentunit",
            queries=(
                (
                    f"rate(process_cpu_seconds_total{_AT}) and on (instance) tracker_build_info",
                    "{{instance}}",
                ),
            ),
            about="Of one core; each process uses one.",
        ),
        Show(
            title="Refused requests per minute",
            queries=(
                (
                    f"sum by (reason) (rate(tracker_auth_refused_total{_AT})) * 60 > 0",
                    "{{reason}}",
                ),
            ),
            about="API, dashboard and metrics. wrong: tokens are guessed, or one is outdated.",
        ),
        Show(
            title="Failed jobs per hour",
            kind="bars",
            queries=(
                ("sum by (task) (increase(tracker_worker_job_failures_total[1h]))", "{{task}}"),
            ),
            about="Scheduled jobs that failed; see the log.",
        ),
        Show(
            title="Reading the database's metrics",
            unit="s",
            queries=(("max by (instance) (tracker_state_read_seconds)", "{{instance}}"),),
            about="Time per reading, at most every five seconds per process.",
        ),
    ),
)

WEBHOOKS: Final = Row(
    "Webhooks",
    (
        Show(
            title="Endpoints that work",
            kind="stat",
            queries=(("max by (endpoint_id) (tracker_endpoint_up)", "{{endpoint_id}}"),),
            about="No while the last attempts failed, or the endpoint is disabled.",
            words=NO_IS_BAD,
        ),
        Show(
            title="Messages that wait",
            queries=(
                ("max by (endpoint_id) (tracker_messages_pending)", "{{endpoint_id}}"),
                ("max by (endpoint_id) (tracker_messages_failed) > 0", "given up: {{endpoint_id}}"),
            ),
            about="Until their first or next attempt, or until someone sends them again.",
        ),
        Show(
            title="Attempts per minute",
            queries=(
                (
                    "sum by (endpoint_id, outcome) "
                    f"(rate(tracker_message_attempts_total{_AT})) * 60",
                    "{{endpoint_id}}: {{outcome}}",
                ),
            ),
            about="delivered: a 2xx, or a handler's return. "
            "refused: another answer, or its exception. no_answer: none in time.",
        ),
        Show(
            title="Delivery delay",
            unit="s",
            queries=_quantiles("tracker_message_delivery_seconds", 0.5, 0.95),
            about="From an event to the 2xx of its endpoint.",
        ),
    ),
)

SERVICE: Final = (GLANCE, ENDS, TIMES, FLORA, POLLING, WEBHOOKS, PROCESSES)
