"""Current values of the database and of this process, read at each scrape.

Those of the database are the same in every process: take the maximum, not the sum. They are read at
most every few seconds. While the database does not answer they are left out, since old numbers
would hide the failure.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tracker import __version__
from tracker.core.clock import Clock
from tracker.core.contact import Trouble
from tracker.core.errors import StoreError
from tracker.core.log import get_logger
from tracker.core.waiting import cancel
from tracker.operations.metrics import Metrics
from tracker.polling.poll import Contacts
from tracker.starting.start import BudgetReader
from tracker.store import coordination
from tracker.store.queries import endpoints, starts, sweeps
from tracker.store.queries.endpoints import Backlog
from tracker.store.queries.overview import read_gauges
from tracker.store.queries.sweeps import sweep_health
from tracker.workspaces import UNKNOWN, Service, Workspaces

KEEP_SECONDS: Final = 5.0
"""How long a reading of the database, or its failure, is reused."""
PATIENCE: Final = 4.0
"""Seconds for reading the database; Prometheus gives up after ten."""
_MISCONFIGURED: Final = (Trouble.NOT_FLORA, Trouble.LISTS_REFUSED, Trouble.OTHER_WORKSPACE)

_HELP: Final[dict[tuple[str, ...], dict[str, str]]] = {
    (): {
        "database_up": "1 if the database answered this process in time, and takes its writes.",
        "state_read_seconds": "Time to read the database's metrics.",
        "runs_due": "Runs due to be polled.",
        "runs_overdue": "Runs due for over a minute, or whose last read is to be repeated.",
        "oldest_due_seconds": "How long the oldest of them is due.",
        "runs_awaiting_callback": "Open runs whose callback has not arrived.",
        "starts_open": "Starts with no known outcome yet.",
        "starts_unresolved": "Starts whose outcome a person has to resolve.",
        "callback_last_received_timestamp_seconds": "When the newest callback arrived; 0 if none "
        "has.",
        "deliveries_quarantined": "Authentic callbacks not understood, not acknowledged.",
        "inbox_waiting": "Acknowledged callbacks not applied yet.",
        "inbox_oldest_seconds": "How long the oldest of them has waited.",
        "callback_own_addresses_missing": "1 if callbacks to addresses of single starts do not "
        "arrive; new starts use the bare one.",
        "settings_stale": "1 if settings in files have changed and are not in force.",
        "queue_entries": "Entries not committed yet.",
        "worker_running": "1 in a process with a worker.",
        "worker_last_round_timestamp_seconds": "When the worker last checked for due runs; 0 if "
        "never.",
        "sweep_interval_seconds": "Longest time between two scheduled sweeps.",
    },
    ("version",): {"build_info": "1, with the version."},
    ("workspace_id",): {
        "cost_today_usd": "Billed cost of runs that ended today (UTC).",
        "quoted_today_usd": "Quotes of those without a bill yet.",
        "runs_cost_not_final": "Runs of the last 7 days whose bill may still arrive or change.",
        "runs_unpriced": "Runs of the last 7 days that were never billed.",
        "recent_callback_miss_ratio": "Share of the expected callbacks that did not arrive.",
        "sweep_last_complete_timestamp_seconds": "When the last complete sweep ended; 0 if there "
        "was none.",
        "sweep_failed": "1 if the newest sweep failed.",
        "history_verified_timestamp_seconds": "Time on FLORA's clock up to which the history was "
        "checked.",
        "flora_requests_in_flight": "Requests to FLORA in flight.",
        "flora_requests_waiting": "Queued requests to FLORA.",
        "flora_paused_seconds": "Rest of a wait set by FLORA.",
        "flora_budget_rate": "Requests to FLORA per second that the request limit allows.",
        "flora_rate_limited": "Requests that FLORA answered 429.",
        "flora_budget_wait_seconds": "Time that requests to FLORA waited for the request limit.",
        "flora_breaker_open": "1 while FLORA refuses the API key.",
        "flora_up": "0 if FLORA was asked and has not answered for 30 s; absent if nothing asks "
        "it.",
        "flora_misconfigured": "1 if FLORA_BASE_URL does not lead to FLORA, or the key belongs to "
        "another workspace.",
        "flora_last_answer_timestamp_seconds": "When FLORA last answered any process; 0 if never.",
    },
    ("workspace_id", "status", "tracking"): {"runs": "Runs by state."},
    ("workspace_id", "retry_advice"): {
        "failed_today": "Runs that failed today (UTC), by retry advice.",
    },
    ("workspace_id", "outcome"): {
        "recent_callbacks": "Callbacks of runs that ended in this hour or the one before, by "
        "outcome.",
    },
    ("workspace_id", "run_type"): {
        "history_gaps": "Spans of the history that FLORA did not let the tracker read.",
    },
    ("budget",): {"budget_usd": "Limit of the budget."},
    ("budget", "part"): {
        "budget_used_usd": "Used: reserved by starts, quoted for runs without a bill, charged.",
    },
    ("endpoint_id",): {
        "endpoint_up": "0 while an endpoint fails or is disabled.",
        "endpoint_disabled": "1 while nothing is sent to the endpoint.",
        "messages_pending": "Messages that wait for their first or next attempt.",
        "messages_failed": "Messages that were given up.",
        "messages_oldest_pending_seconds": "How long the oldest pending message has waited.",
    },
}
"""What each metric means, by labels and name."""
_METRICS: Final = {
    name: (meaning, labels) for labels, named in _HELP.items() for name, meaning in named.items()
}
_TOTALS: Final = frozenset({"flora_rate_limited", "flora_budget_wait_seconds"})
"""Those that only grow, and so are counters."""

Values = dict[str, Any]
"""The values of metrics, by name: a number; with labels, numbers by label or tuple of labels, of
which `None` is left out."""

log = get_logger(__name__)


def _metrics(values: Values) -> Iterator[Metric]:
    for name, value in values.items():
        meaning, labels = _METRICS[name]
        kind = CounterMetricFamily if name in _TOTALS else GaugeMetricFamily
        metric = kind(f"tracker_{name}", meaning, labels=labels)
        for key, one in value.items() if labels else [((), value)]:
            if one is not None:
                words = (key,) if isinstance(key, str) else key
                metric.add_metric([word or UNKNOWN for word in words], float(one))
        yield metric


def timestamp(at: datetime | None) -> float:
    """Unix seconds; 0 for never."""
    return at.timestamp() if at else 0


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
        self._values: Values = {}
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

    def collect(self) -> Iterator[Metric]:
        state = {"database_up": self._up, "state_read_seconds": self._took}
        return _metrics(state | self._values)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._values, self._up = {}, False
        try:
            async with asyncio.timeout(self.patience):
                self._values = await self._read_values()  # shown where only writes fail, too
                await coordination.check_writes(self.database)
            self._up, self._failing = True, False
        except (StoreError, TimeoutError) as error:
            if not self._failing:
                message = str(error) or "the database does not answer in time"
                log.warning("metrics.database_unread", error=message)
            self._failing = True
        self._took = loop.time() - began
        self._fresh_until = loop.time() + self.keep_seconds

    async def _read_values(self) -> Values:
        db, now = self.database, self.clock()

        def age(since: datetime | None) -> float:
            return max((now - since).total_seconds(), 0) if since else 0

        await self.contacts.read()
        found = await read_gauges(db, now=now)
        usages = await self.budgets.usages()
        rows = {
            one.endpoint_id: one
            for one in await endpoints.list_endpoints(db)
            if one.is_configured(now)
        }
        all_backlogs = await endpoints.backlogs(db)
        backlogs = {name: all_backlogs.get(name, Backlog()) for name in rows}
        return await self._history() | {
            "runs": found.runs,
            "runs_due": found.due,
            "runs_overdue": found.overdue,
            "oldest_due_seconds": age(found.oldest_due_at),
            "runs_awaiting_callback": found.awaiting_callback,
            "starts_open": found.open_starts,
            "starts_unresolved": found.unresolved_starts,
            "failed_today": found.failed_today,
            "cost_today_usd": found.cost_today,
            "quoted_today_usd": found.quoted_today,
            "runs_cost_not_final": found.not_final,
            "runs_unpriced": found.unpriced,
            "budget_usd": {one.budget.name: one.budget.usd for one in usages},
            "budget_used_usd": {
                (one.budget.name, part): getattr(one, part)
                for one in usages
                for part in ("reserved", "quoted", "charged")
            },
            "callback_last_received_timestamp_seconds": timestamp(found.last_callback_at),
            "deliveries_quarantined": found.quarantined,
            "recent_callbacks": found.callbacks,
            "recent_callback_miss_ratio": {
                one: found.callback_health(one).miss_rate
                for one in {workspace for workspace, _ in found.callbacks}
            },
            "inbox_waiting": found.waiting,
            "inbox_oldest_seconds": age(found.oldest_waiting_at),
            "callback_own_addresses_missing": await starts.own_are_missing(db, now=now),
            "endpoint_up": {
                name: row.enabled and row.failing_since is None for name, row in rows.items()
            },
            "endpoint_disabled": {name: not row.enabled for name, row in rows.items()},
            "messages_pending": {name: one.pending for name, one in backlogs.items()},
            "messages_failed": {name: one.failed for name, one in backlogs.items()},
            "messages_oldest_pending_seconds": {
                name: age(one.oldest_at) for name, one in backlogs.items()
            },
        }

    async def _history(self) -> Values:
        """The sweeps of each configured workspace; of one that was removed, nothing."""
        ids = {one.workspace_id for one in self.workspaces}
        swept = {
            one.workspace_id or UNKNOWN: one
            for one in await sweep_health(self.database)
            if one.workspace_id in ids
        }
        never = {one.name: 0.0 for one in self.workspaces.keyed if one.workspace_id}
        spans = sweeps.unread(await sweeps.everything(self.database))
        unread = Counter((one.workspace_id, one.run_type) for one in spans)
        gaps = {(name, "technique"): unread[name, "technique"] for name in swept}
        for name, one in swept.items():
            not_listed = one.generations_error is not None
            gaps[name, "generation"] = unread[name, "generation"] + not_listed
        return {
            "sweep_last_complete_timestamp_seconds": never
            | {name: timestamp(one.complete_at) for name, one in swept.items()},
            "sweep_failed": {name: one.last_error is not None for name, one in swept.items()},
            "history_verified_timestamp_seconds": {
                name: one.through and one.through.timestamp() for name, one in swept.items()
            },
            "history_gaps": gaps,
        }


@dataclass(eq=False)
class ProcessGauges(Collector):
    """Current values of this process.

    `waiting` returns the number of entries not committed yet, `is_stale` whether settings in files
    are not in force, `sweep_seconds` the longest time between two scheduled sweeps.
    """

    metrics: Metrics
    _: KW_ONLY
    waiting: Callable[[], int]
    is_stale: Callable[[], bool]
    workspaces: Workspaces
    contacts: Contacts
    sweep_seconds: Callable[[], float]
    clock: Clock

    def collect(self) -> Iterator[Metric]:
        now = self.clock()
        keyed = {one.name: one for one in self.workspaces.keyed}
        limits = {name: one.require_client().request_limit.state() for name, one in keyed.items()}
        states = {name: self.contacts.of(one) for name, one in keyed.items()}
        troubles = {
            name: one.trouble.trouble
            for name, one in states.items()
            if one and one.trouble and one.is_current(now)
        }
        return _metrics(
            {
                "build_info": {__version__: 1},
                "settings_stale": self.is_stale(),
                "queue_entries": self.waiting(),
                "worker_running": self.metrics.worker_running,
                "worker_last_round_timestamp_seconds": timestamp(self.metrics.last_round_at),
                "sweep_interval_seconds": self.sweep_seconds(),
                "flora_requests_in_flight": {name: one.in_flight for name, one in limits.items()},
                "flora_requests_waiting": {name: one.waiting for name, one in limits.items()},
                "flora_paused_seconds": {name: one.paused for name, one in limits.items()},
                "flora_budget_rate": {name: one.rate for name, one in limits.items()},
                "flora_rate_limited": {name: one.limited for name, one in limits.items()},
                "flora_budget_wait_seconds": {name: one.waited for name, one in limits.items()},
                "flora_breaker_open": {
                    name: troubles.get(name) is Trouble.KEY_REFUSED for name in keyed
                },
                "flora_up": {name: one.answers(now) for name, one in states.items() if one},
                "flora_misconfigured": {
                    name: troubles.get(name) in _MISCONFIGURED for name in keyed
                },
                "flora_last_answer_timestamp_seconds": {
                    name: timestamp(one.answered_at if one else None)
                    for name, one in states.items()
                },
            }
        )
