"""The scheduled jobs of one process: poll what is due, sweep each history, find lost starts.

APScheduler keeps the times and holds no state: everything lasting is in the database, so any number
of workers may run, and one that dies leaves nothing but leases that run out. The poll job is run
when something becomes due, be it that its time has come or that a callback has just made it so.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Final, Protocol

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from tracker.core.clock import Clock
from tracker.core.errors import StoreError, TrackerError
from tracker.store.signals import Signals
from tracker.tracking.poll import Poller
from tracker.tracking.start import Starter
from tracker.tracking.sweep import Sweeper
from tracker.tracking.workspaces import Workspace, Workspaces
from tracker.worker.cron import cron_trigger

TICK: Final = 15.0
"""Seconds after which the database is asked what is due even if no word came: what a lost
notification costs."""
GATHER: Final = 1.0
"""Seconds between two rounds of polling. A callback that comes alone is followed at once; of many,
those that come within this time share their pages."""
RECOVER_EVERY: Final = timedelta(minutes=1)
"""How often starts whose caller is gone are looked for."""
STOP_WITHIN: Final = 8.0
"""Seconds that running jobs have to end once they were told to."""

log = structlog.get_logger(__name__)


class WorkerServices(Protocol):
    """What the jobs call."""

    @property
    def reconcile_cron(self) -> str:
        """When to sweep."""

    @property
    def poller(self) -> Poller:
        """Polls what is due."""

    @property
    def sweeper(self) -> Sweeper:
        """Sweeps a history."""

    @property
    def starter(self) -> Starter:
        """Finds the runs of lost starts."""

    @property
    def workspaces(self) -> Workspaces:
        """The configured workspaces."""

    @property
    def signals(self) -> Signals:
        """Says when something may have become due."""

    @property
    def clock(self) -> Clock:
        """The wall clock."""


class Worker:
    """The jobs of one process. `start` returns at once; `stop` ends them and gives claims back."""

    def __init__(self, services: WorkerServices) -> None:
        self._services = services
        self._scheduler = AsyncIOScheduler(
            timezone="UTC",
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        self._running: set[asyncio.Task[object]] = set()
        self._round_over = asyncio.Event()
        self._round_began = 0.0
        self._waker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin: one sweep of each workspace now, then by the clock."""
        services = self._services
        now = services.clock()
        keyed = [one for one in services.workspaces if one.client is not None]
        for workspace in keyed:
            self._scheduler.add_job(
                self._job("sweep", partial(self._sweep, workspace)),
                cron_trigger(services.reconcile_cron),
                id=f"sweep:{workspace.slot}",
                next_run_time=now,
            )
        if keyed:
            self._scheduler.add_job(
                self._job("poll", self._poll), IntervalTrigger(seconds=4 * TICK), id="poll"
            )
            self._scheduler.add_job(
                self._job("recover", self._recover),
                IntervalTrigger(seconds=RECOVER_EVERY.total_seconds()),
                id="recover",
                next_run_time=now,
            )
        else:
            log.warning("worker.no_key", advice="set FLORA_API_KEY; until then nothing is polled")
        self._scheduler.start()
        if keyed:
            self._waker = asyncio.create_task(self._wake_when_due(), name="poll-waker")

    async def stop(self) -> None:
        """End the jobs: what is under way is broken off where that is safe, and given back."""
        if self._waker is not None:
            self._waker.cancel()
            await asyncio.wait([self._waker])
        self._scheduler.shutdown(wait=False)  # cancels what runs
        if self._running:
            await asyncio.wait(self._running, timeout=STOP_WITHIN)
        try:
            await self._services.poller.release()
        except StoreError as error:
            log.warning("worker.claims_kept", error=str(error), advice="they run out by themselves")

    def _job(self, name: str, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """A job that reports its failure and is waited for at the end."""

        async def run() -> None:
            task = asyncio.current_task()
            if task is not None:
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            try:
                await work()
            except TrackerError as error:
                log.error("worker.job_failed", job=name, error=str(error))
            except Exception:
                log.exception("worker.job_broken", job=name)

        return run

    async def _poll(self) -> None:
        try:
            more = True
            while more:
                self._round_began = time.monotonic()
                report = await self._services.poller.poll_due()
                more = report.more
                if report.claimed:
                    log.info(
                        "poll.round",
                        claimed=report.claimed,
                        pages=report.pages,
                        reads=report.reads,
                        settled=report.settled,
                        failed=report.failed,
                    )
        finally:
            self._round_over.set()

    async def _sweep(self, workspace: Workspace) -> None:
        report = await self._services.sweeper.sweep(workspace)
        if report.skipped:
            return
        tell = log.info if report.error is None else log.error
        tell(
            "sweep.done" if report.error is None else "sweep.failed",
            workspace_id=report.workspace_id,
            pages=report.pages,
            items=report.items,
            discovered=report.discovered,
            repaired=report.repaired,
            error=report.error,
        )

    async def _recover(self) -> None:
        found = await self._services.starter.recover()
        if found:
            log.info("start.recovered", runs=found)

    async def _wake_when_due(self) -> None:
        """Run the poll job whenever a run is due, and wait for it before looking again."""
        signals, clock = self._services.signals, self._services.clock
        while True:
            try:
                due = await self._services.poller.next_due_at()
            except StoreError as error:
                log.warning("worker.database_down", error=str(error))
                await asyncio.sleep(GATHER)
                continue
            wait = TICK if due is None else (due - clock()).total_seconds()
            if wait > 0:
                await signals.wait_due(min(wait, TICK))
            # Also keeps a run that cannot be claimed (another worker holds it) from making this
            # spin.
            await asyncio.sleep(self._round_began + GATHER - time.monotonic())
            self._round_over.clear()
            self._scheduler.modify_job("poll", next_run_time=clock())
            await self._round_over.wait()
