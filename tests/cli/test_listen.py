"""`tracker listen` as a real process, beside a tracker that is cut off, restarted and killed."""

import asyncio
import base64
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any

from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.cli.conftest import TRACKER, Commands
from tests.store.making import NOW, TestWriter, ids, open_writer, seen, started
from tests.support.forked import Forked
from tests.support.waiting import eventually, free_port
from tests.web.serving import serving
from tracker.core.record import Seen, Unseen
from tracker.core.run import Output, RunStatus
from tracker.store.engine import Database

SECRET = "whsec_" + base64.b64encode(b"a secret of the tests, 24+ bytes").decode()
OUTPUTS = (Output("image", "imageUrl", "https://example.com/1.png"),)


@dataclass
class Receiver:
    """A local program that receives webhooks; it refuses what is not signed with `SECRET`."""

    answers: list[int] = field(default_factory=list)
    """Answers to the next requests; then 204."""
    got: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def receive(self, request: Request) -> Response:
        body, headers = await request.body(), request.headers
        Webhook(SECRET).verify(body, dict(headers))
        assert headers["content-type"] == "application/json"
        self.got.append((headers["webhook-id"], json.loads(body)))
        return Response(status_code=self.answers.pop(0) if self.answers else 204)

    def events(self) -> dict[str, tuple[str, str]]:
        """Type and run of each message, by its id."""
        return {id_: (body["type"], body["data"]["run_id"]) for id_, body in self.got}


@asynccontextmanager
async def receiving() -> AsyncIterator[tuple[Receiver, str]]:
    """A receiver and its address."""
    receiver = Receiver()
    app = Starlette(routes=[Route("/hook", receiver.receive, methods=["POST"])])
    async with serving(app) as url:
        yield receiver, f"{url}/hook"


