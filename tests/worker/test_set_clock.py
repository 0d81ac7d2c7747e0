"""A clock that is set while the machine runs, forward or back, costs at most a read: no start is
sent again early or late, no run is lost early or late, no lease lasts longer or shorter, and no
wait lasts longer.

Each test has real services, in a process that runs when the clock is set, and in one that starts
after that. None has a worker.
"""

import asyncio
from datetime import timedelta

import pytest

import tracker.store.clock
from tests.support.clocks import HandClock
from tests.support.shares import shared
from tests.support.waiting import eventually
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tests.worker.doubt import GATEWAY, LOST, attempt, change, posts, request, state_of
from tests.worker.test_clocks import Wall
from tests.worker.test_poll import start
from tests.worker.test_waits import client_of
from tracker.core.run import Tracking
from tracker.core.schedule import Policy
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running
from tracker.store import coordination
from tracker.store.errors import StoreBusy
from tracker.store.queries import starts as start_log
from tracker.workspaces import DatabaseWaits

DAY = 86_400.0
STEPS = [3600.0, -3600.0]
MORE_STEPS = [200.0, DAY, -30.0, -200.0, -DAY]
DOUBT = 180.0
LEASE = timedelta(seconds=30)

step = pytest.mark.parametrize(
    "step",
    [
        *shared(STEPS, of=2),
        *(pytest.param(step, marks=pytest.mark.thorough) for step in MORE_STEPS),
    ],
    ids=lambda step: f"{step:+.0f}s",
)
"""Longer than any lease and doubt; back, shorter and longer ones are thorough."""
fresh = pytest.mark.parametrize("fresh", [False, True], ids=["running", "fresh"])
"""Whether a process starts after the clock was set, or runs since before."""
fresh_too = pytest.mark.parametrize("fresh", shared([False, True], of=2), ids=["running", "fresh"])
"""The same; the process that starts is thorough."""


async def set_clock(clock: HandClock, flora: Simulator, seconds: float) -> None:
    """Set the tracker's clock; FLORA's goes on as it was."""
    clock.set(seconds)
    options = flora.world.options
    flora.world.change({"clock_offset": options.clock_offset - seconds})


@step
@fresh
async def test_a_start_in_doubt_is_sent_again_when_flora_is_done_with_it(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, step: float, fresh: bool
) -> None:
    """Not before, and not later, and nobody has to decide."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        await set_clock(clock, flora, step)
        if fresh:
            services = await open_on(flora)
        for seconds in (0, 2, 29, 60, 80):
            clock.move(seconds)
            await services.recovery.recover()
            assert posts(flora) == 1
        clock.move(20)
        found = await services.recovery.recover()
        assert (found, posts(flora), len(flora.world.runs)) == (1, 2, 1)
        assert await state_of(services.database) == "started"


async def test_a_machine_that_was_paused_for_a_day_sends_no_start_again(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """It counts no seconds meanwhile, as if its clock were set. FLORA's shows that it is right, and
    that FLORA may have forgotten the key."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        clock.set(DAY)
        clock.move(200)
        await services.recovery.recover()
        assert (posts(flora), await state_of(services.database)) == (1, "unresolved")


@pytest.mark.parametrize("fresh", [False, True], ids=["running", "fresh"])
async def test_starts_wait_while_leases_cannot_be_moved(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
    fresh: bool,
) -> None:
    """The database has no time for it: nobody takes a start over that is being sent, whose lease
    would seem to be over by the clock as it is set."""

    def busy(*_: object) -> None:
        raise StoreBusy("the database has no time")

    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        with monkeypatch.context() as patch:
            patch.setattr(tracker.store.clock, "_agree", busy)
            await set_clock(clock, flora, 3600.0)
            if fresh:
                services = await open_on(flora)
            clock.move(DOUBT + 20)
            assert await services.recovery.recover() == 0
            assert posts(flora) == 1
        change(flora, gateway_starts=0.0)
        await services.clock.check()
        clock.move(30)
        assert await services.recovery.recover() == 1
        assert posts(flora) == 2


