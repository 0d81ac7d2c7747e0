"""Prometheus metrics: what this process does, counted, with what `gauges.py` reads at each scrape.

Each set of services has its own registry, so two sets in one process share nothing. Multi-process
mode of prometheus-client is not used: each process has a port of its own, Prometheus adds the
counters up, and what must be the same everywhere comes from the database.
"""

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Final, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tracker.core.clock import Clock
from tracker.core.errors import SchemaOutdated, StoreUnavailable
from tracker.core.log import get_logger
from tracker.core.observation import Source
from tracker.core.record import DeliveryOutcome
from tracker.core.rollup import is_adopted, lag_ms
from tracker.core.run import RunStatus, is_known
from tracker.flora.callback import Reason
from tracker.polling.reading import PollReport
from tracker.polling.sweep import SweepReport
from tracker.receiving.receive import Received
from tracker.store.errors import StoreBusy
from tracker.workspaces import UNKNOWN, Workspace

if TYPE_CHECKING:
    from tracker.operations.gauges import DatabaseGauges
    from tracker.store.writing.messages import Attempt, Claim
    from tracker.store.writing.writer import WriteOutcome

ENDED_BY: Final = (Source.START, Source.CALLBACK, Source.POLL, Source.HISTORY)
"""Sources that can report the end of a run."""
REPEATED: Final = "repeated"
STORED: Final = "stored"
RECEIVED: Final = (STORED, REPEATED)
APPLIED: Final = (DeliveryOutcome.APPLIED.value, DeliveryOutcome.QUARANTINED.value)
REFUSALS: Final = (
    *get_args(Reason),
    *("too_large", "too_slow", "cut_off", "test_delivery", "not_set_up"),
    *("not_committed_in_time", "database_unavailable", "not_storable"),
)
"""Why a callback is refused (`tracker.web.callbacks`)."""
AUTH_REFUSALS: Final = ("missing", "wrong", "expired", "scope", "cross_site", "not_local")
"""Why access is refused (`tracker.web.auth`)."""
_WRITE_ERRORS: Final = (
    *((StoreBusy, "busy"), (StoreUnavailable, "unavailable"), (SchemaOutdated, "outdated")),
)
WRITE_FAILURES: Final = (*(name for _, name in _WRITE_ERRORS), "refused")
SWEEP_RESULTS: Final = ("complete", "failed", "skipped")
ATTEMPTS: Final = ("delivered", "refused", "no_answer")
"""Outcomes of an attempt to deliver a message: a 2xx, another answer, none."""

log = get_logger(__name__)

# Without this, each counter has a second series with the time of its first increase.
disable_created_metrics()  # type: ignore[no-untyped-call]

_QUICK: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_CALLS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20)
_LAGS: Final = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 21600)
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500)

# Name, help and labels.
_COUNTERS: Final = (
    ("callbacks", "Authentic callbacks stored.", "workspace_id", "secret", "outcome"),
    ("callbacks_applied", "Stored callbacks applied to their runs, by outcome.", "outcome"),
    ("callbacks_refused", "Callbacks refused.", "reason"),
    ("auth_refused", "Requests to API, dashboard and metrics without access.", "reason"),
    ("database_write_failures", "Failed attempts to commit.", "reason"),
    ("run_ends", "Finished runs, by the source that reported the end first.", "source", "status"),
    ("adopted_runs", "Runs that had ended before the tracker learned of them."),
    ("flora_requests", "Requests to FLORA.", "workspace_id", "endpoint", "status"),
    ("poll_pages", "History pages read for due runs."),
    ("poll_reads", "Reads of single runs."),
    ("poll_failures", "Runs that could not be read."),
    ("poll_settled", "Runs settled by polling."),
    ("recheck_pages", "History pages read for bills."),
    ("recheck_reads", "Settled runs read singly for their bill or outputs."),
    ("unknown_error_codes", "Failed runs whose error code has no retry advice."),
    ("sweeps", "Sweeps of the history.", "workspace_id", "result"),
    ("sweep_pages", "History pages read by sweeps.", "workspace_id"),
    ("sweep_items", "Runs on the pages that sweeps read.", "workspace_id"),
    ("sweep_discovered", "Runs that only a sweep discovered.", "workspace_id"),
    ("sweep_repaired", "Runs whose end or details only a sweep brought.", "workspace_id"),
    ("sweep_unreadable", "History items that name no run.", "workspace_id"),
    ("starts_over_budget", "Starts refused because they exceed a budget.", "budget"),
    ("message_attempts", "Attempts to deliver messages.", "endpoint_id", "outcome"),
    ("worker_job_failures", "Scheduled jobs that failed.", "task"),
)
# Name, help, buckets and labels.
_HISTOGRAMS: Final = (
    ("callback_seconds", "Time from a callback's headers until it is stored.", _QUICK),
    ("commit_entries", "Entries per commit.", _SIZES),
    ("commit_seconds", "Duration of commits.", _QUICK),
    ("end_lag_seconds", "Detection delay: from a run's end until it is known.", _LAGS, "source"),
    ("settle_lag_seconds", "Time from a run's end until it is settled.", _LAGS, "source"),
    ("flora_request_seconds", "Duration of requests to FLORA.", _CALLS, "endpoint"),
    ("message_delivery_seconds", "Time from an event to its 2xx.", _LAGS, "endpoint_id"),
)


