"""The request limit: how many requests run at a time, how often one starts, and which waits."""

import asyncio
from itertools import pairwise

import pytest

from tests.flora.far_end import VirtualTime, settle
from tracker.core.errors import RateLimited
from tracker.flora.resilience import FASTEST, GROWTH, SLOWEST, RequestLimit


def limit_in(time: VirtualTime, concurrency: int = 2) -> RequestLimit:
    return RequestLimit(concurrency, monotonic=time.monotonic, sleep=time.sleep)


async def request(request_limit: RequestLimit, starts: list[float]) -> None:
    async with request_limit.permit() as started:
        starts.append(started)


async def limit(request_limit: RequestLimit) -> None:
    """One request, refused as one too many."""
    async with request_limit.permit() as started:
        request_limit.limited(started)


async def test_never_more_at_a_time() -> None:
    """No more requests are under way than the concurrency, and everybody gets a turn, in order."""
    request_limit = limit_in(VirtualTime(), concurrency=2)
    going: list[int] = []
    ends = [asyncio.Event() for _ in range(5)]

    async def call(number: int) -> None:
        async with request_limit.permit():
            going.append(number)
            await ends[number].wait()

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(call(number))
        await settle()
        assert going == [0, 1]
        assert (request_limit.state().in_flight, request_limit.state().waiting) == (2, 3)
        ends[1].set()
        await settle()
        assert going == [0, 1, 2]
        for end in ends:
            end.set()
    assert going == [0, 1, 2, 3, 4]
    assert (request_limit.state().in_flight, request_limit.state().waiting) == (0, 0)


async def test_what_is_fresh_has_every_other_turn() -> None:
    """However many wait for something else, every other request is about a run that has just
    ended; and however many of those there are, the others go on too."""
    request_limit = limit_in(VirtualTime(), concurrency=1)
    going: list[str] = []

    async def call(name: str, fresh: bool) -> None:
        async with request_limit.permit(fresh=fresh):
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


@pytest.mark.parametrize("leaving", [1, 3])
async def test_a_permit_returned_while_waiting_requests_are_cancelled_is_not_lost(
    leaving: int,
) -> None:
    """As at a shutdown: the next that still waits gets it, and others after that."""
    request_limit = RequestLimit(1)
    done = asyncio.Event()

    async def hold() -> None:
        async with request_limit.permit():
            await done.wait()

    first = asyncio.create_task(hold())
    await settle()
    cancelled = [asyncio.create_task(hold()) for _ in range(leaving)]
    waiting = [asyncio.create_task(hold()) for _ in range(2)]
    await settle()
    for each in cancelled:
        each.cancel()
    done.set()
    async with asyncio.timeout(30):
        await asyncio.gather(first, *waiting)
        answers = await asyncio.gather(*cancelled, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in answers)
        async with request_limit.permit(fresh=True):
            pass


async def test_a_permit_given_to_a_request_that_is_cancelled_is_passed_on() -> None:
    """Cancelled at the moment at which it gets the permit, it does not keep it."""
    request_limit = RequestLimit(1)
    ends = asyncio.Event()

    async def hold(*, fresh: bool, until: asyncio.Event) -> None:
        async with request_limit.permit(fresh=fresh):
            await until.wait()

    first = asyncio.create_task(hold(fresh=False, until=ends))
    await settle()
    leaves = asyncio.create_task(hold(fresh=True, until=asyncio.Event()))
    stays = asyncio.create_task(hold(fresh=False, until=ends))
    await settle()
    ends.set()
    await asyncio.wait([first])
    leaves.cancel()
    async with asyncio.timeout(30):
        await stays