@pytest.mark.parametrize("step", [200.0, pytest.param(3600.0, marks=pytest.mark.thorough)])
async def test_on_another_machine_the_doubt_begins_anew(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, step: float
) -> None:
    """It cannot compare seconds, and knows from the database when the clock was set."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        await set_clock(clock, flora, step)
        await services.clock.check()
        clock.move(10)
        elsewhere = await open_on(flora)
        elsewhere.clock.boot = "another"
        for seconds in (0, 60, 60, 49):
            clock.move(seconds)
            await elsewhere.recovery.recover()
            assert posts(flora) == 1
        clock.move(2)
        assert await elsewhere.recovery.recover() == 1
        assert posts(flora) == 2


@step
@fresh
async def test_a_start_that_made_a_run_is_not_paid_again(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, step: float, fresh: bool
) -> None:
    """FLORA lists its run, which becomes known here after the clock was set: by a clock that was
    set back, before the start was sent."""
    async with make_flora(**LOST) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        await set_clock(clock, flora, step)
        if fresh:
            services = await open_on(flora)
        [workspace] = services.workspaces
        assert (await services.sweeper.sweep(workspace)).discovered == 1
        for _ in range(12):
            clock.move(60)
            await services.recovery.recover()
        assert (posts(flora), len(flora.world.runs)) == (1, 1)
        [row] = await start_log.of_key(services.database, "key-1")
        assert row.possible_runs == {*flora.world.runs}


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(200.0, marks=pytest.mark.thorough),
        -200.0,
        pytest.param(-3600.0, marks=pytest.mark.thorough),
    ],
    ids=lambda step: f"{step:+.0f}s",
)
@step
async def test_a_clock_that_is_set_twice_is_as_good_as_one_that_never_was(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, step: float, again: float
) -> None:
    """Also where no process ran between, and where each is seen by a process that starts then."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        await set_clock(clock, flora, step)
        clock.move(90)
        await (await open_on(flora)).recovery.recover()
        await set_clock(clock, flora, again)
        services = await open_on(flora)
        clock.move(85)
        await services.recovery.recover()
        assert posts(flora) == 1
        clock.move(6)
        await services.recovery.recover()
        assert posts(flora) == 2


@step
@fresh_too
async def test_a_start_that_waits_for_its_answer_is_left_alone(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, step: float, fresh: bool
) -> None:
    """Its lease lasts, whatever the clock shows; its answer is stored."""
    options = {"slow_starts": 1.0, "slow_seconds": 3.0, "slow_run": "last", "keys_known": "at_end"}
    async with make_flora(**options) as flora:
        one, two = await open_on(flora), await open_on(flora)
        starting = asyncio.create_task(one.starter.start(request()))

        async def is_sent() -> bool:
            return await state_of(two.database) == "sent"

        await eventually(is_sent)
        await set_clock(clock, flora, step)
        if fresh:
            two = await open_on(flora)
        for _ in range(3):
            [workspace] = two.workspaces
            [row] = await start_log.open_starts(two.database)
            await two.recovery.recover_one(workspace, row)
            await two.recovery.recover()
            assert await state_of(two.database) == "sent"
            clock.move(2)
        assert (await starting).record.run.run_id in flora.world.runs
        assert (posts(flora), len(flora.world.runs)) == (1, 1)


@step
@fresh_too
async def test_a_run_is_lost_after_an_hour(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, step: float, fresh: bool
) -> None:
    """An hour in which FLORA has denied it, whatever the clock shows."""
    async with make_flora() as flora:
        services = await open_on(flora)
        [run_id] = await start(services)
        flora.start()  # another, which FLORA does not deny
        flora.world.delete([run_id])
        began = clock.seconds()

        async def poll_until(seconds: float, every: float = 20) -> Tracking:
            while clock.seconds() - began < seconds:
                clock.move(every)
                await services.poller.poll_due()
            return (await the_run(services, run_id)).tracking

        assert await poll_until(100) is Tracking.ACTIVE
        assert (await the_run(services, run_id)).missing >= 3
        await set_clock(clock, flora, step)
        if fresh:
            services = await open_on(flora)
        await services.clock.check()
        assert await poll_until(3500, every=60) is Tracking.ACTIVE
        assert (await the_run(services, run_id)).missing >= 5
        assert await poll_until(4000, every=60) is Tracking.LOST


