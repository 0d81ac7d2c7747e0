"""The simulator over HTTP: its address, its end, and how fast it answers."""

import asyncio
import socket
import statistics
from contextlib import closing

import httpx
import pytest

from tests.support.waiting import assert_takes_less, eventually
from tracker.simulator import Options, running


async def test_an_address_in_use_is_an_error() -> None:
    """A port that is taken raises the system's error at once."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            async with running(port=port):
                pass


async def test_stopping_does_not_wait_for_runs_and_callbacks() -> None:
    """A simulator with unfinished runs stops at once."""

    async def stopped() -> None:
        async with running(Options(run_seconds=1000)) as simulator:
            simulator.start(callback_url="http://127.0.0.1:1/")
        assert simulator.world.deliveries == []

    await assert_takes_less(5, stopped)


async def test_two_simulators_run_side_by_side() -> None:
    """Each has a port and a world of its own."""
    async with running() as first, running() as second:
        first.start()
        assert first.root != second.root
        assert (len(first.world.runs), len(second.world.runs)) == (1, 0)


async def test_answers_are_not_delayed() -> None:
    """No answer waits for the acknowledgement of its own head, which takes 40 ms each."""
    async with running() as simulator, httpx.AsyncClient(base_url=simulator.root) as client:
        await client.get("/simulator/requests")

        async def not_delayed() -> bool:
            took = []
            for _ in range(50):
                started = asyncio.get_running_loop().time()
                await client.get("/simulator/requests")
                took.append(asyncio.get_running_loop().time() - started)
            return statistics.median(took) < 0.03

        # A busy machine delays many of them for a while; the acknowledgement would delay each.
        await eventually(not_delayed, timeout=10)
