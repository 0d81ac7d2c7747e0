"""The request budget: how many at a time, how often, and who waits."""

import asyncio
from itertools import pairwise

import pytest

from tests.flora.far_end import VirtualTime, settle
from tracker.core.errors import RateLimited
from tracker.flora.request_limit import FASTEST, GROWTH, SLOWEST, Budget


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


async def test_what_is_fresh_has_every_other_turn() -> None:
    """However many wait for something else, every other request is about a run that has just
    ended; and however many of those there are, the others go on too."""
    budget = budget_in(VirtualTime(), concurrency=1)
    going: list[str] = []

    async def call(name: str, fresh: bool) -> None:
        async with budget.slot(fresh=fresh):
            going.append(name)
            await settle()

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(call(f"other {number}", False))
        await settle()
        for number in range(3):
            group.create_task(call(f"fresh {number}", True))
    fresh = [place for place, name in enumerate(going) if name.startswith("fresh")]
    assert [later - earlier for earlier, later in pairwise(fresh)] == [2, 2]
    assert [name for name in going if name.startswith("other")] == [f"other {n}" for n in range(6)]


class Board:
    """What processes tell each other, in memory and in virtual time."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self._until = 0.0

    async def left(self) -> float:
        return max(0.0, self._until - self._time.elapsed)

    async def tell(self, seconds: float) -> None:
        self._until = max(self._until, self._time.elapsed + seconds)


async def test_a_wait_holds_in_other_processes() -> None:
    """What one process was told to wait another waits too, also where it has begun to wait for
    less; one that cannot wait so long hears at once."""
    time = VirtualTime()
    board = Board(time)
    one, other = (
        Budget(2, monotonic=time.monotonic, sleep=time.sleep, shared=board) for _ in range(2)
    )
    starts: list[float] = []
    other.pause(5)
    waiting = asyncio.ensure_future(request(other, starts))
    await settle()
    one.pause(30)
    await one.tell_others(30)
    await time.run(waiting)
    assert starts == [30.0]
    await one.tell_others(20)
    with pytest.raises(RateLimited):
        async with other.slot(until=time.elapsed + 10):
            pass


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