class Tracker:
    """`tracker serve` behind a proxy that cuts connections."""

    def __init__(self, commands: Commands, database_url: str) -> None:
        self._commands = commands
        self._database_url = database_url
        self._port = free_port()
        self._process: Forked | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.url = ""

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        await self.start()

    async def start(self) -> None:
        log = self._commands.folder / "serve.log"
        self._process = Forked.begin(
            *("serve", "--no-worker", "--port", str(self._port)),
            env=self._commands.essential
            | self._commands.environ
            | {"TRACKER_DATABASE_URL": self._database_url},
            output=log,
            folder=self._commands.folder,
        )

        async def serves() -> bool:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.close()
                return True
            return False

        await eventually(serves, timeout=30)

    async def stop(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        await self._process.wait()

    def cut(self) -> None:
        for writer in self._connections:
            writer.transport.abort()

    async def close(self) -> None:
        await self.stop(signal.SIGKILL)
        assert self._server is not None
        self._server.close()
        self.cut()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError):
            self._connections.add(writer)
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            with closing(back):
                await asyncio.wait(
                    [
                        asyncio.create_task(_copy(reader, back)),
                        asyncio.create_task(_copy(there, writer)),
                    ],
                    return_when=asyncio.FIRST_COMPLETED,
                )
        self._connections.discard(writer)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def listening(commands: Commands, *arguments: str) -> AsyncIterator[Any]:
    """`tracker listen` once it follows the stream; at the end it is interrupted."""
    process = await asyncio.create_subprocess_exec(
        *(*TRACKER, "listen", *arguments),
        cwd=commands.folder,
        env=commands.essential | commands.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while b"Listening" not in (line := await process.stderr.readline()):
                assert line, "tracker listen ended"
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await process.communicate()


async def end(writer: TestWriter, run_id: str, **facts: Any) -> None:
    """A run starts, and a poll shows how it completed."""
    await writer.submit(started(run_id))
    facts = {"outputs": OUTPUTS, "charged_cost": Decimal("0.25")} | facts
    await writer.submit(
        seen(run_id, RunStatus.COMPLETED, at=NOW + timedelta(seconds=5), facts=facts)
    )


async def test_it_is_cut_ten_times_and_loses_no_event(tracker: Commands, database_url: str) -> None:
    """Connections are cut, the tracker is restarted and killed: each ended run arrives, under one
    id, signed."""
    async with (
        await Database.open(database_url) as db,
        open_writer(db) as writer,
        receiving() as (receiver, hook),
    ):
        served = Tracker(tracker, database_url)
        await served.open()
        try:
            await end(writer, "run_before")
            arguments = ("--forward-to", hook, "--url", served.url, "--secret", SECRET)
            async with listening(tracker, *arguments, "--event", "run.settled"):
                runs = ids("run", 100)
                for cut in range(10):
                    for run_id in runs[10 * cut : 10 * cut + 10]:
                        await end(writer, run_id)
                        if run_id.endswith("4"):
                            if cut % 3 == 0:
                                served.cut()
                            else:
                                await served.stop(
                                    signal.SIGKILL if cut % 3 == 1 else signal.SIGTERM
                                )
                    if cut % 3:
                        await served.start()
                await eventually(lambda: len(receiver.events()) >= 100, timeout=30)
        finally:
            await served.close()
    assert sorted(receiver.events().values()) == [("run.settled", run_id) for run_id in runs]


async def test_each_event_is_shown_with_its_answer(tracker: Commands, sqlite_url: str) -> None:
    """Lost runs and changed costs are sent too, of runs that ended before as well, and a lost run
    is noticed after a cut; an answer that fails is shown and not tried again."""
    async with (
        await Database.open(sqlite_url) as db,
        open_writer(db) as writer,
        receiving() as (receiver, hook),
    ):
        served = Tracker(tracker, sqlite_url)
        await served.open()
        try:
            await end(writer, "run_before")
            arguments = ("--forward-to", hook, "--url", served.url, "--secret", SECRET)
            async with listening(tracker, *arguments) as process:
                receiver.answers = [500]
                await writer.submit(billed("run_before", "0.25"))  # no change
                await writer.submit(billed("run_before", "0.20", later=20))
                assert b"run_before completed \xe2\x86\x92 500" in await process.stdout.readline()
                await served.stop(signal.SIGKILL)
                await writer.submit(started("run_lost"))
                for hour in range(5):
                    at = NOW + timedelta(hours=hour)
                    await writer.submit(
                        Unseen(run_id="run_lost", at=at, error="no such run", missing=True)
                    )
                await served.start()
                assert b"run_lost pending \xe2\x86\x92 204" in await process.stdout.readline()
        finally:
            await served.close()
    assert list(receiver.events().values()) == [
        ("run.cost_changed", "run_before"),
        ("run.lost", "run_lost"),
    ]
    assert receiver.got[0][1]["data"]["charged_cost"] == 0.2


def billed(run_id: str, cost: str, *, later: float = 10) -> Seen:
    """A later read of a completed run, with its cost."""
    return seen(
        run_id,
        RunStatus.COMPLETED,
        at=NOW + timedelta(seconds=later),
        facts={"outputs": OUTPUTS, "charged_cost": Decimal(cost)},
    )


def test_what_is_wrong_is_named(tracker: Commands) -> None:
    """No tracker at the address, no address to forward to, a secret that is none."""
    url = f"http://127.0.0.1:{free_port()}"
    dead = tracker("listen", "--print", "--url", url)
    assert dead.returncode == 1
    assert f"no tracker can be reached at {url}" in dead.stderr
    hook = ("--forward-to", "http://127.0.0.1:3000/hook")
    for arguments in ((), ("--print", *hook), (*hook, "--secret", "x"), ("--forward-to", "3000")):
        refused = tracker("listen", *arguments)
        assert refused.returncode == 2, arguments
        assert refused.stderr.startswith("tracker: "), refused.stderr
        assert len(refused.stderr.splitlines()) == 1


async def test_a_wrong_token_is_refused(tracker: Commands, sqlite_url: str) -> None:
    """The message says what is needed; it does not hold the token."""
    tracker.environ["TRACKER_API_TOKEN"] = "a-token-of-the-tests"
    served = Tracker(tracker, sqlite_url)
    await served.open()
    try:
        for arguments in ((), ("--token", "another-token-of-the-tests")):
            tracker.environ.clear()
            process = await asyncio.create_subprocess_exec(
                *(*TRACKER, "listen", "--print", "--url", served.url, *arguments),
                cwd=tracker.folder,
                env=tracker.essential,
                stderr=subprocess.PIPE,
            )
            _, errors = await process.communicate()
            assert process.returncode == 1
            assert b"give one with the scope read with --token" in errors
            assert b"of-the-tests" not in errors
    finally:
        await served.close()
