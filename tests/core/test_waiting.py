"""Parts that close one after the other share one time limit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.logs import capture_logs
from tests.support.waiting import let_pass
from tracker.core.errors import StoreUnavailable
from tracker.core.waiting import ClosingStack


async def test_parts_close_in_order_within_one_limit() -> None:
    """The last that was opened closes first. A part that takes too long is cancelled, and a later
    one that waits too; one that has nothing to wait for is done as ever. Nothing is raised."""
    closed = []

    @asynccontextmanager
    async def part(name: str, seconds: float) -> AsyncIterator[str]:
        yield name
        closed.append(name)
        if name == "long":
            let_pass(30)
        if seconds:
            await asyncio.sleep(seconds)
        closed.append(f"{name} is done")

    async def fail() -> None:
        raise StoreUnavailable("no answer")

    began = asyncio.get_running_loop().time()
    with capture_logs() as lines:
        async with ClosingStack(30) as stack:
            stack.on_close("gone", fail)
            for name, seconds in (("first", 60), ("quick", 0), ("long", 60), ("last", 0.001)):
                assert await stack.open(name, part(name, seconds)) == name
    assert asyncio.get_running_loop().time() - began < 30 + 30  # those that passed at once
    assert closed == ["last", "last is done", "long", "quick", "quick is done", "first"]
    assert {line["event"] for line in lines} == {"close.unfinished"}
    assert {line["part"]: line["error"] for line in lines} == {
        "long": "no time was left",
        "first": "no time was left",
        "gone": "no answer",
    }


async def test_a_command_closes_quietly() -> None:
    """It reports a database that is gone by itself."""

    async def fail() -> None:
        raise StoreUnavailable("no answer")

    with capture_logs() as lines:
        async with ClosingStack(30, quiet=True) as stack:
            stack.on_close("gone", fail)
    assert lines == []


async def test_what_ends_the_block_is_raised() -> None:
    """An error of the block is raised after its parts have closed, and so is a cancellation."""
    closed = []

    async def opened(ended: asyncio.Event) -> None:
        async with ClosingStack(60) as stack:
            stack.on_close("part", lambda: asyncio.sleep(0, closed.append("part")))
            ended.set()
            await asyncio.sleep(60)

    ended = asyncio.Event()
    task = asyncio.create_task(opened(ended))
    await ended.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert closed == ["part"]
