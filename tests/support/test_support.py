"""The ground that the other tests stand on holds."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import asyncpg
import pytest

from tests.support import network_guard
from tests.support.databases import PostgresDatabases
from tests.support.postgres import PostgresServer
from tests.support.waiting import close_server, eventually, let_pass, steady_clock


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "flora.invalid"])
async def test_the_network_guard_refuses_other_machines(host: str) -> None:
    """A connection to another machine, or the look-up of its name, fails and is remembered."""
    with pytest.raises(network_guard.OutsideTrafficError, match=host):
        await asyncio.open_connection(host, 443)
    assert network_guard.refused
    network_guard.refused.clear()


async def test_the_network_guard_lets_loopback_through() -> None:
    """A server on 127.0.0.1 is reached by address and by name."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            reader, writer = await asyncio.open_connection(host, port, family=socket.AF_INET)
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
    assert not network_guard.refused


async def test_eventually_returns_the_answer_or_says_what_it_saw() -> None:
    """A condition that becomes true gives its answer; one that does not shows its last one."""
    answers = iter([0, None, "there"])
    assert await eventually(lambda: next(answers)) == "there"
    with pytest.raises(AssertionError, match="last: 0"):
        await eventually(lambda: 0, timeout=0.05)


@pytest.mark.parametrize("turns", range(4))
async def test_a_server_that_closes_leaves_no_socket_behind(turns: int) -> None:
    """However far it has come with those who are connecting."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    gc.collect()  # what earlier tests left is not this one's
    with ExitStack() as clients, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        connected = [clients.enter_context(socket.create_connection(address)) for _ in range(4)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await close_server(server)
        for client in connected:
            client.setblocking(False)
            with suppress(ConnectionResetError):
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        gc.collect()
    assert [str(one.message) for one in caught] == []


async def test_a_deadline_can_be_let_pass() -> None:
    """What waits for an hour is due at once."""
    waiting = asyncio.create_task(asyncio.sleep(3600))
    await asyncio.sleep(0)
    let_pass(3601)
    await waiting


async def test_the_steady_clock_stops_with_the_process() -> None:
    """Seconds in which the process is left alone are not measured; all others are, also those in
    which it blocks the event loop."""
    async with steady_clock() as clock:
        began, computed = clock(), time.thread_time()
        while time.thread_time() - computed < 0.3:
            pass
        assert clock() - began >= 0.3
        await asyncio.sleep(0)
        assert clock() - began >= 0.3
        began = clock()
        time.sleep(1)
        assert clock() - began < 0.5
        await asyncio.sleep(0)
        assert clock() - began < 0.5
        await eventually(lambda: clock() - began >= 0.5)


async def test_the_steady_clock_does_not_count_waits_for_a_processor() -> None:
    """Each may be short, where many processes share it."""
    processors = os.sched_getaffinity(0)
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, processors)
        os.sched_setaffinity(0, {min(processors)})
        for _ in range(2):
            busy = stack.enter_context(subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"]))
            stack.callback(busy.kill)
        async with steady_clock() as clock:
            began, really, computed = clock(), time.monotonic(), time.thread_time()
            while time.thread_time() - computed < 0.1:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
            assert 0.1 <= clock() - began < (time.monotonic() - really) / 2


async def test_databases_are_apart(postgres_databases: PostgresDatabases) -> None:
    """What one test writes, another does not see."""
    with postgres_databases.empty() as one, postgres_databases.empty() as other:
        first, second = await asyncpg.connect(one), await asyncpg.connect(other)
        try:
            await first.execute("CREATE TABLE written (n int)")
            assert await second.fetchval("SELECT to_regclass('written')") is None
        finally:
            await first.close()
            await second.close()


async def test_a_server_keeps_what_was_committed_through_stop_and_crash() -> None:
    """A stopped and a crashed server come back on their port with what was committed."""
    with PostgresServer() as server:
        port = server.port
        await _run(server, "CREATE TABLE written (n int)")
        server.stop()
        server.start()
        await _run(server, "INSERT INTO written VALUES (1)")
        server.crash()
        with pytest.raises(ConnectionRefusedError):
            await asyncpg.connect(server.url())
        server.start()
        assert await _run(server, "SELECT count(*) FROM written") == 1
        assert server.port == port
        home = server.socket_directory
    assert not home.exists()


async def test_a_server_does_not_outlive_its_tests() -> None:
    """Where the tests' process is killed outright, the server stops and its directory goes."""
    script = """
import time
from tests.support.postgres import PostgresServer
server = PostgresServer()
server.start()
print(server.port, server.socket_directory, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as tests:
        assert tests.stdout is not None
        port, home = (await asyncio.to_thread(tests.stdout.readline)).split()
        os.kill(tests.pid, signal.SIGKILL)
    await eventually(lambda: not Path(home).exists())
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", int(port))


async def _run(server: PostgresServer, statement: str) -> object:
    connection = await asyncpg.connect(server.url())
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()
