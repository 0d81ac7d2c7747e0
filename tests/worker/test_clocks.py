"""A wall clock that is set delays nothing, repeats nothing, and costs a run one poll at most."""

from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from typing import Any

import apscheduler.schedulers.base
import apscheduler.triggers.interval
import pytest

import tracker.store.clock
import tracker.worker
from tests.support.clocks import HandClock
from tests.support.logs import capture_logs
from tests.support.shares import shared
from tests.support.waiting import eventually
from tests.worker.conftest import MakeFlora, OpenServices, reads_of, the_run
from tests.worker.test_poll import poll_to_the_end, start
from tests.worker.test_scheduler import swept
from tracker.core.clock import utc_now
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running
from tracker.store import coordination
from tracker.store.queries import sweeps
from tracker.worker import Worker, WorkerTimes

SIX_HOURS = 6 * 3600
LONGEST = timedelta(minutes=5)
"""The longest wait for a poll, as the settings have it by default."""


@pytest.mark.parametrize("moved", [-SIX_HOURS, SIX_HOURS], ids=["back", "forward"])
async def test_a_clock_that_is_set_puts_no_poll_off(
    moved: float, services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run settles within its usual waits, and nobody's claim or lease outlasts it, which a
    process that died has left."""
    [run_id] = await start(services)
    lease = timedelta(seconds=30)
    await coordination.claim_due(
        services.database, holder="dead", now=clock() + LONGEST, lease=lease, limit=1
    )
    assert await coordination.take_lease(services.database, "sweep:default", "dead", clock(), lease)
    clock.move(moved)
    flora.world.change({"clock_offset": -moved})  # FLORA's clock goes on as it was
    await services.poller.poll_due()
    await poll_to_the_end(services, clock, within=LONGEST.total_seconds() + 60)
    record = await the_run(services, run_id)
    assert record.run.settled
    assert record.checks + reads_of(flora).get("runs.list", 0) <= 5
    [workspace] = services.workspaces
    assert not (await services.sweeper.sweep(workspace)).skipped


async def test_no_poll_lies_further_ahead_than_the_longest_wait(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Anyone who wrote it: a process that starts after the clock was set back looks for that, and
    reads each run once."""
    async with make_flora(run_seconds=1e6) as flora:
        services = await open_on(flora)
        run_ids = await start(services, 3)
        before = sum(reads_of(flora).values())
        clock.move(-SIX_HOURS)
        flora.world.change({"clock_offset": SIX_HOURS})
        services = await open_on(flora)
        for _ in range(3):
            await services.poller.poll_due()
            for run_id in run_ids:
                due = (await the_run(services, run_id)).next_check_at
                assert due is not None
                assert due <= clock() + LONGEST
        assert 1 <= sum(reads_of(flora).values()) - before <= len(run_ids)


BILLS = {
    "corrected": {"corrections": 1.0, "correction_seconds": 30.0},
    "late": {"late_bills": 1.0, "bill_seconds": (30.0,)},
}


@pytest.mark.parametrize("bill", shared([*BILLS], of=2))
@pytest.mark.parametrize(
    "hours", [-20, 25, *(pytest.param(hours, marks=pytest.mark.thorough) for hours in (-1, 1))]
)
async def test_no_bill_waits_for_a_clock_that_is_set(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, hours: int, bill: str
) -> None:
    """The bill is read within its usual waits. What was read at a time that is still to come counts
    until then."""
    async with make_flora(**BILLS[bill]) as flora:
        services = await open_on(flora)
        [run_id] = await start(services)
        await poll_to_the_end(services, clock, within=120)
        clock.set(hours * 3600)
        flora.world.change({"clock_offset": -hours * 3600})
        await services.clock.check()
        await read_bills(services, clock)
        if hours < 0 and bill == "corrected":
            for _ in range(-hours + 5):
                clock.move(3600)
                await services.poller.recheck_due()
        await assert_billed(services, flora, run_id)


async def test_a_bill_is_read_no_more_often_because_the_clock_was_set_back(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Once it was made due it has its usual waits, until the old time comes."""
    async with make_flora(**BILLS["corrected"]) as flora:
        services = await open_on(flora)
        await start(services)
        await poll_to_the_end(services, clock, within=120)
        before = sum(reads_of(flora).values())
        clock.set(-20 * 3600)
        flora.world.change({"clock_offset": 20 * 3600})
        await services.clock.check()
        for _ in range(36):
            clock.move(300)  # so that far schedules are searched for again
            await services.poller.recheck_due()
        assert 0 < sum(reads_of(flora).values()) - before < 12


@pytest.mark.parametrize("bill", shared([*BILLS], of=2))
@pytest.mark.parametrize(
    "hours", [-200_000, 25, *(pytest.param(hours, marks=pytest.mark.thorough) for hours in (-1, 1))]
)
async def test_a_wrong_date_makes_no_bill_final_and_gives_none_up(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, hours: float, bill: str
) -> None:
    """FLORA's answers, or a gateway's, have another `Date` while the end of a run is read."""
    async with make_flora(**BILLS[bill]) as flora:
        services = await open_on(flora)
        [run_id] = await start(services)
        flora.world.change({"date_offset": hours * 3600})
        await poll_to_the_end(services, clock, within=120)
        assert not (await the_run(services, run_id)).cost_final
        if hours > 0:  # else FLORA's own time of the end shows that it is wrong
            flora.world.change({"date_offset": 0})
        await read_bills(services, clock)
        await assert_billed(services, flora, run_id)


async def read_bills(services: Services, clock: HandClock) -> None:
    for _ in range(40):
        clock.move(5)
        await services.poller.recheck_due()


async def assert_billed(services: Services, flora: Simulator, run_id: str) -> None:
    """The run has its bill, for good."""
    record = await the_run(services, run_id)
    assert float(record.run.charged_cost or 0) == flora.world.runs[run_id].cost
    assert record.cost_final
    assert record.recheck_at is None


class Wall:
    """The wall clock of this process, which the test may set."""

    def __init__(self) -> None:
        self.offset = timedelta()

    def __call__(self) -> datetime:
        return utc_now() + self.offset

    def now(self, zone: tzinfo | None = None) -> datetime:
        return (datetime.now(zone)) + self.offset


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    wall = Wall()

    class Time(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return wall.now(tz)

    for module in (apscheduler.schedulers.base, apscheduler.triggers.interval):
        monkeypatch.setattr(module, "datetime", Time)
    for module in (tracker.worker, tracker.store.clock):
        monkeypatch.setattr(module, "utc_now", wall)
    return wall


async def test_a_worker_whose_clock_is_set_back_goes_on(database_url: str, wall: Wall) -> None:
    """The next minute of the new time has its sweep, the next poll comes when it is due, and the
    log says what happened."""
    # No minute is full before the clock is set.
    before = wall.offset = timedelta(seconds=20 - utc_now().second)
    async with running(Options(run_seconds=1, failures=0)) as flora:
        settings = Settings(
            flora_base_url=flora.base_url,
            flora_api_key=flora.world.options.api_key,
            tracker_database_url=database_url,
            tracker_reconcile_cron="* * * * *",
            tracker_poll_interval=0.3,
            tracker_poll_interval_max=1,
        )
        with capture_logs() as lines:
            async with open_services(settings, background=True) as services:
                worker = Worker(services, times=WorkerTimes(watch_clock_every=0.2))
                await worker.start()
                try:
                    await eventually(lambda: swept(services))
                    [run_id] = await start(services)
                    # Time enough for a busy machine to notice before the minute is full.
                    set_back(wall, seconds_to_the_minute=4.5)
                    await eventually(counted(services, 2), timeout=30)
                    await eventually(settled(services, run_id), timeout=30)
                finally:
                    await worker.stop()
    [jump] = [line for line in lines if line["event"] == "clock.jumped"]
    assert jump["seconds"] == pytest.approx((wall.offset - before).total_seconds(), abs=2)


def set_back(wall: Wall, *, seconds_to_the_minute: float) -> None:
    """Set the clock back by some six hours, to shortly before a full minute."""
    back = utc_now() - timedelta(hours=6)
    minute = back.replace(second=0, microsecond=0)
    wall.offset = minute - timedelta(seconds=seconds_to_the_minute) - utc_now()


def counted(services: Services, count: int) -> Callable[[], Any]:
    async def condition() -> bool:
        found = await sweeps.list_sweeps(services.database)
        return sum(row.finished_at is not None for row in found) >= count

    return condition


def settled(services: Services, run_id: str) -> Callable[[], Any]:
    async def condition() -> bool:
        return (await the_run(services, run_id)).run.settled

    return condition
