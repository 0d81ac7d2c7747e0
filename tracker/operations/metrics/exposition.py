"""The metrics of one process: what is counted, what is asked, and the text that Prometheus reads.

There is a registry for each set of services, so that two sets in one process share nothing. The
files with which prometheus-client gathers several processes behind one port are not used: each of
ours has a port of its own, and what must be the same everywhere comes from the database.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from tracker.core.clock import Clock
from tracker.operations.metrics.now import Now, WorkerState
from tracker.operations.metrics.state import State
from tracker.operations.metrics.work import Work
from tracker.polling.poll_round import PollReport
from tracker.polling.workspaces import Workspaces
from tracker.starting.budgets import BudgetReader
from tracker.store.engine import Database

# A second series beside each counter, with the time of its first increase: nobody asks for it.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics(Work):
    """All metrics of a process: the hooks of `Work`, and what is asked at each scrape."""

    def __init__(self, *, clock: Clock) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry)
        self._clock = clock
        self._worker = WorkerState()
        self._state: State | None = None
        ProcessCollector(registry=self.registry)

    def watch(
        self,
        *,
        database: Database,
        waiting: Callable[[], int],
        workspaces: Workspaces,
        budgets: BudgetReader,
        sweep_seconds: Callable[[], float],
    ) -> None:
        """Ask these as well: see `Now` and `State`. `aclose` comes before the database's end."""
        self.expect(list(workspaces))
        self.registry.register(
            Now(
                waiting=waiting,
                workspaces=workspaces,
                worker=self._worker,
                sweep_seconds=sweep_seconds,
            )
        )
        self._state = State(
            database=database, workspaces=workspaces, budgets=budgets, clock=self._clock
        )
        self.registry.register(self._state)

    async def aclose(self) -> None:
        """Let go of the database."""
        if self._state is not None:
            await self._state.aclose()

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The text, and its content type: of those that `accept` names, the one that we speak."""
        if self._state is not None:
            await self._state.refresh()
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # it names a version that is no number
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type

    def worker_started(self) -> None:
        """This process polls and sweeps from now on."""
        self._worker.running = True

    def worker_stopped(self) -> None:
        """This process does not any more."""
        self._worker.running = False

    def polled(self, report: PollReport) -> None:
        """A round of polling is over."""
        super().polled(report)
        self._worker.last_round_at = self._clock()
