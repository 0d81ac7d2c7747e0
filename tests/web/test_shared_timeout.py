"""What takes too long ends, what does not is let be, and nobody else's cancellation is taken for
ours."""

import asyncio

import pytest

from tracker.web.callbacks import SharedTimeout

SECONDS = 0.05
LONG = 30.0


async def wait(timeout: SharedTimeout, seconds: float) -> str:
    """Wait so long within the timeout; how that ended."""
    try:
        with timeout.start(asyncio.get_running_loop().time()):
            await asyncio.sleep(seconds)
    except TimeoutError:
        return "late"
    return "in time"


async def test_what_takes_too_long_ends_and_the_rest_goes_on() -> None:
    """Each has its own time, whenever it began, though one timer serves all."""
    timeout = SharedTimeout(SECONDS)
    began = asyncio.get_running_loop().time()
    first = [asyncio.create_task(wait(timeout, seconds)) for seconds in (LONG, 0, 0.01, LONG)]
    await asyncio.sleep(SECONDS / 2)
    second = [asyncio.create_task(wait(timeout, seconds)) for seconds in (0, LONG)]
    ended = await asyncio.gather(*first, *second)
    assert ended == ["late", "in time", "in time", "late", "in time", "late"]
    assert asyncio.get_running_loop().time() - began < LONG
    assert await wait(timeout, 0) == "in time"
    assert await wait(timeout, LONG) == "late"


@pytest.mark.parametrize("when", ["before", "together"])
async def test_a_cancellation_from_elsewhere_stays_one(when: str) -> None:
    """Before it expires, and at that very moment."""
    timeout = SharedTimeout(SECONDS)
    task = asyncio.create_task(wait(timeout, LONG))
    await asyncio.sleep(0)
    (block,) = timeout._running
    at = block.expires if when == "together" else block.expires - SECONDS / 2
    asyncio.get_running_loop().call_at(at, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_was_in_time_holds_no_memory() -> None:
    """However many there were, only what has not ended is watched."""
    timeout = SharedTimeout(LONG)
    for _ in range(1000):
        assert await wait(timeout, 0) == "in time"
    assert len(timeout._running) <= 1
