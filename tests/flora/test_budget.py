"""The request budget: how many at a time, how often, and who waits."""

import asyncio

import pytest

from tests.flora.far_end import VirtualTime, settle
from tracker.core.errors import RateLimited
from tracker.flora.budget import FASTEST, GROWTH, SLOWEST, Budget


def budget_in(time: VirtualTime, concurrency: int = 2) -> Budget:
    return Budget(concurrency, monotonic=time.monotonic, sleep=time.sleep)


async def request(budget: Budget, starts: list[float]) -> None:
    async with budget.slot() as started:
        starts.append(started)


async def limit(budget: Budget) -> None:
    """One request, refused as one too many."""
    async with budget.slot() as started:
        budget.limited(started)


async def test_never_more_at_a_time() -> None:
    """No more requests are under way than the concurrency, and everybody gets a turn, in order."""
    budget = budget_in(VirtualTime(), concurrency=2)
    going: list[int] = []
    ends = [asyncio.Event() for _ in range(5)]

    async def call(number: int) -> None:
        async with budget.slot():
            going.append(number)
            await ends[number].wait()

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(call(number))
        await settle()
        assert going == [0, 1]
        assert (budget.state().in_flight, budget.state().waiting) == (2, 3)
        ends[1].set()
        await settle()
        assert going == [0, 1, 2]
        for end in ends:
            end.set()
    assert going == [0, 1, 2, 3, 4]
    assert (budget.state().in_flight, budget.state().waiting) == (0, 0)


async def test_without_a_limit_nothing_waits() -> None:
    """Until FLORA refuses one as too many, requests are not spaced."""
    time = VirtualTime()
    budget = budget_in(time)
    starts: list[float] = []
    for _ in range(100):
        await time.run(request(budget, starts))
    assert starts == [0.0] * 100
    assert budget.state().rate is None


async def test_a_limit_halves_the_rate_and_answers_raise_it() -> None:
    """A refusal halves the rate at which it was met; each answer adds the same little to it."""
    time = VirtualTime()
    budget = budget_in(time)
    for _ in range(39):
        await time.run(request(budget, []))
    await time.run(limit(budget))  # forty starts within ten seconds: four a second
    assert budget.state().rate == pytest.approx(2.0)
    budget.answered()
    budget.answered()
    assert budget.state().rate == pytest.approx(2.0 + 2 * GROWTH)
    starts: list[float] = []
    for _ in range(3):
        await time.run(request(budget, starts))
    assert starts[2] - starts[1] == pytest.approx(1 / (2.0 + 2 * GROWTH))


async def test_the_rate_has_a_floor_and_a_ceiling() -> None:
    """Halving stops at one request in five seconds, and much growth forgets the limit."""
    time = VirtualTime()
    budget = budget_in(time)
    for _ in range(20):
        await time.run(limit(budget))
    assert budget.state().rate == SLOWEST
    assert budget.state().limited == 20
    for _ in range(int(FASTEST / GROWTH) + 1):
        budget.answered()
    assert budget.state().rate is None


async def test_requests_refused_together_are_one_verdict() -> None:
    """Two requests that were under way at the same time halve the rate once."""
    time = VirtualTime()
    budget = budget_in(time)
    for _ in range(38):
        await time.run(request(budget, []))
    time.elapsed = 1.0
    async with budget.slot() as first, budget.slot() as second:
        time.elapsed = 2.0
        budget.limited(first)
        budget.limited(second)
    assert budget.state().rate == pytest.approx(2.0)
    assert budget.state().limited == 2


async def test_a_pause_holds_for_everybody_and_nobody_spins() -> None:
    """While FLORA wants to be left alone one caller watches the clock, once, and the rest wait."""
    time = VirtualTime()
    budget = budget_in(time, concurrency=4)
    budget.pause(30)
    starts: list[float] = []
    await time.run(asyncio.wait([asyncio.ensure_future(request(budget, starts)) for _ in range(9)]))
    assert starts == [30.0] * 9
    assert time.slept == [30.0]


async def test_a_pause_that_grows_while_it_is_waited_for() -> None:
    """Whoever waits already waits for the longer pause, too; a shorter one takes nothing back."""
    time = VirtualTime()
    budget = budget_in(time)
    budget.pause(10)
    starts: list[float] = []
    waiting = asyncio.ensure_future(request(budget, starts))
    await settle()
    budget.pause(25)
    budget.pause(1)
    await time.run(waiting)
    assert starts == [25.0]
    assert budget.state().paused == 0


async def test_nobody_waits_in_vain() -> None:
    """Where the wait is known to be too long the caller hears at once, and how long it would be."""
    time = VirtualTime()
    budget = budget_in(time)
    budget.pause(30)
    with pytest.raises(RateLimited) as caught:
        async with budget.slot(until=29):
            pass
    assert caught.value.retry_after == 30
    assert time.slept == []
    assert budget.state().waiting == 0


async def test_cancelled_callers_leave_nothing_behind() -> None:
    """Callers that give up, at the clock or behind it, free their places for the others."""
    time = VirtualTime()
    budget = budget_in(time, concurrency=2)
    budget.pause(10)
    starts: list[float] = []
    tasks = [asyncio.ensure_future(request(budget, starts)) for _ in range(5)]
    await settle()
    for task in tasks[:4]:
        task.cancel()
        await settle()
    await time.run(asyncio.wait(tasks))
    assert starts == [10.0]
    assert (budget.state().in_flight, budget.state().waiting) == (0, 0)