class Metrics:
    """All metrics of a process: counters and histograms, and gauges read at each scrape.

    Every public method from `create_series` on is a hook that others call: the receiver, the
    writer, the FLORA clients, the worker. No hook waits; those of a callback cost a few
    microseconds.
    """

    def __init__(self, *, clock: Clock) -> None:
        self.worker_running = False
        """Whether the process has a worker that is running."""
        self.last_round_at: datetime | None = None
        self.registry = registry = CollectorRegistry()
        self._clock = clock
        self._gauges: DatabaseGauges | None = None
        self._counters = {
            name: Counter(f"tracker_{name}", meaning, labels, registry=registry)
            for name, meaning, *labels in _COUNTERS
        }
        self._histograms = {
            name: Histogram(f"tracker_{name}", meaning, labels, registry=registry, buckets=buckets)
            for name, meaning, buckets, *labels in _HISTOGRAMS
        }
        ProcessCollector(registry=registry)
        self._stored: dict[tuple[str, int, str], Counter] = {}
        self._unknown = UNKNOWN
        """The label of work for a workspace whose id was not known then."""
        for name, values in (
            ("callbacks_applied", APPLIED),
            ("callbacks_refused", REFUSALS),
            ("auth_refused", AUTH_REFUSALS),
            ("database_write_failures", WRITE_FAILURES),
        ):
            for value in values:
                self._counters[name].labels(value)
        for source in ENDED_BY:
            for status in (RunStatus.COMPLETED, RunStatus.FAILED):
                self._counters["run_ends"].labels(source.value, status.value)

    def watch(self, process: Collector, database: "DatabaseGauges") -> None:
        """Add the gauges. Call `aclose` before the database is closed."""
        self._gauges = database
        self.registry.register(process)
        self.registry.register(database)

    async def aclose(self) -> None:
        if self._gauges is not None:
            await self._gauges.aclose()

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The text in the format that `accept` asks for, and its content type."""
        if self._gauges is not None:
            await self._gauges.refresh()
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is not a number
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type

    def create_series(self, workspaces: Iterable[Workspace], endpoint_ids: Iterable[str]) -> None:
        """Create the series of workspaces and endpoints at zero, so that a first event is an
        increase."""
        for endpoint_id in endpoint_ids:
            for outcome in ATTEMPTS:
                self._counters["message_attempts"].labels(endpoint_id, outcome)
        for workspace in workspaces:
            if workspace.workspace_id is None:
                continue
            for position in range(1, len(workspace.secrets) + 1):
                for outcome in RECEIVED:
                    self._counters["callbacks"].labels(workspace.workspace_id, position, outcome)
            for result in SWEEP_RESULTS if workspace.client else ():
                self._counters["sweeps"].labels(workspace.workspace_id, result)

    def named(self, workspace: Workspace) -> None:
        """The id of the workspace without one is known: what was counted for it moves there. Or it
        is unknown again, with another key."""
        self._unknown = workspace.name
        self._stored.clear()
        if workspace.workspace_id is None:
            return
        self.create_series([workspace], ())
        for name, _, *labels in _COUNTERS:
            if "workspace_id" not in labels:
                continue
            counter = self._counters[name]
            for sample in next(iter(counter.collect())).samples:
                if sample.labels["workspace_id"] == UNKNOWN:
                    known = sample.labels | {"workspace_id": workspace.name}
                    counter.labels(**known).inc(sample.value)
                    counter.remove(*(sample.labels[label] for label in labels))

    def _of(self, workspace: str) -> str:
        return self._unknown if workspace == UNKNOWN else workspace

    def count(self, name: str, *labels: object, by: float = 1) -> None:
        """Increase a counter of `_COUNTERS`."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def callback_taken(self, received: Received, seconds: float) -> None:
        """A callback was stored, `seconds` after its headers arrived."""
        outcome = REPEATED if received.repeated else STORED
        key = (self._of(received.workspace), received.secret, outcome)
        counter = self._stored.get(key)
        if counter is None:
            counter = self._stored[key] = self._counters["callbacks"].labels(*key)
        counter.inc()
        self._histograms["callback_seconds"].observe(seconds)

    def applied(self, applied: int, quarantined: int) -> None:
        for outcome, amount in zip(APPLIED, (applied, quarantined), strict=True):
            self.count("callbacks_applied", outcome, by=amount)

    def written(self, entries: int, seconds: float, stopped_by: Exception | None) -> None:
        if stopped_by is not None:
            reasons = (name for kind, name in _WRITE_ERRORS if isinstance(stopped_by, kind))
            self.count("database_write_failures", next(reasons, "refused"))
            return
        self._histograms["commit_entries"].observe(entries)
        self._histograms["commit_seconds"].observe(seconds)

    def committed(self, outcome: "WriteOutcome") -> None:
        for change in outcome.results:
            before, after = change.before, change.after
            if after is None or after is before or after.ended_via is None:
                continue
            via, ended_at = str(after.ended_via), after.run.completed_at
            adopted = is_adopted(after)
            if before is None or before.ended_via is None:
                if adopted:
                    self.count("adopted_runs")
                else:
                    self.count("run_ends", via, str(after.run.status))
            # Both lags only now: FLORA's time of the end is known once the run was read.
            if change.settles and ended_at is not None and not adopted:
                for name, at in (
                    ("end_lag_seconds", after.end_seen_at),
                    ("settle_lag_seconds", after.settled_at),
                ):
                    if at is not None:
                        self._histograms[name].labels(via).observe(lag_ms(ended_at, at) / 1000)
            error = after.run.error
            if error is None or is_known(error.code) or (before and before.run.error == error):
                continue
            self.count("unknown_error_codes")
            log.warning("run.unknown_error_code", run_id=after.run.run_id, error_code=error.code)

    def requests_of(self, workspace: Workspace) -> Callable[[str, int | None, float], None]:
        """The hook for requests of this workspace's FLORA client."""

        def on_request(endpoint: str, status: int | None, seconds: float) -> None:
            answered = "none" if status is None else str(status)
            self.count("flora_requests", self._of(workspace.name), endpoint, answered)
            self._histograms["flora_request_seconds"].labels(endpoint).observe(seconds)

        return on_request

    def polled(self, report: PollReport) -> None:
        self.last_round_at = self._clock()
        self.count("poll_failures", by=report.failed)
        for what in ("pages", "reads", "settled"):
            self.count(f"poll_{what}", by=getattr(report, what))

    def rechecked(self, report: PollReport) -> None:
        self.count("recheck_pages", by=report.pages)
        self.count("recheck_reads", by=report.reads)

    def swept(self, report: SweepReport) -> None:
        """A sweep is over, or was skipped because another process does it."""
        name = self._of(report.workspace_id)
        result = "skipped" if report.skipped else "failed" if report.error else "complete"
        self.count("sweeps", name, result)
        for what in ("pages", "items", "discovered", "repaired", "unreadable"):
            self.count(f"sweep_{what}", name, by=getattr(report, what))

    def attempted(self, endpoint_id: str, claim: "Claim", attempt: "Attempt") -> None:
        if attempt.error is None:
            outcome, took = "delivered", (attempt.at - claim.event_at).total_seconds()
            self._histograms["message_delivery_seconds"].labels(endpoint_id).observe(max(took, 0))
        else:
            outcome = "refused" if attempt.status or attempt.raised else "no_answer"
        self.count("message_attempts", endpoint_id, outcome)
