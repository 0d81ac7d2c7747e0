"""What takes too long ends, what does not is let be, and nobody else's cancellation is taken for
ours."""

import asyncio

import pytest

from tracker.web.http.limits import Bounds

SECONDS = 0.05
LONG = 30.0


async def wait(bounds: Bounds, seconds: float) -> str:
    """Wait so long within a bound; how that ended."""
    try:
        with bounds.begin(asyncio.get_running_loop().time()):
            await asyncio.sleep(seconds)
    except TimeoutError:
        return "late"
    return "in time"


async def test_what_takes_too_long_ends_and_the_rest_goes_on() -> None:
    """Each has its own time, whenever it began, though one timer serves all."""
    bounds = Bounds(SECONDS)
    began = asyncio.get_running_loop().time()
    first = [asyncio.create_task(wait(bounds, seconds)) for seconds in (LONG, 0, 0.01, LONG)]
    await asyncio.sleep(SECONDS / 2)
    second = [asyncio.create_task(wait(bounds, seconds)) for seconds in (0, LONG)]
    ended = await asyncio.gather(*first, *second)
    assert ended == ["late", "in time", "in time", "late", "in time", "late"]
    assert asyncio.get_running_loop().time() - began < LONG
    assert await wait(bounds, 0) == "in time"
    assert await wait(bounds, LONG) == "late"


@pytest.mark.parametrize("when", ["before", "together"])
async def test_a_cancellation_from_elsewhere_stays_one(when: str) -> None:
    """Before the bound's time, and at that very moment."""
    bounds = Bounds(SECONDS)
    task = asyncio.create_task(wait(bounds, LONG))
    await asyncio.sleep(0)
    (bound,) = bounds._running
    at = bound.at if when == "together" else bound.at - SECONDS / 2
    asyncio.get_running_loop().call_at(at, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_was_in_time_holds_no_memory() -> None:
    """However many there were, only what has not ended is watched."""
    bounds = Bounds(LONG)
    for _ in range(1000):
        assert await wait(bounds, 0) == "in time"
    assert len(bounds._running) <= 1
