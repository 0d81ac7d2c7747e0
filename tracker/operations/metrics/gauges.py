"""Current values of the database and of this process, read at each scrape.

Those of the database are the same in every process: take the maximum, not the sum. They are read at
most every few seconds. While the database does not answer they are left out, since old numbers
would hide the failure.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tracker import __version__
from tracker.core.clock import Clock
from tracker.core.contact import Trouble
from tracker.core.errors import StoreError
from tracker.core.log import get_logger
from tracker.core.waiting import cancel
from tracker.operations.metrics.counters import Counters
from tracker.polling.contacts import Contacts
from tracker.starting.start import BudgetReader
from tracker.store import claims
from tracker.store.queries import endpoints, starts, sweeps
from tracker.store.queries.attention import Gauges, SweepHealth, read_gauges, sweep_health
from tracker.store.queries.endpoints import Backlog, EndpointRow
from tracker.store.queries.spending import Usage
from tracker.workspaces import UNKNOWN, Service, Workspaces

KEEP_SECONDS: Final = 5.0
"""How long a reading of the database, or its failure, is reused."""
PATIENCE: Final = 4.0
"""Seconds for reading the database; Prometheus gives up after ten."""
EXPECTED: Final = ("came", "late", "missed")

log = get_logger(__name__)


def gauge(name: str, meaning: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(f"tracker_{name}", meaning, value=value)


def labelled(
    name: str,
    meaning: str,
    values: Mapping[Any, float | Decimal | None],
    *labels: str,
    family: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily,
) -> Metric:
    """A metric with samples, by `workspace_id` unless other `labels` are named; the keys of
    `values` are one label value or a tuple of them."""
    metric = family(f"tracker_{name}", meaning, labels=labels or ("workspace_id",))
    for key, value in values.items():
        if value is not None:
            words = (key,) if isinstance(key, str) else key
            metric.add_metric([word or UNKNOWN for word in words], float(value))
    return metric


def timestamp(at: datetime | None) -> float:
    """Unix seconds; 0 for never."""
    return at.timestamp() if at else 0


def age(now: datetime, since: datetime | None) -> float:
    """Seconds since then; 0 for never."""
    return max((now - since).total_seconds(), 0) if since else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """One reading of the database. `swept` is by configured workspace, `never_swept` are such."""

    now: datetime
    gauges: Gauges
    own_addresses_missing: bool
    swept: Mapping[str, SweepHealth]
    never_swept: Sequence[str]
    usages: Sequence[Usage]
    unread: Sequence[sweeps.UnreadSpan]
    endpoints: Sequence[EndpointRow]
    backlogs: Mapping[str, Backlog]


@dataclass(kw_only=True, eq=False)
class DatabaseGauges(Service, Collector):
    """Current values of the database, read by `refresh`."""

    contacts: Contacts
    budgets: BudgetReader
    keep_seconds: float = KEEP_SECONDS
    patience: float = PATIENCE

    def __post_init__(self) -> None:
        self._reading: asyncio.Task[None] | None = None
        self._fresh_until = 0.0
        self._took = 0.0
        self._snapshot: _Snapshot | None = None
        self._up = self._failing = False

    async def refresh(self) -> None:
        """Read again if the last reading is too old; concurrent callers share one reading."""
        loop = asyncio.get_running_loop()
        if self._reading is None or (self._reading.done() and loop.time() >= self._fresh_until):
            self._reading = asyncio.create_task(self._read(), name="metrics-state")
        # A reading that timed out may also take long to be cancelled.
        done, _ = await asyncio.wait([self._reading], timeout=self.patience)
        for reading in done:
            reading.result()

    async def aclose(self) -> None:
        await cancel(self._reading)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._snapshot, self._up = None, False
        try:
            async with asyncio.timeout(self.patience):
                self._snapshot = await self._take_snapshot()
                await claims.check_writes(self.database)
            self._up, self._failing = True, False
        except (StoreError, TimeoutError) as error:
            if not self._failing:
                message = str(error) or "the database does not answer in time"
                log.warning("metrics.database_unread", error=message)
            self._failing = True
        self._took = loop.time() - began
        self._fresh_until = loop.time() + self.keep_seconds

    async def _take_snapshot(self) -> _Snapshot:
        now = self.clock()
        await self.contacts.read()
        ids = {one.workspace_id for one in self.workspaces}  # of one that was removed, nothing
        swept = {
            one.workspace_id or UNKNOWN: one
            for one in await sweep_health(self.database)
            if one.workspace_id in ids
        }
        keyed = [one.name for one in self.workspaces.keyed if one.workspace_id]
        return _Snapshot(
            now=now,
            gauges=await read_gauges(self.database, now=now),
            own_addresses_missing=await starts.own_are_missing(self.database, now=now),
            swept=swept,
            never_swept=[name for name in keyed if name not in swept],
            usages=await self.budgets.usages(),
            unread=sweeps.unread(await sweeps.everything(self.database)),
            endpoints=[
                one
                for one in await endpoints.list_endpoints(self.database)
                if one.is_configured(now)
            ],
            backlogs=await endpoints.backlogs(self.database),
        )

    def collect(self) -> Iterator[Metric]:
        yield gauge(
            "database_up",
            "1 if the database answered this process in time, and takes its writes.",
            self._up,
        )
        yield gauge("state_read_seconds", "Time to read the database's metrics.", self._took)
        if self._snapshot is not None:
            yield from _runs(self._snapshot)
            yield from _money(self._snapshot)
            yield from _callbacks(self._snapshot)
            yield from _history(self._snapshot)
            yield from _webhooks(self._snapshot)


def _runs(snapshot: _Snapshot) -> Iterator[Metric]:
    gauges, now = snapshot.gauges, snapshot.now
    yield labelled("runs", "Runs by state.", gauges.runs, "workspace_id", "status", "tracking")
    yield gauge("runs_due", "Runs due to be polled.", gauges.due)
    yield gauge("runs_overdue", "Runs due for over a minute.", gauges.overdue)
    yield gauge(
        "oldest_due_seconds", "How long the oldest of them is due.", age(now, gauges.oldest_due_at)
    )
    yield gauge(
        "runs_awaiting_callback",
        "Open runs whose callback has not arrived.",
        gauges.awaiting_callback,
    )
    yield gauge("starts_open", "Starts with no known outcome yet.", gauges.open_starts)
    yield gauge(
        "starts_unresolved",
        "Starts whose outcome a person has to resolve.",
        gauges.unresolved_starts,
    )
    yield labelled(
        "failed_today",
        "Runs that failed today (UTC), by retry advice.",
        gauges.failed_today,
        "workspace_id",
        "retry_advice",
    )


def _money(snapshot: _Snapshot) -> Iterator[Metric]:
    gauges, usages = snapshot.gauges, snapshot.usages
    for name, meaning, values in (
        ("cost_today_usd", "Billed cost of runs that ended today (UTC).", gauges.cost_today),
        ("quoted_today_usd", "Quotes of those without a bill yet.", gauges.quoted_today),
        (
            "runs_cost_not_final",
            "Runs of the last 7 days whose bill may still arrive or change.",
            gauges.not_final,
        ),
        ("runs_unpriced", "Runs of the last 7 days that were never billed.", gauges.unpriced),
    ):
        yield labelled(name, meaning, values)
    yield labelled(
        "budget_usd",
        "Limit of the budget.",
        {usage.budget.name: usage.budget.usd for usage in usages},
        "budget",
    )
    used = {}
    for usage in usages:
        for part in ("reserved", "quoted", "charged"):
            used[usage.budget.name, part] = getattr(usage, part)
    yield labelled(
        "budget_used_usd",
        "Used: reserved by starts, quoted for runs without a bill, charged.",
        used,
        "budget",
        "part",
    )


def _callbacks(snapshot: _Snapshot) -> Iterator[Metric]:
    gauges = snapshot.gauges
    yield gauge(
        "callback_last_received_timestamp_seconds",
        "When the newest callback arrived; 0 if none has.",
        timestamp(gauges.last_callback_at),
    )
    yield gauge(
        "deliveries_quarantined",
        "Authentic callbacks not understood, not acknowledged.",
        gauges.quarantined,
    )
    yield labelled(
        "recent_callbacks",
        "Callbacks of runs that ended in this hour or the one before, by outcome.",
        gauges.callbacks,
        "workspace_id",
        "outcome",
    )
    ratios = {}
    for workspace in {workspace for workspace, _ in gauges.callbacks}:
        counts = [gauges.callbacks.get((workspace, outcome), 0) for outcome in EXPECTED]
        if sum(counts):
            ratios[workspace] = counts[-1] / sum(counts)
    yield labelled(
        "recent_callback_miss_ratio", "Share of the expected callbacks that did not arrive.", ratios
    )
    yield gauge("inbox_waiting", "Acknowledged callbacks not applied yet.", gauges.waiting)
    yield gauge(
        "inbox_oldest_seconds",
        "How long the oldest of them has waited.",
        age(snapshot.now, gauges.oldest_waiting_at),
    )
    yield gauge(
        "callback_own_addresses_missing",
        "1 if callbacks to addresses of single starts do not arrive; new starts use the bare one.",
        snapshot.own_addresses_missing,
    )


def _history(snapshot: _Snapshot) -> Iterator[Metric]:
    swept = snapshot.swept
    complete = {name: timestamp(one.complete_at) for name, one in swept.items()}
    yield labelled(
        "sweep_last_complete_timestamp_seconds",
        "When the last complete sweep ended; 0 if there was none.",
        complete | dict.fromkeys(snapshot.never_swept, 0),
    )
    yield labelled(
        "sweep_failed",
        "1 if the newest sweep failed.",
        {name: one.last_error is not None for name, one in swept.items()},
    )
    yield labelled(
        "history_verified_timestamp_seconds",
        "Time on FLORA's clock up to which the history was checked.",
        {name: one.through.timestamp() for name, one in swept.items() if one.through},
    )
    unread = Counter((one.workspace_id, one.run_type) for one in snapshot.unread)
    gaps = {(name, "technique"): unread[name, "technique"] for name in swept}
    for name, one in swept.items():
        not_listed = one.generations_error is not None
        gaps[name, "generation"] = unread[name, "generation"] + not_listed
    yield labelled(
        "history_gaps",
        "Spans of the history that FLORA did not let the tracker read.",
        gaps,
        "workspace_id",
        "run_type",
    )


def _webhooks(snapshot: _Snapshot) -> Iterator[Metric]:
    rows = {one.endpoint_id: one for one in snapshot.endpoints}
    backlogs = {name: snapshot.backlogs.get(name, Backlog()) for name in rows}
    values: tuple[tuple[str, str, Mapping[str, float]], ...] = (
        (
            "endpoint_up",
            "0 while an endpoint fails or is disabled.",
            {name: row.enabled and row.failing_since is None for name, row in rows.items()},
        ),
        (
            "endpoint_disabled",
            "1 while nothing is sent to the endpoint.",
            {name: not row.enabled for name, row in rows.items()},
        ),
        (
            "messages_pending",
            "Messages that wait for their first or next attempt.",
            {name: one.pending for name, one in backlogs.items()},
        ),
        (
            "messages_failed",
            "Messages that were given up.",
            {name: one.failed for name, one in backlogs.items()},
        ),
        (
            "messages_oldest_pending_seconds",
            "How long the oldest pending message has waited.",
            {name: age(snapshot.now, one.oldest_at) for name, one in backlogs.items()},
        ),
    )
    for name, meaning, by_endpoint in values:
        yield labelled(name, meaning, by_endpoint, "endpoint_id")


_MISCONFIGURED: Final = (Trouble.NOT_FLORA, Trouble.LISTS_REFUSED, Trouble.OTHER_WORKSPACE)
_GAUGE, _TOTAL = GaugeMetricFamily, CounterMetricFamily
# Of a `RequestLimitState`.
_REQUEST_LIMITS: Final = (
    (_GAUGE, "flora_requests_in_flight", "Requests to FLORA in flight.", "in_flight"),
    (_GAUGE, "flora_requests_waiting", "Queued requests to FLORA.", "waiting"),
    (_GAUGE, "flora_paused_seconds", "Rest of a wait set by FLORA.", "paused"),
    (_GAUGE, "flora_budget_rate", "Allowed requests per second, if limited.", "rate"),
    (_TOTAL, "flora_rate_limited", "Requests that FLORA answered 429.", "limited"),
    (_TOTAL, "flora_budget_wait_seconds", "Time in the request queue.", "waited"),
)


@dataclass(eq=False)
class ProcessGauges(Collector):
    """Current values of this process.

    `waiting` returns the number of entries not committed yet, `is_stale` whether settings in files
    are not in force, `sweep_seconds` the longest time between two scheduled sweeps.
    """

    counters: Counters
    _: KW_ONLY
    waiting: Callable[[], int]
    is_stale: Callable[[], bool]
    workspaces: Workspaces
    contacts: Contacts
    sweep_seconds: Callable[[], float]
    clock: Clock

    def collect(self) -> Iterator[Metric]:
        yield labelled("build_info", "1, with the version.", {__version__: 1}, "version")
        yield gauge(
            "settings_stale",
            "1 if settings in files have changed and are not in force.",
            self.is_stale(),
        )
        yield gauge("queue_entries", "Entries not committed yet.", self.waiting())
        yield gauge("worker_running", "1 in a process with a worker.", self.counters.worker_running)
        yield gauge(
            "worker_last_round_timestamp_seconds",
            "When the worker last checked for due runs; 0 if never.",
            timestamp(self.counters.last_round_at),
        )
        yield gauge(
            "sweep_interval_seconds",
            "Longest time between two scheduled sweeps.",
            self.sweep_seconds(),
        )
        yield from self._flora()

    def _flora(self) -> Iterator[Metric]:
        keyed = {one.name: one for one in self.workspaces.keyed}
        limits = {name: one.require_client().request_limit.state() for name, one in keyed.items()}
        for family, name, meaning, field in _REQUEST_LIMITS:
            values = {workspace: getattr(limit, field) for workspace, limit in limits.items()}
            yield labelled(name, meaning, values, family=family)
        now = self.clock()
        states = {name: self.contacts.of(one) for name, one in keyed.items()}
        troubles = {
            name: one.trouble.trouble
            for name, one in states.items()
            if one and one.trouble and one.is_current(now)
        }
        yield labelled(
            "flora_breaker_open",
            "1 while FLORA refuses the API key.",
            {name: troubles.get(name) is Trouble.KEY_REFUSED for name in keyed},
        )
        yield labelled(
            "flora_up",
            "0 if FLORA was asked and has not answered for 30 s; absent if nothing asks it.",
            {name: one.answers(now) for name, one in states.items() if one},
        )
        yield labelled(
            "flora_misconfigured",
            "1 if FLORA_BASE_URL does not lead to FLORA, or the key belongs to another workspace.",
            {name: troubles.get(name) in _MISCONFIGURED for name in keyed},
        )
        yield labelled(
            "flora_last_answer_timestamp_seconds",
            "When FLORA last answered any process; 0 if never.",
            {name: timestamp(one.answered_at if one else None) for name, one in states.items()},
        )
