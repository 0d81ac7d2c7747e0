"""How things stand in the database, which every process tells alike: take the maximum, not the sum.

It is read when somebody looks, and at most every few seconds, so that a curious scraper is no load.
Where the database does not answer in time nothing is told but that: a number that may be old would
hide the failure.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Final

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.polling.workspaces import Workspaces
from tracker.starting.budgets import BudgetReader
from tracker.store.engine import Database
from tracker.store.queries import starts as callback_addresses
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.attention import Gauges, SweepHealth, read_gauges, sweep_health
from tracker.store.queries.spending import Usage

KEEP_SECONDS: Final = 5.0
"""For so long what was read, or that nothing could be read, is told again."""
PATIENCE: Final = 4.0
"""Prometheus gives up after ten seconds; so long the database has."""
UNKNOWN: Final = "unknown"
"""The workspace of a run that nobody has named the workspace of."""
EXPECTED: Final = ("came", "late", "missed")

log = structlog.get_logger(__name__)


class State(Collector):
    """Reads the database when `refresh` is called, and tells what it read."""

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        budgets: BudgetReader,
        clock: Clock,
        keep_seconds: float = KEEP_SECONDS,
        patience: float = PATIENCE,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._budgets = budgets
        self._usages: list[Usage] = []
        self._clock = clock
        self._keep_seconds = keep_seconds
        self._patience = patience
        self._reading: asyncio.Task[None] | None = None
        self._fresh_until = 0.0
        self._took = 0.0
        self._gauges: Gauges | None = None
        self._sweeps: list[SweepHealth] = []
        self._unread: list[coverage.Unread] = []
        self._now = clock()
        self._bare = False
        self._failing = False

    async def refresh(self) -> None:
        """Read again what was read too long ago. However many ask, the database is asked once."""
        loop = asyncio.get_running_loop()
        if self._reading is None or (self._reading.done() and loop.time() >= self._fresh_until):
            self._reading = asyncio.create_task(self._read(), name="metrics-state")
        # A read that came to no end in time may take its time to be broken off, too.
        done, _ = await asyncio.wait([self._reading], timeout=self._patience)
        for reading in done:
            reading.result()

    async def aclose(self) -> None:
        """Let go of the database."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._gauges = None
        try:
            async with asyncio.timeout(self._patience):
                now = self._clock()
                gauges = await read_gauges(self._database, now=now)
                bare = await callback_addresses.own_are_missing(self._database, now=now)
                self._sweeps = await sweep_health(self._database)
                self._usages = await self._budgets.usages()
                self._unread = coverage.unread(await coverage.everything(self._database))
        except (StoreError, TimeoutError) as error:
            if not self._failing:
                said = str(error) or "it does not answer in time"
                log.warning("metrics.database_unread", error=said)
            self._failing = True
        else:
            self._gauges, self._now, self._bare = gauges, now, bare
            self._failing = False
        self._took = loop.time() - began
        self._fresh_until = loop.time() + self._keep_seconds

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry, which wants them before anything was read."""
        return self._tell(_NOTHING)

    def collect(self) -> Iterator[Metric]:
        """What was last read."""
        return self._tell(self._gauges)

    def _tell(self, gauges: Gauges | None) -> Iterator[Metric]:
        yield _plain(
            "database_up",
            "1 where the database answered this process in time.",
            int(gauges is not None),
        )
        yield _plain("state_read_seconds", "How long the state metrics took to read.", self._took)
        if gauges is None:
            return
        yield from _runs(gauges, self._now)
        yield from _callbacks(gauges)
        yield from _inbox(gauges, self._now)
        yield _plain(
            "callback_own_addresses_missing",
            "1 while callbacks to the addresses of single starts do not come, so that new starts "
            "use the bare one.",
            int(self._bare),
        )
        yield from self._histories()
        yield from _spent(self._usages)

    def _histories(self) -> Iterator[Metric]:
        complete = _by_workspace(
            "sweep_last_complete_timestamp_seconds",
            "When the last complete sweep ended; 0 if there was none.",
        )
        failed = _by_workspace("sweep_failed", "1 where the newest sweep failed.")
        verified = _by_workspace(
            "history_verified_timestamp_seconds",
            "Up to which moment, by FLORA's clock, all technique runs are here.",
        )
        swept = {one.workspace_id or UNKNOWN: one for one in self._sweeps}
        for name, one in swept.items():
            complete.add_metric([name], one.complete_at.timestamp() if one.complete_at else 0)
            failed.add_metric([name], int(one.last_error is not None))
            if one.through is not None:
                verified.add_metric([name], one.through.timestamp())
        for workspace in self._workspaces:
            keyed = workspace.client is not None and workspace.workspace_id is not None
            if keyed and workspace.name not in swept:
                complete.add_metric([workspace.name], 0)
        yield from (complete, failed, verified, self._gaps(swept))

    def _gaps(self, swept: Mapping[str, SweepHealth]) -> GaugeMetricFamily:
        gaps = GaugeMetricFamily(
            "tracker_history_gaps",
            "Stretches of the history that FLORA did not let us read; 1 where it lists none.",
            labels=["workspace_id", "run_type"],
        )
        counted = Counter((one.workspace_id, one.run_type) for one in self._unread)
        for name, one in swept.items():
            refused = int(one.generations_error is not None)
            gaps.add_metric([name, "technique"], counted[name, "technique"])
            gaps.add_metric([name, "generation"], counted[name, "generation"] + refused)
        return gaps


_NOTHING: Final = Gauges(
    runs={},
    callbacks={},
    cost_today={},
    quoted_today={},
    not_final={},
    unpriced={},
    failed_today={},
    due=0,
    overdue=0,
    awaiting_callback=0,
    oldest_due_at=None,
    quarantined=0,
    waiting=0,
    oldest_waiting_at=None,
    last_callback_at=None,
    open_starts=0,
    unresolved_starts=0,
)


def _runs(gauges: Gauges, now: datetime) -> Iterator[Metric]:
    runs = GaugeMetricFamily(
        "tracker_runs", "Runs by state.", labels=["workspace_id", "status", "tracking"]
    )
    for (workspace, status, tracking), count in sorted(gauges.runs.items()):
        runs.add_metric([workspace or UNKNOWN, status, tracking], count)
    yield runs
    yield _plain("runs_due", "Runs that wait to be read.", gauges.due)
    yield _plain("runs_overdue", "Runs that have waited for over a minute.", gauges.overdue)
    oldest = gauges.oldest_due_at
    waited = max((now - oldest).total_seconds(), 0) if oldest else 0
    yield _plain("oldest_due_seconds", "How long the first of them has waited.", waited)
    yield _plain(
        "runs_awaiting_callback", "Open runs whose callback has not come.", gauges.awaiting_callback
    )
    yield _plain(
        "starts_open",
        "Starts that were sent and whose outcome is not known yet.",
        gauges.open_starts,
    )
    yield _plain(
        "starts_unresolved",
        "Starts that are left to a person.",
        gauges.unresolved_starts,
    )
    yield from _bills(gauges)


def _bills(gauges: Gauges) -> Iterator[Metric]:
    told: tuple[tuple[str, str, Mapping[str, Decimal | int]], ...] = (
        (
            "cost_today_usd",
            "What the runs that ended today (UTC) cost: at least, while bills may still come.",
            gauges.cost_today,
        ),
        (
            "quoted_today_usd",
            "What those of them that are not billed yet were quoted.",
            gauges.quoted_today,
        ),
        (
            "runs_cost_not_final",
            "Runs that ended in the last 7 days whose bill may still come or change.",
            gauges.not_final,
        ),
        (
            "runs_unpriced",
            "Runs that ended in the last 7 days and were never billed: their cost is not known.",
            gauges.unpriced,
        ),
    )
    for name, meaning, values in told:
        metric = _by_workspace(name, meaning)
        for workspace, value in sorted(values.items()):
            metric.add_metric([workspace or UNKNOWN], float(value))
        yield metric
    failed = GaugeMetricFamily(
        "tracker_failed_today",
        "Runs that failed today (UTC), by what to do about them.",
        labels=["workspace_id", "retry_advice"],
    )
    for (workspace, advice), count in sorted(gauges.failed_today.items()):
        failed.add_metric([workspace or UNKNOWN, advice], count)
    yield failed


def _spent(usages: Iterable[Usage]) -> Iterator[Metric]:
    limit = GaugeMetricFamily(
        "tracker_budget_usd", "The most that may be spent in its period.", labels=["budget"]
    )
    used = GaugeMetricFamily(
        "tracker_budget_used_usd",
        "What is used of it: reserved by starts, quoted for runs without a bill, charged.",
        labels=["budget", "part"],
    )
    for usage in usages:
        name = usage.budget.name
        limit.add_metric([name], float(usage.budget.usd))
        for part in ("reserved", "quoted", "charged"):
            used.add_metric([name, part], float(getattr(usage, part)))
    yield from (limit, used)


def _callbacks(gauges: Gauges) -> Iterator[Metric]:
    last = gauges.last_callback_at
    yield _plain(
        "callback_last_received_timestamp_seconds",
        "When the newest callback came; 0 if none ever did.",
        last.timestamp() if last else 0,
    )
    yield _plain(
        "deliveries_quarantined", "Callbacks that were not understood.", gauges.quarantined
    )
    recent = GaugeMetricFamily(
        "tracker_recent_callbacks",
        "What became of the callbacks of runs that ended in this hour and the one before.",
        labels=["workspace_id", "outcome"],
    )
    ratio = _by_workspace(
        "recent_callback_miss_ratio", "The share of the expected ones that did not come."
    )
    for (workspace, outcome), count in sorted(gauges.callbacks.items()):
        recent.add_metric([workspace or UNKNOWN, outcome], count)
    for workspace in sorted({workspace for workspace, _ in gauges.callbacks}):
        counts = [gauges.callbacks.get((workspace, outcome), 0) for outcome in EXPECTED]
        if sum(counts):
            ratio.add_metric([workspace or UNKNOWN], counts[-1] / sum(counts))
    yield from (recent, ratio)


def _inbox(gauges: Gauges, now: datetime) -> Iterator[Metric]:
    yield _plain(
        "inbox_waiting", "Callbacks that are acknowledged and not applied yet.", gauges.waiting
    )
    oldest = gauges.oldest_waiting_at
    waited = max((now - oldest).total_seconds(), 0) if oldest else 0
    yield _plain("inbox_oldest_seconds", "How long the first of them has waited.", waited)


def _plain(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tracker_{name}", meaning, value=value)


def _by_workspace(name: str, meaning: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tracker_{name}", meaning, labels=["workspace_id"])
