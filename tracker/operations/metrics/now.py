"""How one process is at this moment, asked when somebody looks: its queue, its budgets, its worker.

Nothing is kept up to date in between, so that being watched costs nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tracker import __version__
from tracker.flora.contact import SILENT, Trouble
from tracker.flora.request_limit import BudgetState
from tracker.polling.workspaces import Workspaces

_WORKSPACE: Final = ["workspace_id"]
_BUDGETS: Final[tuple[tuple[str, str, Callable[[BudgetState], float | None]], ...]] = (
    ("flora_requests_in_flight", "Requests to FLORA under way.", lambda one: one.in_flight),
    ("flora_requests_waiting", "Calls that wait for leave to be sent.", lambda one: one.waiting),
    ("flora_paused_seconds", "How long FLORA's wait still lasts.", lambda one: one.paused),
    (
        "flora_budget_rate",
        "Requests a second, while FLORA's limit is felt; absent while it is not.",
        lambda one: one.rate,
    ),
)
_TOTALS: Final[tuple[tuple[str, str, Callable[[BudgetState], float]], ...]] = (
    ("flora_rate_limited", "Requests that FLORA refused as too many.", lambda one: one.limited),
    ("flora_budget_wait_seconds", "Time that calls waited for leave.", lambda one: one.waited),
)


class WorkerState:
    """Whether this process has a worker, and when that last looked for what is due."""

    def __init__(self) -> None:
        self.running = False
        self.last_round_at: datetime | None = None


class Now(Collector):
    """What is asked of this process.

    `waiting` gives how many entries are not committed yet, `sweep_seconds` the longest time between
    two scheduled sweeps.
    """

    def __init__(
        self,
        *,
        waiting: Callable[[], int],
        workspaces: Workspaces,
        worker: WorkerState,
        sweep_seconds: Callable[[], float],
    ) -> None:
        self._waiting = waiting
        self._workspaces = workspaces
        self._worker = worker
        self._sweep_seconds = sweep_seconds

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry: they are always the same."""
        return self._tell(sweep_seconds=0)

    def collect(self) -> Iterator[Metric]:
        """All of it, as it is now."""
        return self._tell(self._sweep_seconds())

    def _tell(self, sweep_seconds: float) -> Iterator[Metric]:
        build = GaugeMetricFamily("tracker_build_info", "1, with the version.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield _gauge("queue_entries", "Entries that are not committed yet.", self._waiting())
        yield _gauge("worker_running", "1 in a process with a worker.", int(self._worker.running))
        last_round = self._worker.last_round_at
        yield _gauge(
            "worker_last_round_timestamp_seconds",
            "When the worker last looked for what is due; 0 if it never did.",
            last_round.timestamp() if last_round else 0,
        )
        yield _gauge(
            "sweep_interval_seconds",
            "The longest time between two scheduled sweeps.",
            sweep_seconds,
        )
        yield from self._flora()

    def _flora(self) -> Iterator[Metric]:
        clients = {one.name: one.client for one in self._workspaces if one.client is not None}
        states = {name: client.budget.state() for name, client in clients.items()}
        for name, meaning, value in _BUDGETS:
            gauge = GaugeMetricFamily(f"tracker_{name}", meaning, labels=_WORKSPACE)
            for workspace, state in states.items():
                if (amount := value(state)) is not None:
                    gauge.add_metric([workspace], amount)
            yield gauge
        for name, meaning, total in _TOTALS:
            counter = CounterMetricFamily(f"tracker_{name}", meaning, labels=_WORKSPACE)
            for workspace, state in states.items():
                counter.add_metric([workspace], total(state))
            yield counter
        breaker = GaugeMetricFamily(
            "tracker_flora_breaker_open", "1 while FLORA refuses the key.", labels=_WORKSPACE
        )
        for workspace, client in clients.items():
            breaker.add_metric([workspace], int(client.breaker.open))
        yield breaker
        up = GaugeMetricFamily(
            "tracker_flora_up",
            "0 where FLORA, although it was asked, has not answered for 30 s.",
            labels=_WORKSPACE,
        )
        misfit = GaugeMetricFamily(
            "tracker_flora_misconfigured",
            "1 where FLORA_BASE_URL does not lead to FLORA, or the key reads another workspace.",
            labels=_WORKSPACE,
        )
        for workspace, client in clients.items():
            found = client.contact.found
            trouble = None if found is None else found.trouble
            up.add_metric([workspace], int(trouble not in SILENT))
            misfit.add_metric([workspace], int(trouble not in (None, Trouble.UNREACHABLE)))
        yield up
        yield misfit


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tracker_{name}", meaning, value=value)
