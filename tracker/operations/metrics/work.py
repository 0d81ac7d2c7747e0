"""What one process counts as it works; Prometheus adds the processes up.

Everything here is a hook that somebody else calls: the receiver's endpoint, the door, the FLORA
clients, the worker. None of them waits, and those on the way of a callback cost a few microseconds.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol, get_args

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from tracker.core.errors import SchemaOutdated, StoreUnavailable
from tracker.core.observation import Source
from tracker.core.record import DeliveryOutcome, Record
from tracker.core.retry import is_known
from tracker.core.rollup import is_adopted, lag_ms
from tracker.core.run import RunStatus
from tracker.flora.signature import Reason
from tracker.polling.poll_round import PollReport
from tracker.polling.sweep import SweepReport
from tracker.polling.workspaces import Workspace
from tracker.receiving.receive import Received
from tracker.store.errors import StoreBusy

ENDED_BY: Final = (Source.START, Source.CALLBACK, Source.POLL, Source.HISTORY)
"""Who may tell that a run ended."""
REPEATED: Final = "repeated"
STORED: Final = "stored"
RECEIVED: Final = (STORED, REPEATED)
APPLIED: Final = (DeliveryOutcome.APPLIED.value, DeliveryOutcome.QUARANTINED.value)
REFUSALS: Final = (
    *get_args(Reason),
    *("too_large", "too_slow", "cut_off", "trial", "not_set_up"),
    *("not_committed_in_time", "database_unavailable", "not_storable"),
)
"""Why a callback is not kept: as `tracker.web.callbacks` says it."""
AUTH_REFUSALS: Final = ("missing", "wrong", "expired", "scope", "cross_site", "not_local")
"""Why a request is refused for who sent it: as `tracker.web.auth` says it."""
WRITE_FAILURES: Final = ("busy", "unavailable", "outdated", "refused")
SWEEP_RESULTS: Final = ("complete", "failed", "skipped")

log = structlog.get_logger(__name__)

_QUICK: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_CALLS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20)
_LAGS: Final = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 21600)
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Change(Protocol):
    """What one entry of a commit did to its run."""

    @property
    def before(self) -> Record | None:
        """The run's record before; `None` for one that was not known."""

    @property
    def after(self) -> Record | None:
        """The run's record now; `None` where the entry was about no run that is known."""


class Commit(Protocol):
    """What the door tells of a commit."""

    @property
    def passed(self) -> Sequence[Change]:
        """What each entry did, in order."""


