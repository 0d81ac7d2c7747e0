"""Following runs in the database: whoever brings the news, and who polls where nobody does."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.clocks import HandClock
from tests.support.waiting import eventually
from tests.worker.conftest import MakeFlora, OpenServices, reads_of, the_run
from tracker.core.errors import StoreUnavailable
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import RunStatus, Tracking
from tracker.polling import follow
from tracker.polling.follow import OwnPolling, RunUpdate
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.store import coordination


async def collect(source: AsyncIterator[list[RunUpdate]], into: list[RunUpdate]) -> None:
    async for sights in source:
        into.extend(sights)


async def see(services: Services, run_id: str, status: RunStatus, progress: float = 0) -> None:
    observation = Observation(
        run_id=run_id,
        source=Source.POLL,
        at=services.clock(),
        status=status,
        progress=progress,
    )
    await services.writer.submit(Observed(observation=observation))


@pytest.fixture
async def two(open_on: OpenServices, flora: Simulator) -> tuple[Services, Services]:
    """Two processes' worth of services on one database."""
    return await open_on(flora), await open_on(flora)


async def test_what_another_process_brings_is_seen(two: tuple[Services, Services]) -> None:
    """Each change once, with who brought it, until all have ended."""
    one, other = two
    await see(one, "run_1", RunStatus.PENDING)
    await see(one, "run_2", RunStatus.COMPLETED)
    seen: list[RunUpdate] = []
    async with one.signals:
        following = one.follower.follow(["run_1", "run_2", "run_nobody_knows"])
        task = asyncio.create_task(collect(following, seen))
        await eventually(lambda: len(seen) == 2)
        await see(other, "run_1", RunStatus.RUNNING, 40)
        await eventually(lambda: len(seen) == 3)
        await see(other, "run_1", RunStatus.RUNNING, 40)
        await see(other, "run_1", RunStatus.COMPLETED, 100)
        async with asyncio.timeout(10):
            await task
    shown = [(sight.record.run.run_id, sight.record.run.status) for sight in seen]
    assert sorted(shown[:2]) == [("run_1", "pending"), ("run_2", "completed")]
    assert shown[2:] == [("run_1", "running"), ("run_1", "completed")]
    assert {sight.source for sight in seen} == {Source.POLL}