@step
@fresh_too
async def test_a_wait_that_flora_asks_for_lasts_no_longer(
    flora: Simulator, open_on: OpenServices, clock: HandClock, step: float, fresh: bool
) -> None:
    """For all processes, and each process stores the next as it did before. It is over where the
    clock was set forward."""
    one, two = await open_on(flora), await open_on(flora)
    await waits_of(one).share(30)
    clock.move(10)
    await set_clock(clock, flora, step)
    if fresh:
        two = await open_on(flora)
    await two.clock.check()
    assert await waits_of(two).left() == pytest.approx(20 if step < 0 else 0, abs=0.01)
    await one.clock.check()
    await waits_of(one).share(40)
    assert await waits_of(two).left() == pytest.approx(40, abs=0.01)
    clock.move(40)
    assert await waits_of(two).left() == 0


def waits_of(services: Services) -> DatabaseWaits:
    shared = client_of(services).request_limit.shared
    assert isinstance(shared, DatabaseWaits)
    return shared


async def test_a_wait_of_another_clock_is_replaced(
    flora: Simulator, open_on: OpenServices, clock: HandClock
) -> None:
    """One of before the machine was started, by a clock that was an hour ahead."""
    services = await open_on(flora)
    await waits_of(services).share(30)
    clock.move(-3600)  # as for a process to which nothing tells that it was set
    await waits_of(services).share(30)
    assert await waits_of(services).left() == 30


@step
@fresh
async def test_no_lease_is_lost_and_none_is_held(
    flora: Simulator, open_on: OpenServices, clock: HandClock, step: float, fresh: bool
) -> None:
    """Of a name, and of a due run, by a process that lives or has died."""
    one, two = await open_on(flora), await open_on(flora)
    [run_id] = await start(one)
    clock.move(6)

    async def claim(services: Services, holder: str) -> list[str]:
        found = await coordination.claim_due(
            services.database, holder=holder, now=services.clock(), lease=LEASE, limit=1
        )
        return [record.run.run_id for record in found]

    async def take(services: Services, holder: str) -> bool:
        now = services.clock()
        return await coordination.take_lease(services.database, "sweep:default", holder, now, LEASE)

    assert await claim(one, "one") == [run_id]
    assert await take(one, "one")
    await set_clock(clock, flora, step)
    if fresh:
        two = await open_on(flora)
    await two.clock.check()
    clock.move(29)
    assert not await claim(two, "two")
    assert not await take(two, "two")
    clock.move(2)
    assert await claim(two, "two") == [run_id]
    assert await take(two, "two")


@step
async def test_no_poll_is_put_off(
    flora: Simulator, open_on: OpenServices, clock: HandClock, step: float
) -> None:
    """A run is read when it would have been, or at once where the clock was set forward."""
    services = await open_on(flora)
    await start(services)
    await set_clock(clock, flora, step)
    await services.clock.check()
    if step < 0:
        clock.move(4.9)
        assert (await services.poller.poll_due()).claimed == 0
        clock.move(0.2)
    assert (await services.poller.poll_due()).claimed == 1
    assert Policy().interval == timedelta(seconds=5)


@pytest.mark.parametrize("seconds", [pytest.param(200, marks=pytest.mark.thorough), 3600, -3600])
async def test_a_process_without_a_worker_notices_that_the_machines_clock_is_set(
    sqlite_url: str, seconds: int
) -> None:
    """As `batch`, `runs start --wait`, `poll`, `serve --no-worker` and `Tracker(worker=False)` are:
    they recover starts themselves. So does one that starts within seconds of that."""
    wall = Wall()
    options = Options(failures=0.0, **GATEWAY)  # type: ignore[arg-type]
    async with running(options) as flora:
        settings = Settings(
            flora_base_url=flora.base_url,
            flora_api_key=options.api_key,
            flora_webhook_secret=options.webhook_secret,
            tracker_database_url=sqlite_url,
        )
        async with open_services(settings, wall=wall) as services:
            assert await attempt(services) is None
            wall.offset = timedelta(seconds=seconds)
            async with open_services(settings, wall=wall) as later:
                for _ in range(3):
                    for one in (later, services):
                        await one.recovery.recover()
                        [row] = await start_log.of_key(one.database, "key-1")
                        await one.recovery.recover_one(next(iter(one.workspaces)), row)
                    await asyncio.sleep(0.3)
            assert posts(flora) == 1
            assert await state_of(services.database) == "in_doubt"
            assert abs(services.clock() - wall()) < timedelta(seconds=1)
