"""The scheduled jobs of one process: poll what is due, read bills again, sweep each history, find
lost starts, read the catalogue.

APScheduler keeps the times and holds no state: everything lasting is in the database, so any number
of workers may run, and one that dies leaves nothing but leases that run out. The poll job is run
when something becomes due, be it that its time has come or that a callback has just made it so.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final, Protocol, TypeVar

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.interval import IntervalTrigger
from cronsim import CronSim
from structlog.contextvars import bound_contextvars

from tracker.core.clock import Clock, boot_seconds, utc_now
from tracker.core.errors import StoreError, StoreUnavailable, TrackerError
from tracker.core.rate_limited_log import Seldom
from tracker.polling.poll import Poller
from tracker.polling.poll_round import PollReport
from tracker.polling.sweep import Sweeper, SweepReport
from tracker.polling.workspaces import Workspace, Workspaces
from tracker.starting.catalogue import CatalogueSync
from tracker.starting.recover import Recovery
from tracker.store.signals import Signals

TICK: Final = 15.0
"""Seconds after which the database is asked what is due even if no word came: what a lost
notification costs."""
GATHER: Final = 1.0
"""Seconds between two rounds of polling at least. A callback that comes alone is followed at once;
`tracker.polling.poll_round` says for how long many are left to share their pages."""
PROBE_EVERY: Final = timedelta(seconds=15)
"""How often FLORA is asked whether it answers again, while it does not."""
RECOVER_EVERY: Final = timedelta(seconds=30)
"""How often starts whose caller is gone are looked for."""
LOOK_AT_CATALOGUE_EVERY: Final = timedelta(minutes=20)
"""How often it is looked whether the catalogue is due to be read."""
STOP_WITHIN: Final = 8.0
"""Seconds that running jobs have to end once they were told to."""
GIVE_BACK_WITHIN: Final = 2.0
"""Seconds in which what they leave is then given back."""

WATCH_CLOCK_EVERY: Final = 2.0
"""Seconds between two comparisons of the wall clock with one that only runs forward."""
JUMP: Final = timedelta(seconds=1)
"""A difference of more than this between the two is a clock that was set."""

log = structlog.get_logger(__name__)


class CronTrigger(BaseTrigger):  # type: ignore[misc]
    """A checked cron expression, in UTC.

    APScheduler's own trigger counts weekdays from Monday, and combines a day of the month with a
    weekday by "and", where cron counts from Sunday and takes either.
    """

    def __init__(self, expression: str) -> None:
        self._expression = expression

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
        """The first time after `previous`, or from `now` on."""
        if previous is None or previous > now:
            previous = now - timedelta(microseconds=1)
        return next(CronSim(self._expression, previous.astimezone(UTC)))


class Watches(Protocol):
    """Counts what the jobs did."""

    def worker_started(self) -> None:
        """This process polls and sweeps from now on."""

    def worker_stopped(self) -> None:
        """This process does not any more."""

    def polled(self, report: PollReport) -> None:
        """A round of polling is over."""

    def rechecked(self, report: PollReport) -> None:
        """A round of reading bills again is over."""

    def swept(self, report: SweepReport) -> None:
        """A sweep is over, be it that another process was at it."""

    def job_failed(self, task: str) -> None:
        """A job ended with an error."""


class WorkerServices(Protocol):
    """What the jobs call."""

    @property
    def reconcile_cron(self) -> str:
        """When to sweep."""

    @property
    def recheck_every(self) -> timedelta:
        """How often to read settled runs again whose bill is due."""

    @property
    def poller(self) -> Poller:
        """Polls what is due."""

    @property
    def sweeper(self) -> Sweeper:
        """Sweeps a history."""

    @property
    def recovery(self) -> Recovery:
        """Finds the runs of lost starts."""

    @property
    def catalogue_sync(self) -> CatalogueSync:
        """Reads FLORA's catalogue."""

    @property
    def workspaces(self) -> Workspaces:
        """The configured workspaces."""

    @property
    def signals(self) -> Signals:
        """Says when something may have become due."""

    @property
    def metrics(self) -> Watches:
        """Counts what was done."""

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
        self._tasks: list[asyncio.Task[None]] = []
        self._seldom = Seldom()

    async def start(self) -> None:
        """Begin: one sweep of each workspace now, then by the clock."""
        services = self._services
        now = utc_now()  # APScheduler compares with the machine's own clock
        keyed = [one for one in services.workspaces if one.client is not None]
        for workspace in keyed:
            self._scheduler.add_job(
                self._job("sweep", partial(self._sweep, workspace)),
                CronTrigger(services.reconcile_cron),
                id=f"sweep:{workspace.slot}",
                next_run_time=now,
            )
        if keyed:
            self._scheduler.add_job(
                self._job("poll", self._poll), IntervalTrigger(seconds=4 * TICK), id="poll"
            )
            self._scheduler.add_job(
                self._job("recheck", self._recheck),
                IntervalTrigger(seconds=services.recheck_every.total_seconds()),
                id="recheck",
            )
            self._scheduler.add_job(
                self._job("probe", services.poller.probe),
                IntervalTrigger(seconds=PROBE_EVERY.total_seconds()),
                id="probe",
            )
            self._scheduler.add_job(
                self._job("recover", self._recover),
                IntervalTrigger(seconds=RECOVER_EVERY.total_seconds()),
                id="recover",
                next_run_time=now,
            )
            self._scheduler.add_job(
                self._job("catalogue", self._sync_catalogue),
                IntervalTrigger(seconds=LOOK_AT_CATALOGUE_EVERY.total_seconds()),
                id="catalogue",
                next_run_time=now,
            )
        else:
            log.warning("worker.no_key", advice="set FLORA_API_KEY; until then nothing is polled")
        self._scheduler.start()
        services.metrics.worker_started()
        if keyed:
            self._tasks = [
                asyncio.create_task(self._wake_when_due(), name="poll-waker"),
                asyncio.create_task(self._watch_clock(), name="clock-watcher"),
            ]

    async def stop(self) -> None:
        """End the jobs: what is under way is broken off where that is safe, and given back."""
        self._services.metrics.worker_stopped()
        for background in self._tasks:
            background.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        # A job that is cancelled before its first step never comes to say that this is no error.
        self._scheduler.pause()
        await asyncio.sleep(0)
        self._scheduler.shutdown(wait=False)  # cancels what runs
        if self._running:
            await asyncio.wait(self._running, timeout=STOP_WITHIN)
        for task in self._running:
            task.cancel()  # not even its giving back is waited for any longer
        try:
            async with asyncio.timeout(GIVE_BACK_WITHIN):
                await self._services.poller.release()
        except (StoreError, TimeoutError) as error:
            why = str(error) or "the database does not answer in time"
            log.warning("worker.claims_kept", error=why, advice="they run out by themselves")

    def _job(self, name: str, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """A job that reports its failure and is waited for at the end."""

        async def run() -> None:
            task = asyncio.current_task()
            if task is not None:
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            # Told to stop it ends, which APScheduler would log as an error; so it would if it had
            # failed meanwhile, and only the next wait came to know that it was told.
            with suppress(asyncio.CancelledError):
                try:
                    await work()
                except TrackerError as error:
                    self._services.metrics.job_failed(name)
                    self._say_failed(name, error)
                except Exception:
                    self._services.metrics.job_failed(name)
                    log.exception("worker.job_broken", job=name)
                await asyncio.sleep(0)

        return run

    def _say_failed(self, name: str, error: TrackerError) -> None:
        count = 1
        if isinstance(error, StoreUnavailable):  # it would say the same every second
            count = self._seldom.count(name, now=time.monotonic())
        if count:
            log.error("worker.job_failed", job=name, error=str(error), count=count)

    async def _poll(self) -> None:
        try:
            more = True
            while more:
                self._round_began = time.monotonic()
                report = await self._services.poller.poll_due(coalesce=True)
                self._services.metrics.polled(report)
                more = report.at_once
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

    async def _recheck(self) -> None:
        # A little less than the interval, so that this process may go on when its turn is over.
        turn = self._services.recheck_every * 0.9
        more = True
        while more:
            report = await self._services.poller.recheck_due(turn=turn)
            self._services.metrics.rechecked(report)
            more = report.more
            if report.claimed:
                log.info(
                    "recheck.round",
                    claimed=report.claimed,
                    pages=report.pages,
                    reads=report.reads,
                    failed=report.failed,
                )

    async def _sweep(self, workspace: Workspace) -> None:
        with bound_contextvars(workspace_id=workspace.name):
            report = await self._services.sweeper.sweep(workspace)
        self._services.metrics.swept(report)
        if report.skipped:
            return
        found = {
            "workspace_id": report.workspace_id,
            "pages": report.pages,
            "items": report.items,
            "discovered": report.discovered,
            "repaired": report.repaired,
        }
        if report.error is None:
            log.info("sweep.done", **found)
        else:
            log.error("sweep.failed", **found, error=report.error)

    async def _recover(self) -> None:
        found = await self._services.recovery.recover()
        if found:
            log.info("start.recovered", runs=found)

    async def _sync_catalogue(self) -> None:
        report = await self._services.catalogue_sync.sync_if_due()
        if report is None or report.skipped:
            return
        for one in report.lists:
            if one.error is not None:
                log.error("catalogue.failed", workspace_id=one.workspace_id, error=one.error)
        log.info(
            "catalogue.read",
            techniques=sum(one.techniques for one in report.lists),
            new=report.new,
            back=report.back,
            gone=report.gone,
            complete=report.complete,
        )

    async def _wake_when_due(self) -> None:
        """Run the poll job whenever a run is due, and wait for it before looking again."""
        down = False
        while True:
            try:
                await self._until_due()
                down = False
                self._round_over.clear()
                self._scheduler.modify_job("poll", next_run_time=utc_now())
                await self._round_over.wait()
            except StoreError as error:
                if not down:
                    log.warning("worker.database_down", error=str(error))
                down = True
                await asyncio.sleep(GATHER)
            except Exception:  # this task is what makes polling prompt: it goes on whatever happens
                log.exception("worker.waker_failed")
                await asyncio.sleep(GATHER)

    async def _watch_clock(self) -> None:
        """Keep APScheduler, which goes by the wall clock, to the time that has really passed.

        Its timer counts no seconds in which the machine was suspended, and a clock that was set
        would put every job off, or bring it forward, by as much.
        """
        seconds, now = boot_seconds(), utc_now()
        while True:
            await asyncio.sleep(WATCH_CLOCK_EVERY)
            passed, told = boot_seconds() - seconds, utc_now() - now
            seconds, now = seconds + passed, now + told
            jump = told - timedelta(seconds=passed)
            if abs(jump) >= JUMP:
                log.warning("clock.jumped", seconds=round(jump.total_seconds(), 1))
                self._clock_jumped(jump, now)
            self._scheduler.wakeup()

    def _clock_jumped(self, jump: timedelta, now: datetime) -> None:
        """Intervals go on as they were; a cron expression means the new time, and nothing that was
        due is left out."""
        self._services.poller.clock_jumped()
        self._services.recovery.clock_jumped()
        for job in self._scheduler.get_jobs():
            if job.id == "poll":
                due = now
            elif isinstance(job.trigger, IntervalTrigger):
                due = job.next_run_time + jump
            else:
                due = min(job.next_run_time, job.trigger.get_next_fire_time(None, now))
            job.modify(next_run_time=due)

    async def _until_due(self) -> None:
        """Return when a run is due, and the round before lies long enough back."""
        while True:
            due = await self._services.poller.next_due_at(coalesce=True)
            wait = TICK if due is None else (due - self._services.clock()).total_seconds()
            if wait <= 0:
                break
            # A signal says that some look was brought forward: when it is due, the database tells.
            await self._services.signals.wait_due(min(wait, TICK))
        # This also keeps a run that cannot be claimed, because another worker holds it, from
        # making the waker spin.
        await asyncio.sleep(self._round_began + GATHER - time.monotonic())


# The worker as a process of its own, without an HTTP port: runs until SIGTERM or SIGINT.


log = structlog.get_logger(__name__)

S = TypeVar("S", bound=WorkerServices)


def run(open_services: Callable[[], AbstractAsyncContextManager[S]]) -> int:
    """Work until told to stop; returns 0. Raises what `open_services` raises."""
    asyncio.run(_run(open_services))
    return 0


async def _run(open_services: Callable[[], AbstractAsyncContextManager[S]]) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    async with open_services() as services:
        worker = Worker(services)
        await worker.start()
        log.info("working", workspaces=len(services.workspaces))
        try:
            await told.wait()
        finally:
            log.info("stopping")
            await worker.stop()
