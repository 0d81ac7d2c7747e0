"""The process around the application: where it may listen, and how it ends."""

import asyncio
import os
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tests.support.forked import TRACKER, ForkedPython
from tests.support.waiting import START_SECONDS, eventually, free_port
from tests.web.callbacks import PATH, SECRET, event, signature, signed
from tests.web.serving import post, wire
from tracker.core.errors import SettingsError, TrackerError
from tracker.web.http.server import GRACE_SECONDS, Server, listen

pytestmark = pytest.mark.alone

# What `tracker serve` does, without the command line.
PROGRAM = """
import sys
from functools import partial
from tracker.operations.telemetry import configure_logs
from tracker.settings import load_settings
from tracker.web.app import build_app
from tracker.web.http.server import Listener, serve
from tracker.services import open_services
from tracker.worker import Worker

settings = load_settings()
configure_logs(format="json")
opened = partial(open_services, settings, background=True)
listener = Listener(host="127.0.0.1", port=int(sys.argv[1]), build=build_app)
sys.exit(serve(settings, opened, listener, worker=Worker))
"""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_without_a_token_only_loopback_is_listened_on(host: str) -> None:
    """Starting on any other address is refused, and the message names the variable."""
    with pytest.raises(SettingsError, match="TRACKER_API_TOKEN"), listen(host, 0, local_only=True):
        pass


def test_with_a_token_any_address_will_do() -> None:
    """All addresses of a host get the same port."""
    with listen("0.0.0.0", 0, local_only=False) as sockets:
        assert [one.getsockname()[0] for one in sockets] == ["0.0.0.0"]
    with listen("localhost", 0, local_only=True) as sockets:
        assert len({one.getsockname()[1] for one in sockets}) == 1


def test_a_port_that_is_taken_is_reported_plainly() -> None:
    """One line says which port, and what can be done."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(TrackerError, match=f"port {port} on 127.0.0.1 is taken"),
            listen("127.0.0.1", port, local_only=True),
        ):
            pass


def test_a_port_that_there_is_not_is_reported_plainly() -> None:
    """As an error of ours, not of some library."""
    with (
        pytest.raises(TrackerError, match="cannot serve on"),
        listen("127.0.0.1", 70000, local_only=True),
    ):
        pass


@asynccontextmanager
async def _process(tmp_path: Path, **environment: str) -> AsyncIterator[tuple[str, ForkedPython]]:
    """The program on SQLite, once it answers."""
    port = free_port()
    env = {
        "PATH": os.environ["PATH"],
        "TRACKER_DATABASE_URL": f"sqlite:///{tmp_path}/tracker.db",
        "FLORA_WEBHOOK_SECRET": SECRET,
        **environment,
    }
    base_url = f"http://127.0.0.1:{port}"
    with ForkedPython("-c", PROGRAM, str(port), env=env) as process:
        async with httpx.AsyncClient(base_url=base_url) as client:

            async def answers() -> bool:
                assert process.returncode is None, process.communicate()[1]
                try:
                    return (await client.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually(answers, timeout=START_SECONDS)
        yield base_url, process


async def _end(process: ForkedPython) -> tuple[int | None, str]:
    """The exit status and what was logged."""
    _, logged = await asyncio.to_thread(process.communicate, timeout=15)
    return process.returncode, logged


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_after_what_is_in_flight(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A callback that is half sent is taken and answered, nobody new is served, the exit is 0."""
    body = event("run_1")
    head = f"Flora-Signature: {signature(body)}"
    async with _process(tmp_path) as (base_url, process):
        async with wire(base_url) as connection, wire(base_url) as idle:
            await connection.send(post(PATH, body[:10], head, length=len(body)))
            # The server has the first half when it has answered someone who came after.
            async with httpx.AsyncClient(base_url=base_url) as client:
                other = event("run_2")
                assert (
                    await client.post(PATH, content=other, headers=signed(other))
                ).status_code == 200
            process.send_signal(number)
            assert await idle.hung_up()
            await connection.send(body[10:])
            answer = await connection.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        status, logged = await _end(process)
    assert status == 0, logged
    assert "Traceback" not in logged
    assert '"callback_url"' in logged