class Work:
    """The counters of one process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def count(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"tracker_{name}", meaning, labels, registry=registry)

        def measure(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"tracker_{name}", meaning, labels, registry=registry, buckets=buckets)

        by_workspace = "workspace_id"
        self._callbacks = count(
            "callbacks",
            "Authentic callbacks that were committed, by the secret that signed them.",
            *(by_workspace, "secret", "outcome"),
        )
        self._applied = count(
            "callbacks_applied",
            "Stored callbacks that were applied, by what came of it.",
            "outcome",
        )
        self._refused = count("callbacks_refused", "Callbacks that were not kept.", "reason")
        self._auth_refused = count(
            "auth_refused", "Requests to API, pages and metrics that were refused.", "reason"
        )
        self._callback_seconds = measure(
            "callback_seconds", "From a callback's headers to its answer, if kept.", _QUICK
        )
        self._commit_entries = measure("commit_entries", "Entries in one commit.", _SIZES)
        self._commit_seconds = measure("commit_seconds", "Time of one commit.", _QUICK)
        self._write_failures = count(
            "database_write_failures", "Attempts to commit that failed.", "reason"
        )
        self._ends = count(
            "run_ends", "Runs whose end became known, by who told it first.", "source", "status"
        )
        self._adopted = count(
            "adopted_runs", "Runs that had ended before the tracker heard of them."
        )
        self._end_lag = measure(
            "end_lag_seconds", "From FLORA's end of a run until it was known.", _LAGS, "source"
        )
        self._settle_lag = measure(
            "settle_lag_seconds", "From FLORA's end of a run until it was settled.", _LAGS, "source"
        )
        self._requests = count(
            "flora_requests", "Requests to FLORA.", by_workspace, "endpoint", "status"
        )
        self._request_seconds = measure(
            "flora_request_seconds", "Time of one request to FLORA.", _CALLS, "endpoint"
        )
        self._poll_pages = count("poll_pages", "History pages read because runs were due.")
        self._poll_reads = count("poll_reads", "Reads made for one run alone.")
        self._poll_failures = count("poll_failures", "Runs that could not be read.")
        self._poll_settled = count("poll_settled", "Runs that polling settled.")
        self._recheck_pages = count("recheck_pages", "History pages read for bills.")
        self._recheck_reads = count("recheck_reads", "Runs read alone for their bill.")
        self._unknown_codes = count(
            "unknown_error_codes", "Failed runs whose error code has no retry advice."
        )
        self._sweeps = count("sweeps", "Sweeps of a history.", by_workspace, "result")
        self._sweep_pages = count("sweep_pages", "History pages swept.", by_workspace)
        self._sweep_items = count("sweep_items", "Runs shown by swept pages.", by_workspace)
        self._sweep_discovered = count(
            "sweep_discovered", "Runs that only a sweep made known.", by_workspace
        )
        self._sweep_repaired = count(
            "sweep_repaired", "Runs whose end or details a sweep brought.", by_workspace
        )
        self._sweep_unreadable = count(
            "sweep_unreadable", "Items of swept pages that were not understood.", by_workspace
        )
        self._over_budget = count(
            "starts_over_budget", "Starts that did not fit a budget: nothing was sent.", "budget"
        )
        self._job_failures = count("worker_job_failures", "Scheduled jobs that failed.", "task")
        self._taken: dict[tuple[str, int, str], Counter] = {}
        for outcome in APPLIED:
            self._applied.labels(outcome)
        for reason in REFUSALS:
            self._refused.labels(reason)
        for reason in AUTH_REFUSALS:
            self._auth_refused.labels(reason)
        for reason in WRITE_FAILURES:
            self._write_failures.labels(reason)
        for source in ENDED_BY:
            for status in (RunStatus.COMPLETED, RunStatus.FAILED):
                self._ends.labels(source.value, status.value)

    def expect(self, workspaces: Sequence[Workspace]) -> None:
        """Show zeros for what can be told beforehand, so that a first event is an increase."""
        for workspace in workspaces:
            if workspace.workspace_id is None:
                continue
            for position in range(1, len(workspace.secrets) + 1):
                for outcome in RECEIVED:
                    self._callbacks.labels(workspace.workspace_id, position, outcome)
            for result in SWEEP_RESULTS if workspace.client else ():
                self._sweeps.labels(workspace.workspace_id, result)

    def callback_taken(self, received: Received, seconds: float) -> None:
        """A callback was committed, `seconds` after its headers came."""
        outcome = REPEATED if received.repeated else STORED
        key = (received.workspace, received.secret, outcome)
        counter = self._taken.get(key)
        if counter is None:
            counter = self._taken[key] = self._callbacks.labels(*key)
        counter.inc()
        self._callback_seconds.observe(seconds)

    def applied(self, applied: int, quarantined: int) -> None:
        """The applier's hook: so many stored callbacks were applied, and so many quarantined."""
        for outcome, amount in zip(APPLIED, (applied, quarantined), strict=True):
            self._applied.labels(outcome).inc(amount)

    def callback_refused(self, reason: str) -> None:
        """A callback was not kept. Reasons are few, and fixed."""
        self._refused.labels(reason).inc()

    def auth_refused(self, reason: str) -> None:
        """A request was refused for who sent it. Reasons are few, and fixed."""
        self._auth_refused.labels(reason).inc()

    def written(self, entries: int, seconds: float, stopped_by: Exception | None) -> None:
        """The door's hook after each attempt to commit."""
        if stopped_by is not None:
            self._write_failures.labels(_why(stopped_by)).inc()
            return
        self._commit_entries.observe(entries)
        self._commit_seconds.observe(seconds)

    def committed(self, commit: Commit) -> None:
        """The door's hook after each commit."""
        for change in commit.passed:
            before, after = change.before, change.after
            if after is None or after is before or after.ended_via is None:
                continue
            if before is None or before.ended_via is None:
                self._ended(after)
            if after.run.settled and not (before and before.run.settled):
                self._settled(after)
            error = after.run.error
            if error is not None and (before is None or before.run.error != error):
                self._failed(after.run.run_id, error.code)

    def _failed(self, run_id: str, code: str) -> None:
        if not is_known(code):
            self._unknown_codes.inc()
            log.warning("run.unknown_error_code", run_id=run_id, error_code=code)

    def _ended(self, record: Record) -> None:
        if is_adopted(record):
            self._adopted.inc()
        elif record.ended_via is not None:
            self._ends.labels(record.ended_via.value, str(record.run.status)).inc()

    def _settled(self, record: Record) -> None:
        """FLORA's time of the end is known only now: a callback does not tell it."""
        ended_at, via = record.run.completed_at, record.ended_via
        if ended_at is None or via is None or is_adopted(record):
            return
        for histogram, at in (
            (self._end_lag, record.end_seen_at),
            (self._settle_lag, record.settled_at),
        ):
            if at is not None:
                histogram.labels(via.value).observe(lag_ms(ended_at, at) / 1000)

    def requests_of(self, workspace: Workspace) -> Callable[[str, int | None, float], None]:
        """The hook of this workspace's FLORA client."""

        def on_request(endpoint: str, status: int | None, seconds: float) -> None:
            answered = "none" if status is None else str(status)
            self._requests.labels(workspace.name, endpoint, answered).inc()
            self._request_seconds.labels(endpoint).observe(seconds)

        return on_request

    def polled(self, report: PollReport) -> None:
        """A round of polling is over."""
        self._poll_pages.inc(report.pages)
        self._poll_reads.inc(report.reads)
        self._poll_failures.inc(report.failed)
        self._poll_settled.inc(report.settled)

    def rechecked(self, report: PollReport) -> None:
        """A round of reading bills again is over."""
        self._recheck_pages.inc(report.pages)
        self._recheck_reads.inc(report.reads)

    def swept(self, report: SweepReport) -> None:
        """A sweep is over, be it that another process was at it."""
        name = report.workspace_id
        result = "skipped" if report.skipped else "failed" if report.error else "complete"
        self._sweeps.labels(name, result).inc()
        for counter, amount in (
            (self._sweep_pages, report.pages),
            (self._sweep_items, report.items),
            (self._sweep_discovered, report.discovered),
            (self._sweep_repaired, report.repaired),
            (self._sweep_unreadable, report.unreadable),
        ):
            counter.labels(name).inc(amount)

    def over_budget(self, budget: str) -> None:
        """A start did not fit the budget of that name. Budgets are few, and set."""
        self._over_budget.labels(budget).inc()

    def job_failed(self, task: str) -> None:
        """A scheduled job ended with an error."""
        self._job_failures.labels(task).inc()


def _why(error: Exception) -> str:
    match error:
        case StoreBusy():
            return "busy"
        case StoreUnavailable():
            return "unavailable"
        case SchemaOutdated():
            return "outdated"
    return "refused"
