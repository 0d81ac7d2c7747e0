"""The dashboard of the service: what Prometheus scrapes from every process.

What every process tells alike (docs/metrics.md) is taken once, by `max`; the rest is added up.
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
            about="Runs whose end or details are not known yet.",
        ),
        Show(
            title="Overdue",
            kind="stat",
            width=3,
            queries=(("max(tracker_runs_overdue)", ""),),
            about="Runs that nobody has read for over a minute since they were due.",
            limits=(1, 100),
        ),
        Show(
            title="Callbacks missed",
            kind="stat",
            width=3,
            unit="percentunit",
            queries=((f"max(tracker_recent_callback_miss_ratio{{{_W}}})", ""),),
            about="Of the runs that ended in this hour and the one before; the worst workspace.",
            limits=(0.05, 0.2),
        ),
        Show(
            title="Quarantined",
            kind="stat",
            width=3,
            queries=(("max(tracker_deliveries_quarantined)", ""),),
            about="Callbacks that are authentic and were not understood.",
            limits=(1, None),
        ),
        Show(
            title="Unresolved starts",
            kind="stat",
            width=3,
            queries=(("max(tracker_starts_unresolved)", ""),),
            about="Starts of which nobody knows whether FLORA acted. They are not sent again.",
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
            about="Whether FLORA has answered each process that asked it, in the last 30 s.",
            words=NO_IS_BAD,
        ),
        Show(
            title="Database answers",
            kind="stat",
            width=3,
            queries=(("min(tracker_database_up)", ""),),
            about="Whether it answered each process at its last scrape.",
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
    "Ends and callbacks",
    (
        Show(
            title="Ends a minute, by who told first",
            queries=((f"sum by (source) (rate(tracker_run_ends_total{_AT})) * 60", "{{source}}"),),
            about="What is polled or found in the history had no callback in time.",
        ),
        Show(
            title="Callbacks a minute",
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
            about="Strangers may post too: what they send is refused as missing or mismatch.",
        ),
        Show(
            title="Callbacks applied a minute",
            queries=(
                (
                    f"sum by (outcome) (rate(tracker_callbacks_applied_total{_AT})) * 60",
                    "{{outcome}}",
                ),
            ),
            about="To their runs, after they were acknowledged. Quarantined: not understood.",
        ),
        Show(
            title="Callbacks not applied yet",
            queries=(
                ("max(tracker_inbox_waiting)", "waiting"),
                ("max(tracker_inbox_oldest_seconds)", "age of the first, seconds"),
            ),
            about="Acknowledged and stored. Under load acknowledging goes first.",
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
            about="By position in the configured list. A secret that is not used any more can go.",
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
            about="Of the callbacks of runs that ended in the present hour and the one before.",
            most=1,
        ),
        Show(
            title="Callbacks of recent ends",
            kind="bars",
            queries=(
                (
                    "sum by (outcome) (max by (workspace_id, outcome) "
                    f"(tracker_recent_callbacks{{{_W}}}))",
                    "{{outcome}}",
                ),
            ),
            about="came: told first. late: after another way. missed: not yet. Two hours at most.",
        ),
        Show(
            title="Since the last callback",
            unit="s",
            queries=(
                ("time() - max(tracker_callback_last_received_timestamp_seconds > 0)", "age"),
            ),
            about="Long silence while runs are open says that callbacks do not get here.",
        ),
    ),
)

TIMES: Final = Row(
    "Times",
    (
        Show(
            title="From FLORA's end until known",
            unit="s",
            queries=_quantiles("tracker_end_lag_seconds", 0.5, 0.95),
            about="Runs that had ended before the tracker heard of them do not count.",
        ),
        Show(
            title="From FLORA's end until settled",
            unit="s",
            queries=_quantiles("tracker_settle_lag_seconds", 0.5, 0.95),
            about="Settled: the details (outputs, cost, times) have been read, too.",
        ),
        Show(
            title="Answering a callback",
            unit="s",
            queries=_quantiles("tracker_callback_seconds", 0.5, 0.99),
            about="The commit included. FLORA gives up after ten seconds.",
        ),
        Show(
            title="Commit",
            unit="s",
            queries=_quantiles("tracker_commit_seconds", 0.5, 0.95),
            about="One transaction of the writer, with all the entries that waited.",
        ),
        Show(
            title="Entries in a commit, and waiting",
            queries=(
                (
                    f"sum(rate(tracker_commit_entries_sum{_AT})) "
                    f"/ sum(rate(tracker_commit_entries_count{_AT}))",
                    "entries in a commit",
                ),
                ("sum(tracker_queue_entries)", "waiting"),
            ),
            about="Commits grow with the load; what waits is committed next.",
        ),
        Show(
            title="Failed writes a minute",
            queries=(
                (
                    f"sum by (reason) (rate(tracker_database_write_failures_total{_AT})) * 60",
                    "{{reason}}",
                ),
            ),
            about="Attempts to commit. Those that fail as unavailable are made again.",
        ),
    ),
)

FLORA: Final = Row(
    "FLORA's API",
    (
        Show(
            title="Requests a minute, by endpoint",
            queries=(
                (
                    f"sum by (endpoint) (rate(tracker_flora_requests_total{{{_W}}}{_AT})) * 60",
                    "{{endpoint}}",
                ),
            ),
            about="What the tracker asks of FLORA.",
        ),
        Show(
            title="Requests a minute, by status",
            queries=(
                (
                    f"sum by (status) (rate(tracker_flora_requests_total{{{_W}}}{_AT})) * 60",
                    "{{status}}",
                ),
            ),
            about="none: no answer came. 429: FLORA's limit, which is felt for.",
        ),
        Show(
            title="Time of a request",
            unit="s",
            queries=_quantiles("tracker_flora_request_seconds", 0.5, 0.95),
            about="Of each attempt, from sending to the whole answer.",
        ),
        Show(
            title="Budget, requests a second",
            queries=(
                (
                    f"sum by (workspace_id) (tracker_flora_budget_rate{{{_W}}})",
                    "{{workspace_id}}",
                ),
            ),
            about="What all processes allow themselves; nothing is shown while no limit is felt.",
        ),
        Show(
            title="Waiting for leave",
            queries=(
                (f"sum(tracker_flora_requests_waiting{{{_W}}})", "calls waiting"),
                (f"sum(tracker_flora_requests_in_flight{{{_W}}})", "under way"),
                (
                    f"sum(rate(tracker_flora_budget_wait_seconds_total{{{_W}}}{_AT}))",
                    "waited, seconds a second",
                ),
            ),
            about="Calls wait for a seat, for the rate, and for the pause that FLORA asked for.",
        ),
        Show(
            title="Refused as too many",
            queries=(
                (
                    "sum by (workspace_id) "
                    f"(rate(tracker_flora_rate_limited_total{{{_W}}}{_AT})) * 60",
                    "{{workspace_id}}, a minute",
                ),
                (f"max(tracker_flora_paused_seconds{{{_W}}})", "pause left, seconds"),
            ),
            about="Each refusal halves the rate; each answer lets it grow a little.",
        ),
    ),
)

LOOKING: Final = Row(
    "Polling and sweeps",
    (
        Show(
            title="Due and overdue",
            queries=(
                ("max(tracker_runs_due)", "due"),
                ("max(tracker_runs_overdue)", "overdue"),
            ),
            about="Overdue: for over a minute. Where a worker keeps up there are none.",
        ),
        Show(
            title="Reads a minute",
            queries=(
                (f"sum(rate(tracker_poll_pages_total{_AT})) * 60", "history pages"),
                (f"sum(rate(tracker_poll_reads_total{_AT})) * 60", "single reads"),
                (f"sum(rate(tracker_poll_settled_total{_AT})) * 60", "runs settled"),
                (f"sum(rate(tracker_poll_failures_total{_AT})) * 60", "runs not readable"),
            ),
            about="A page reads up to a hundred runs.",
        ),
        Show(
            title="Bills read again",
            queries=(
                (f"sum(rate(tracker_recheck_pages_total{_AT})) * 60", "history pages a minute"),
                (f"sum(rate(tracker_recheck_reads_total{_AT})) * 60", "single reads a minute"),
                (f"sum(max by (workspace_id) (tracker_runs_cost_not_final{{{_W}}}))", "not final"),
                (f"sum(max by (workspace_id) (tracker_runs_unpriced{{{_W}}}))", "never billed"),
            ),
            about="FLORA bills after the end. Not final, never billed: runs of the last 7 days.",
        ),
        Show(
            title="Since the worker's last round",
            unit="s",
            queries=(
                (
                    "time() - max(tracker_worker_last_round_timestamp_seconds > 0)",
                    "the latest worker",
                ),
            ),
            about="A worker looks for what is due at least once a minute.",
        ),
        Show(
            title="Since the last complete sweep",
            unit="s",
            queries=(
                (
                    "time() - max by (workspace_id) "
                    f"(tracker_sweep_last_complete_timestamp_seconds{{{_W}}} > 0)",
                    "{{workspace_id}}",
                ),
            ),
            about="It grows while sweeps fail or do not run.",
        ),
        Show(
            title="What sweeps found, in an hour",
            kind="bars",
            queries=(
                (
                    f"sum(increase(tracker_sweep_discovered_total{{{_W}}}[1h]))",
                    "discovered",
                ),
                (f"sum(increase(tracker_sweep_repaired_total{{{_W}}}[1h]))", "repaired"),
                (f"sum(increase(tracker_sweep_unreadable_total{{{_W}}}[1h]))", "not understood"),
            ),
            about="Discovered: runs nobody had told of. Repaired: news nobody had brought.",
        ),
        Show(
            title="Sweeps in an hour",
            kind="bars",
            queries=(
                (
                    f"sum by (result) (increase(tracker_sweeps_total{{{_W}}}[1h]))",
                    "{{result}}",
                ),
                (f"sum(increase(tracker_sweep_pages_total{{{_W}}}[1h]))", "pages"),
            ),
            about="Skipped: another process was at it.",
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
            about="All but the settled ones.",
        ),
        Show(
            title="Cost today (UTC)",
            unit="currencyUSD",
            queries=(
                (
                    f"max by (workspace_id) (tracker_cost_today_usd{{{_W}}})",
                    "{{workspace_id}}, at least",
                ),
                (
                    f"max by (workspace_id) (tracker_quoted_today_usd{{{_W}}})",
                    "{{workspace_id}}, quoted and not billed yet",
                ),
            ),
            about="What the settled runs that ended today cost: at least, while bills may come.",
        ),
        Show(
            title="Budgets used",
            unit="percentunit",
            queries=(
                (
                    "sum by (budget) (max by (budget, part) (tracker_budget_used_usd))"
                    " / max by (budget) (tracker_budget_usd)",
                    "{{budget}}",
                ),
            ),
            about="Charged, quoted and reserved, of all of it. At 100 % nothing further is started "
            "in what it covers; bills above quotes can bring it higher.",
            limits=(0.8, 1),
        ),
        Show(
            title="Failed today (UTC), by what to do",
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
            about="Of each process.",
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
            title="Refused requests a minute",
            queries=(
                (
                    f"sum by (reason) (rate(tracker_auth_refused_total{_AT})) * 60 > 0",
                    "{{reason}}",
                ),
            ),
            about="At API, pages and metrics. wrong: tokens are guessed, or one is outdated.",
        ),
        Show(
            title="Failed jobs in an hour",
            kind="bars",
            queries=(
                ("sum by (task) (increase(tracker_worker_job_failures_total[1h]))", "{{task}}"),
            ),
            about="Scheduled jobs that ended with an error; the log has it.",
        ),
        Show(
            title="Reading the state",
            unit="s",
            queries=(("max by (instance) (tracker_state_read_seconds)", "{{instance}}"),),
            about="What a scrape costs the database, at most every five seconds for each process.",
        ),
    ),
)

SERVICE: Final = (GLANCE, ENDS, TIMES, FLORA, LOOKING, PROCESSES)