class Board:
    """What processes tell each other, in memory and in virtual time."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self._until = 0.0

    async def left(self) -> float:
        return max(0.0, self._until - self._time.elapsed)

    async def share(self, seconds: float) -> None:
        self._until = max(self._until, self._time.elapsed + seconds)


async def test_a_wait_holds_in_other_processes() -> None:
    """What one process was told to wait another waits too, also where it has begun to wait for
    less; one that cannot wait so long hears at once."""
    time = VirtualTime()
    board = Board(time)
    one, other = (
        RequestLimit(2, monotonic=time.monotonic, sleep=time.sleep, shared=board) for _ in range(2)
    )
    starts: list[float] = []
    other.pause(5)
    waiting = asyncio.ensure_future(request(other, starts))
    await settle()
    one.pause(30)
    await one.shared.share(30)
    await time.run(waiting)
    assert starts == [30.0]
    await one.shared.share(20)
    with pytest.raises(RateLimited):
        async with other.permit(until=time.elapsed + 10):
            pass


async def test_without_a_limit_nothing_waits() -> None:
    """Until FLORA refuses one as too many, requests are not spaced."""
    time = VirtualTime()
    request_limit = limit_in(time)
    starts: list[float] = []
    for _ in range(100):
        await time.run(request(request_limit, starts))
    assert starts == [0.0] * 100
    assert request_limit.state().rate is None


async def test_a_limit_halves_the_rate_and_answers_raise_it() -> None:
    """A refusal halves the rate at which it was met; each answer adds the same little to it."""
    time = VirtualTime()
    request_limit = limit_in(time)
    for _ in range(39):
        await time.run(request(request_limit, []))
    await time.run(limit(request_limit))  # forty starts within ten seconds: four a second
    assert request_limit.state().rate == pytest.approx(2.0)
    request_limit.answered()
    request_limit.answered()
    assert request_limit.state().rate == pytest.approx(2.0 + 2 * GROWTH)
    starts: list[float] = []
    for _ in range(3):
        await time.run(request(request_limit, starts))
    assert starts[2] - starts[1] == pytest.approx(1 / (2.0 + 2 * GROWTH))


async def test_the_rate_has_a_floor_and_a_ceiling() -> None:
    """Halving stops at one request in five seconds, and much growth forgets the limit."""
    time = VirtualTime()
    request_limit = limit_in(time)
    for _ in range(20):
        await time.run(limit(request_limit))
    assert request_limit.state().rate == SLOWEST
    assert request_limit.state().limited == 20
    for _ in range(int(FASTEST / GROWTH) + 1):
        request_limit.answered()
    assert request_limit.state().rate is None


async def test_requests_refused_together_are_one_verdict() -> None:
    """Two requests that were under way at the same time halve the rate once."""
    time = VirtualTime()
    request_limit = limit_in(time)
    for _ in range(38):
        await time.run(request(request_limit, []))
    time.elapsed = 1.0
    async with request_limit.permit() as first, request_limit.permit() as second:
        time.elapsed = 2.0
        request_limit.limited(first)
        request_limit.limited(second)
    assert request_limit.state().rate == pytest.approx(2.0)
    assert request_limit.state().limited == 2


async def test_a_pause_holds_for_everybody_and_nobody_spins() -> None:
    """While FLORA wants to be left alone one caller watches the clock, once, and the rest wait."""
    time = VirtualTime()
    request_limit = limit_in(time, concurrency=4)
    request_limit.pause(30)
    starts: list[float] = []
    await time.run(
        asyncio.wait([asyncio.ensure_future(request(request_limit, starts)) for _ in range(9)])
    )
    assert starts == [30.0] * 9
    assert time.slept == [30.0]


async def test_a_pause_that_grows_while_it_is_waited_for() -> None:
    """A longer pause prolongs waits that have begun; a shorter one shortens none."""
    time = VirtualTime()
    request_limit = limit_in(time)
    request_limit.pause(10)
    starts: list[float] = []
    waiting = asyncio.ensure_future(request(request_limit, starts))
    await settle()
    request_limit.pause(25)
    request_limit.pause(1)
    await time.run(waiting)
    assert starts == [25.0]
    assert request_limit.state().paused == 0


async def test_nobody_waits_in_vain() -> None:
    """Where the wait is known to be too long the caller hears at once, and how long it would be."""
    time = VirtualTime()
    request_limit = limit_in(time)
    request_limit.pause(30)
    with pytest.raises(RateLimited) as caught:
        async with request_limit.permit(until=29):
            pass
    assert caught.value.retry_after == 30
    assert time.slept == []
    assert request_limit.state().waiting == 0


async def test_cancelled_callers_leave_nothing_behind() -> None:
    """Callers that give up, at the clock or behind it, free their places for the others."""
    time = VirtualTime()
    request_limit = limit_in(time, concurrency=2)
    request_limit.pause(10)
    starts: list[float] = []
    tasks = [asyncio.ensure_future(request(request_limit, starts)) for _ in range(5)]
    await settle()
    for task in tasks[:4]:
        task.cancel()
        await settle()
    await time.run(asyncio.wait(tasks))
    assert starts == [10.0]
    assert (request_limit.state().in_flight, request_limit.state().waiting) == (0, 0)
