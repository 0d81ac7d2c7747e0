"""The scheduled jobs of one process: poll due runs, read bills again, sweep each history, recover
starts in doubt, read the catalogue, launch ordered batches. `polling` and `starting` do the work.

APScheduler only keeps the times: all state is in the database, so any number of workers may run,
and one that dies leaves only leases, which expire. A task of its own polls whenever a run is due.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.interval import IntervalTrigger
from cronsim import CronSim

from tracker.core.clock import boot_seconds, utc_now
from tracker.core.errors import StoreError, StoreUnavailable, TrackerError
from tracker.core.log import LogRateLimit, get_logger, log_context
from tracker.core.waiting import cancel, repeat
from tracker.workspaces import Workspace

if TYPE_CHECKING:
    from tracker.services import Services

PROBE_EVERY: Final = timedelta(seconds=2)
"""How often to check whether FLORA should be probed."""
CHECK_CATALOGUE_EVERY: Final = timedelta(minutes=20)
"""How often to check whether the catalogue is due to be read."""
STOP_SECONDS: Final = 8.0
"""How long a worker that stops has to end its jobs, launches and deliveries, and to release its
claims. What has not ended by then is cancelled."""
CANCEL_SECONDS: Final = 1.0
"""How long that may then take."""
JUMP: Final = timedelta(seconds=1)
"""A difference of more than this between the wall clock and one that only runs forward means that
the clock was set."""

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerTimes:
    """How often a worker does what, in seconds."""

    tick: float = 15.0
    """After this long the database is read for due runs without a notification: the cost of a lost
    one."""
    round_every: float = 1.0
    """At least, from the beginning of a round of polling to the next, unless the first has left due
    runs to read at once. `tracker.polling.poll.Coalescer` decides how long due runs wait to share
    their pages."""
    recover_every: timedelta = timedelta(seconds=30)
    """How often starts are recovered whose caller is gone."""
    watch_clock_every: float = 2.0
    """Between two comparisons of the wall clock with one that only runs forward."""


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


class Worker:
    """The jobs of one process. `start` returns at once; `stop` ends them and releases claims."""

    def __init__(self, services: "Services", *, times: WorkerTimes = WorkerTimes()) -> None:
        self._services = services
        self._times = times
        self._scheduler = AsyncIOScheduler(
            timezone=UTC,
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        self._running: set[asyncio.Task[object]] = set()
        self._round_began = 0.0
        self._poll_anyway_at = 0.0
        """When to poll though nothing seems to be due: a few ticks later, or the clock was set."""
        self._tasks: list[asyncio.Task[None]] = []
        self._log_limit = LogRateLimit()

    async def start(self) -> None:
        """Start the jobs, with a sweep of each workspace now."""
        services = self._services
        now = utc_now()  # APScheduler compares with the machine's clock
        keyed = services.workspaces.keyed
        for workspace in keyed:
            self._scheduler.add_job(
                self._job("sweep", partial(self._sweep, workspace)),
                CronTrigger(services.settings.tracker_reconcile_cron),
                id=f"sweep:{workspace.place}",
                next_run_time=now,
            )
        at_once = {"next_run_time": now}
        for name, work, every, more in (
            ("recheck", self._recheck, services.recheck_every, {}),
            ("probe", services.contacts.probe, PROBE_EVERY, {}),
            ("recover", self._recover, self._times.recover_every, at_once),
            ("catalogue", self._sync_catalogue, CHECK_CATALOGUE_EVERY, at_once),
        ):
            if keyed:
                trigger = IntervalTrigger(seconds=every.total_seconds(), timezone=UTC)
                self._scheduler.add_job(self._job(name, work), trigger, id=name, **more)
        if not keyed:
            log.warning("worker.no_key", advice="set FLORA_API_KEY; until then nothing is polled")
        await services.webhooks.start()
        self._scheduler.start()
        services.metrics.worker_running = True
        if keyed:
            self._tasks = [
                asyncio.create_task(repeat("poll", self._poll_when_due), name="poller"),
                asyncio.create_task(repeat("clock", self._watch_clock), name="clock-watcher"),
            ]
            services.batch_worker.start()

    @asynccontextmanager
    async def running(self, stopping: asyncio.Event) -> AsyncIterator[None]:
        """The jobs run in the block, until it ends or `stopping` is set."""

        async def stop() -> None:
            await stopping.wait()
            await self.stop()

        await self.start()
        ending = asyncio.create_task(stop(), name="worker-stop")
        try:
            yield
        finally:
            stopping.set()
            await ending

    async def stop(self) -> None:
        """End the jobs, interrupting them, and release their claims, within `STOP_SECONDS`."""
        services = self._services
        services.metrics.worker_running = False
        # A job that is cancelled before its first step could not report that this is no error.
        self._scheduler.pause()
        for task in self._tasks:
            task.cancel()
        await asyncio.sleep(0)
        self._scheduler.shutdown(wait=False)  # cancels what runs
        ending: list[asyncio.Task[object]] = [*self._tasks, *self._running]
        ending += [
            asyncio.create_task(services.webhooks.stop(), name="webhooks"),
            asyncio.create_task(services.batch_worker.stop(), name="batches"),
        ]
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.wait(ending)
                await services.poller.release()
        except (StoreError, TimeoutError) as error:
            why = str(error) or "the database does not answer in time"
            log.warning("worker.claims_kept", error=why, advice="they run out by themselves")
        await cancel(*ending, seconds=CANCEL_SECONDS)
        for part in ending:
            if part.done() and not part.cancelled() and (failure := part.exception()) is not None:
                log.exception("worker.stop_failed", exc_info=failure, task=part.get_name())

    def _job(self, name: str, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """A job that reports its failures, and that `stop` waits for."""

        async def run() -> None:
            task = asyncio.current_task()
            if task is not None:
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            # APScheduler would log a cancelled job as an error. The sleep raises a cancellation
            # that came while the job failed.
            with suppress(asyncio.CancelledError):
                await self._reporting(name, work)
                await asyncio.sleep(0)

        return run

    async def _reporting(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except TrackerError as error:
            self._services.metrics.count("worker_job_failures", name)
            count = 1
            if isinstance(error, StoreUnavailable):  # which recurs every second
                count = self._log_limit.count(name, now=time.monotonic())
            if count:
                log.error("worker.job_failed", job=name, error=str(error), count=count)
        except Exception:
            self._services.metrics.count("worker_job_failures", name)
            log.exception("worker.job_broken", job=name)

    async def _poll(self) -> None:
        more = True
        while more:
            self._round_began = time.monotonic()
            report = await self._services.poller.poll_due(coalesce=True)
            self._services.metrics.polled(report)
            more = report.at_once
            if report.claimed:
                counts = _fields(report, "claimed", "pages", "reads", "settled", "failed")
                log.info("poll.round", **counts)

    async def _recheck(self) -> None:
        # A little less than the interval, so that this process can do the next one as well.
        once_per = self._services.recheck_every * 0.9
        more = True
        while more:
            report = await self._services.poller.recheck_due(once_per=once_per)
            self._services.metrics.rechecked(report)
            more = report.more
            if report.claimed:
                log.info("recheck.round", **_fields(report, "claimed", "pages", "reads", "failed"))

    async def _sweep(self, workspace: Workspace) -> None:
        with log_context(workspace_id=workspace.name):
            report = await self._services.sweeper.sweep(workspace)
        self._services.metrics.swept(report)
        if report.skipped:
            return
        found = _fields(report, "workspace_id", "pages", "items", "discovered", "repaired")
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
            **_fields(report, "new", "back", "gone", "complete"),
        )

    async def _poll_when_due(self) -> None:
        await self._until_due()
        await self._reporting("poll", self._poll)

    async def _watch_clock(self) -> None:
        """Correct APScheduler, which uses the wall clock, by the time that has really passed.

        Its timer does not count seconds in which the machine was suspended, and a clock that is
        set would delay every job, or bring it forward, by as much.
        """
        seconds, now = boot_seconds(), utc_now()
        while True:
            await asyncio.sleep(self._times.watch_clock_every)
            passed, shown = boot_seconds() - seconds, utc_now() - now
            seconds, now = seconds + passed, now + shown
            jump = shown - timedelta(seconds=passed)
            if abs(jump) >= JUMP:
                log.warning("clock.jumped", seconds=round(jump.total_seconds(), 1))
                self._clock_jumped(jump, now)
            self._scheduler.wakeup()

    def _clock_jumped(self, jump: timedelta, now: datetime) -> None:
        """Shift the jobs: intervals continue, cron expressions refer to the new time, and no job
        that was due is skipped."""
        self._poll_anyway_at = 0.0
        self._services.signals.wake_due()
        for job in self._scheduler.get_jobs():
            if isinstance(job.trigger, IntervalTrigger):
                due = job.next_run_time + jump
            else:
                due = min(job.next_run_time, job.trigger.get_next_fire_time(None, now))
            job.modify(next_run_time=due)

    async def _until_due(self) -> None:
        """Return when a run is due and `round_every` has passed since the last round."""
        tick = self._times.tick
        while time.monotonic() < self._poll_anyway_at:
            due = await self._services.poller.next_due_at(coalesce=True)
            wait = tick if due is None else (due - self._services.clock()).total_seconds()
            if wait <= 0:
                break
            # A signal means that a poll was brought forward; the database has the time.
            await self._services.signals.wait_due(min(wait, tick))
        self._poll_anyway_at = time.monotonic() + 4 * tick
        # This also prevents a busy loop about a run that another worker has claimed.
        await asyncio.sleep(self._round_began + self._times.round_every - time.monotonic())


def _fields(report: object, *names: str) -> dict[str, object]:
    return {name: getattr(report, name) for name in names}
