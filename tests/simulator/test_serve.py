"""The simulator as a process of its own."""

import asyncio
import json
import signal
import socket
import sys
from contextlib import closing

import httpx
import pytest

from tracker.simulator import Options, running

PROGRAM = """
import json
from tracker.simulator import Options, serve
def say(simulator):
    print(json.dumps(simulator.environment), flush=True)
serve(Options(seed=3), port=0, on_ready=say)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_serves_until_it_is_told_to_stop(number: int) -> None:
    """It says where it is, answers there, and ends with status 0 on either signal."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            environment = json.loads(await process.stdout.readline())
        headers = {"Authorization": f"Bearer {environment['FLORA_API_KEY']}"}
        async with httpx.AsyncClient(headers=headers) as client:
            answer = await client.get(f"{environment['FLORA_BASE_URL']}/techniques")
        assert answer.status_code == 200
        assert "date" in answer.headers
        process.send_signal(number)
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_an_address_in_use_is_an_error() -> None:
    """A port that is taken raises the system's error at once."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            async with running(port=port):
                pass


async def test_stopping_does_not_wait_for_runs_and_callbacks() -> None:
    """A simulator with unfinished runs stops at once."""
    async with asyncio.timeout(5), running(Options(run_seconds=1000)) as simulator:
        simulator.start(callback_url="http://127.0.0.1:1/")
    assert simulator.world.deliveries == []


async def test_two_simulators_stand_side_by_side() -> None:
    """Each has a port and a world of its own."""
    async with running() as first, running() as second:
        first.start()
        assert first.root != second.root
        assert (len(first.world.runs), len(second.world.runs)) == (1, 0)


async def test_answers_leave_at_once() -> None:
    """No answer waits for the acknowledgement of its own head, which takes 40 ms each."""
    async with running() as simulator, httpx.AsyncClient(base_url=simulator.root) as client:
        await client.get("/simulator/requests")
        started = asyncio.get_running_loop().time()
        for _ in range(50):
            await client.get("/simulator/requests")
        assert asyncio.get_running_loop().time() - started < 1.5
