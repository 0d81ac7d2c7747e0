"""`tracker listen` as a real process, beside a tracker that is cut off, restarted and killed."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from datetime import timedelta
from decimal import Decimal
from typing import Any

from tests.cli.conftest import Commands
from tests.store.making import NOW, TestWriter, ids, open_writer, seen, started
from tests.support.endpoint import SECRET, Receiver
from tests.support.forked import TRACKER, Forked, ForkedPython
from tests.support.waiting import START_SECONDS, close_server, eventually, free_port
from tracker.core.record import FailedRead, Observed
from tracker.core.run import Output, RunStatus
from tracker.store.engine import Database

OUTPUTS = (Output("image", "imageUrl", "https://example.com/1.png"),)


def events(receiver: Receiver) -> dict[str, tuple[str, str]]:
    """Event and run of each message that was received, by its id. All are signed."""
    assert all(one.verified for one in receiver.got)
    return {one.message_id: (one.event, one.run_id) for one in receiver.got}


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

        await eventually(serves, timeout=START_SECONDS)

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
        await close_server(self._server)
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
async def listening(commands: Commands, *arguments: str) -> AsyncIterator[tuple[ForkedPython, str]]:
    """`tracker listen` once it follows the stream, and what it said first; at the end it is
    interrupted."""
    environ = commands.essential | commands.environ
    with ForkedPython(*TRACKER, "listen", *arguments, env=environ, cwd=commands.folder) as process:
        try:
            said = ""
            async with asyncio.timeout(START_SECONDS):
                while "Listening" not in said:
                    line = await asyncio.to_thread(process.stderr.readline)
                    assert line, f"tracker listen ended: {said}"
                    said += line
            yield process, said
        finally:
            process.send_signal(signal.SIGINT)
            await asyncio.to_thread(process.communicate)
        assert process.returncode == 130


async def end(writer: TestWriter, run_id: str, **facts: Any) -> None:
    """A run starts, and a poll shows how it completed."""
    await writer.submit(started(run_id))
    facts = {"outputs": OUTPUTS, "charged_cost": Decimal("0.25")} | facts
    await writer.submit(
        seen(run_id, RunStatus.COMPLETED, at=NOW + timedelta(seconds=5), facts=facts)
    )


async def test_it_is_cut_again_and_again_and_loses_no_event(
    tracker: Commands, database_url: str, thorough: bool
) -> None:
    """Connections are cut, the tracker is restarted and killed: each ended run arrives, under one
    id, signed."""
    async with (
        await Database.open(database_url) as db,
        open_writer(db) as writer,
        Receiver() as receiver,
    ):
        served = Tracker(tracker, database_url)
        await served.open()
        try:
            await end(writer, "run_before")
            arguments = ("--forward-to", receiver.url, "--url", served.url, "--secret", SECRET)
            async with listening(tracker, *arguments, "--event", "run.settled") as (_, said):
                assert SECRET not in said
                cuts = 10 if thorough else 4
                runs = ids("run", 10 * cuts)
                for cut in range(cuts):
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
                await eventually(lambda: len(events(receiver)) >= len(runs), timeout=30)
        finally:
            await served.close()
    assert sorted(events(receiver).values()) == [("run.settled", run_id) for run_id in runs]


async def test_each_event_is_shown_with_its_answer(tracker: Commands, sqlite_url: str) -> None:
    """Lost runs, changed costs and late outputs are sent too, of runs that ended before as well; a
    lost run is noticed after a cut; an answer that fails is shown and not tried again."""
    async with (
        await Database.open(sqlite_url) as db,
        open_writer(db) as writer,
        Receiver() as receiver,
    ):
        served = Tracker(tracker, sqlite_url)
        await served.open()
        try:
            await end(writer, "run_before")
            arguments = ("--forward-to", receiver.url, "--url", served.url)
            async with listening(tracker, *arguments) as (process, said):
                (receiver.secret,) = re.findall(r"signed with (whsec_\S+)", said)
                receiver.status = 500
                await writer.submit(billed("run_before", "0.25"))  # no change
                await writer.submit(billed("run_before", "0.20", later=20))
                assert "run_before completed → 500" in await asyncio.to_thread(
                    process.stdout.readline
                )
                receiver.status = 204
                await writer.submit(billed("run_before", "0.20", later=30, outputs=2 * OUTPUTS))
                assert "run_before completed → 204" in await asyncio.to_thread(
                    process.stdout.readline
                )
                await served.stop(signal.SIGKILL)
                await writer.submit(started("run_lost"))
                for hour in range(5):
                    at = NOW + timedelta(hours=hour)
                    await writer.submit(
                        FailedRead(run_id="run_lost", at=at, error="no such run", missing=True)
                    )
                await served.start()
                assert "run_lost pending → 204" in await asyncio.to_thread(process.stdout.readline)
        finally:
            await served.close()
    assert list(events(receiver).values()) == [
        ("run.cost_changed", "run_before"),
        ("run.settled", "run_before"),
        ("run.lost", "run_lost"),
    ]
    assert receiver.got[0].data["charged_cost"] == 0.2


def billed(run_id: str, cost: str, *, later: float = 10, **facts: Any) -> Observed:
    """A later read of a completed run, with its cost."""
    return seen(
        run_id,
        RunStatus.COMPLETED,
        at=NOW + timedelta(seconds=later),
        facts={"outputs": OUTPUTS, "charged_cost": Decimal(cost)} | facts,
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
            command = ("listen", "--print", "--url", served.url, *arguments)
            done = await asyncio.to_thread(tracker, *command)
            assert done.returncode == 1
            assert "give one with the scope read with --token" in done.stderr
            assert "of-the-tests" not in done.stderr
    finally:
        await served.close()