async def test_a_second_ctrl_c_waits_for_no_client(tmp_path: Path) -> None:
    """A callback that does not arrive is answered at once, and not when its time is over."""
    body = event("run_1")
    head = f"Flora-Signature: {signature(body)}"
    async with _process(tmp_path) as (base_url, process):
        async with wire(base_url) as connection, wire(base_url) as idle:
            await connection.send(post(PATH, body[:10], head, length=len(body)))
            async with httpx.AsyncClient(base_url=base_url) as client:
                assert (await client.get("/healthz")).status_code == 200  # it has arrived
            process.send_signal(signal.SIGINT)
            assert await idle.hung_up()
            process.send_signal(signal.SIGINT)
            answer = await connection.answer()
            assert answer.status == 503
            assert b"The tracker is stopping" in answer.body
        status, logged = await _end(process)
    assert (status, "Traceback" in logged) == (0, False), logged


async def test_a_signal_ends_it_after_what_waits_for_its_commit(tmp_path: Path) -> None:
    """While the database is blocked a callback waits; it is stored and answered before the end."""
    body = event("run_1")
    async with _process(tmp_path) as (base_url, process):
        file = sqlite3.connect(tmp_path / "tracker.db", isolation_level=None)
        file.execute("BEGIN IMMEDIATE")
        async with wire(base_url) as connection, wire(base_url) as idle:
            await connection.send(post(PATH, body, f"Flora-Signature: {signature(body)}"))
            async with httpx.AsyncClient(base_url=base_url) as client:
                assert (await client.get("/healthz")).status_code == 200  # it has arrived
            process.send_signal(signal.SIGTERM)
            assert await idle.hung_up()
            file.execute("ROLLBACK")
            answer = await connection.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await connection.hung_up()
        status, logged = await _end(process)
        (stored,) = file.execute("SELECT count(*) FROM deliveries").fetchone()
        file.close()
    assert (status, stored) == (0, 1), logged


async def test_a_worker_needs_no_port(sqlite_url: str) -> None:
    """It works until a signal, which ends it well."""
    env = {"PATH": os.environ["PATH"], "TRACKER_DATABASE_URL": sqlite_url}
    with ForkedPython(*TRACKER, "worker", env=env) as process:
        while "working" not in (line := await asyncio.to_thread(process.stderr.readline)):
            assert line
        process.send_signal(signal.SIGTERM)
        status, logged = await _end(process)
    assert (status, "Traceback" in logged) == (0, False), logged


@pytest.mark.parametrize("command", [("-c", PROGRAM, "0"), (*TRACKER, "worker")])
async def test_a_signal_while_it_still_opens_ends_it_too(command: tuple[str, ...]) -> None:
    """Nothing is waited for that nobody needs any more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()[:2]
        env = {
            "PATH": os.environ["PATH"],
            "TRACKER_DATABASE_URL": f"postgresql://postgres@{host}:{port}/tracker",
        }
        with ForkedPython(*command, env=env) as process:
            silent.settimeout(START_SECONDS)
            connection, _ = await asyncio.to_thread(silent.accept)
            with connection:
                process.send_signal(signal.SIGTERM)
                status, logged = await _end(process)
    assert status == 0, logged


@pytest.mark.parametrize("turns", [0, 2, 3, 4])
async def test_connections_that_are_just_being_accepted_are_closed(turns: int) -> None:
    """They would go on with requests until the server gives up, and hold up its end until then."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    ready = asyncio.Event()
    with listen("127.0.0.1", 0, local_only=True) as sockets, ExitStack() as stack:
        server = Server(answer, on_ready=ready.set)
        serving = asyncio.create_task(server.serve(sockets=sockets))
        await ready.wait()
        address = sockets[0].getsockname()
        clients = [stack.enter_context(socket.create_connection(address, 5)) for _ in range(20)]
        for _ in range(turns):
            await asyncio.sleep(0)
        server.stop()
        await asyncio.wait([serving], timeout=GRACE_SECONDS / 2)
        assert serving.done()
        for client in clients:
            assert await asyncio.to_thread(_is_hung_up, client)


def _is_hung_up(client: socket.socket) -> bool:
    """Whether the server ends the connection, in whichever way."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