async def test_callers_share_their_reads(services: Services) -> None:
    """A hundred callers that each follow a run read the database hardly more often than one."""
    run_ids = [f"run_{number}" for number in range(100)]
    await asyncio.gather(*[see(services, one, RunStatus.RUNNING) for one in run_ids])
    read: list[int] = []

    @sa.event.listens_for(services.database.engine.sync_engine, "before_cursor_execute")
    def count(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "runs.run_id IN" in statement or "runs.run_id = ANY" in statement:
            (ids,) = parameters
            read.append(len(json.loads(ids) if isinstance(ids, str) else ids))

    followed = [
        asyncio.create_task(collect(services.follower.follow([one]), [])) for one in run_ids
    ]
    await eventually(lambda: sum(read) >= 4 * len(run_ids))
    assert len(read) < len(run_ids) / 2
    followed[0].cancel()  # only itself
    await asyncio.gather(*[see(services, one, RunStatus.COMPLETED) for one in run_ids])
    async with asyncio.timeout(10):
        await asyncio.gather(*followed[1:])


async def test_nobody_is_asked_while_somebody_else_polls(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run that is due, but not for long, is left to the worker; FLORA is not asked from here."""
    run = flora.start()
    await services.tracker.track(run.run_id)
    clock.move(follow.OVERDUE.total_seconds() - 0.5)
    seen: list[RunUpdate] = []
    task = asyncio.create_task(collect(services.follower.follow([run.run_id]), seen))
    await eventually(lambda: seen)
    assert reads_of(flora) == {}
    clock.move(60)
    async with asyncio.timeout(10):
        await task
    assert seen[-1].record.tracking is Tracking.SETTLED
    assert sum(reads_of(flora).values()) >= 1


async def test_a_run_that_a_worker_has_claimed_is_left_to_it(
    two: tuple[Services, Services], flora: Simulator, clock: HandClock
) -> None:
    """An overdue run that somebody is reading is not read from here too."""
    one, other = two
    run = flora.start()
    await one.tracker.track(run.run_id)
    clock.move(60)
    [claimed] = await coordination.claim_due(
        other.database,
        holder="worker",
        now=clock(),
        lease=timedelta(seconds=30),
        limit=1,
        workspaces=None,
    )
    seen: list[RunUpdate] = []
    task = asyncio.create_task(collect(one.follower.follow([run.run_id]), seen))
    await eventually(lambda: seen)
    assert claimed.run.run_id == run.run_id
    assert reads_of(flora) == {}
    clock.move(31)
    async with asyncio.timeout(10):
        await task
    assert seen[-1].record.tracking is Tracking.SETTLED


async def test_a_run_that_has_not_ended_is_polled_again_soon(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """As soon as it is due and a round may begin, although no change was notified."""
    services = await open_on(flora, tracker_poll_interval=0.2)
    services.follower.check_every = services.follower.check_anyway = 3600.0
    run = flora.start()
    await services.tracker.track(run.run_id)
    clock.move(follow.OVERDUE.total_seconds() + 1)
    task = asyncio.create_task(collect(services.follower.follow([run.run_id]), []))

    async def is_polled() -> bool:
        return (await the_run(services, run.run_id)).checks == 1

    await eventually(is_polled)
    assert sum(reads_of(flora).values()) == 1
    clock.move(60)
    async with asyncio.timeout(30):
        await task
    assert sum(reads_of(flora).values()) > 1


async def test_what_keeps_runs_from_being_read_is_told_once(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A refused key, and a missing one: the person who waits hears of it."""
    async with make_flora() as flora:
        for settings, said in (
            ({"flora_api_key": "sk_test_wrong"}, "runs cannot be read: FLORA answered 401"),
            ({"flora_api_key": None}, "no FLORA API key for its workspace is set here"),
        ):
            services = await open_on(flora, **settings)
            run_id = f"run_of_{len(settings)}_{said[:4].strip()}"
            await services.tracker.track(run_id)
            clock.move(10)
            told: list[str] = []
            following = services.follower.follow([run_id], notify=told.append)
            task = asyncio.create_task(collect(following, []))
            await eventually(lambda: told)  # noqa: B023
            assert said in told[0]
            task.cancel()
            await asyncio.wait([task])
            assert len(told) == 1


async def test_a_database_that_is_away_for_a_moment_ends_nothing() -> None:
    """It is tried again, and told once each time; away for long, it is an error."""
    left = 3

    async def work() -> str:
        nonlocal left
        left -= 1
        if left:
            raise StoreUnavailable("the database does not answer")
        return "there"

    told: list[str] = []
    assert await follow.until_available(work, told.append, pause=0.01) == "there"
    assert told == ["the database does not answer; still trying"] * 2
    left = -1
    with pytest.raises(StoreUnavailable):
        await follow.until_available(work, None, pause=0.01, give_up_after=0.05)


async def test_breaking_off_gives_claims_back(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Who stops following while polling from here leaves no claim behind."""
    run = flora.start()
    await services.tracker.track(run.run_id)
    clock.move(10)
    asked = asyncio.Event()
    never = asyncio.Event()

    async def stuck(*_: object, **__: object) -> None:
        asked.set()
        await never.wait()

    [workspace] = services.workspaces
    client = workspace.require_client()
    client.get_run = client.history = client.get_any_run = stuck  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(collect(services.follower.follow([run.run_id]), []))
    async with asyncio.timeout(10):
        await asked.wait()
    assert (await the_run(services, run.run_id)).lease_holder is not None
    task.cancel()
    await asyncio.wait([task])
    assert (await the_run(services, run.run_id)).lease_holder is None


async def test_what_no_process_polls_is_polled_by_who_waits(clock: HandClock) -> None:
    """Something is left to others until it is overdue; from then on it is polled when it is due,
    one round at a time. An outage ends nothing, a bug does."""
    rounds, error = 0, None

    async def poll() -> None:
        nonlocal rounds
        rounds += 1
        if error is not None:
            raise error

    due, second = clock(), timedelta(seconds=1)
    async with OwnPolling(poll=poll, clock=clock, poll_every=0.0) as polling:
        clock.move(follow.OVERDUE.total_seconds())
        assert polling.check(None) is polling.check(due) is None
        assert not polling.has_begun
        clock.move(1)
        begun = polling.check(due)
        assert begun is not None
        assert polling.check(due) is None
        await begun
        assert polling.check(clock() + second) is None
        error = StoreUnavailable("down")
        begun = polling.check(clock() - second)
        assert begun is not None
        await begun
        error = ValueError("a bug")
        begun = polling.check(clock() - second)
        assert begun is not None
        await asyncio.wait([begun])
        assert rounds == 3
        with pytest.raises(ValueError, match="a bug"):
            polling.check(None)
