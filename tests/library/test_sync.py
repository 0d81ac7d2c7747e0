"""`tracker.sync.Tracker`: the tracker without an event loop."""

import asyncio
import inspect
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tracker
import tracker.sync
from tests.library.conftest import INPUTS
from tests.support.waiting import NO_SWEEPS, eventually
from tests.web.callbacks import event, signed
from tracker.errors import (
    InvalidRequest,
    RunFailed,
    RunUnknown,
    SettingsError,
    SignatureError,
    StoreUnavailable,
    TrackerNotOpen,
    WaitTimeout,
)
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running
from tracker.sync import Run, RunEvent, Tracker


@pytest.fixture
async def flora(request: pytest.FixtureRequest) -> AsyncIterator[Simulator]:
    """A FLORA whose runs take up to 0.4 s, or as the test says, and whose callbacks are lost."""
    seconds = getattr(request, "param", 0.3)
    async with running(Options(failures=0.0, drop=1.0, run_seconds=seconds)) as simulator:
        yield simulator


def environment(flora: Simulator, database_url: str) -> dict[str, str]:
    """The variables of a tracker on that FLORA and a database."""
    options = flora.world.options
    return {
        "FLORA_BASE_URL": flora.base_url,
        "FLORA_API_KEY": options.api_key,
        "FLORA_WEBHOOK_SECRET": options.webhook_secret,
        "TRACKER_DATABASE_URL": database_url,
        "TRACKER_POLL_INTERVAL": "0.5",
        "TRACKER_RECONCILE_CRON": NO_SWEEPS,
    }


@pytest.fixture
def blocking(flora: Simulator, database_url: str) -> Iterator[Tracker]:
    """A tracker that opens at its first call."""
    given: dict[str, Any] = environment(flora, database_url)
    tracker = Tracker(Settings(**{name.lower(): value for name, value in given.items()}))
    yield tracker
    tracker.close()


def script(text: str, folder: Path, environ: dict[str, str]) -> "subprocess.Popen[str]":
    """A process that runs a script with these variables; not a forked one, which ends without
    finalizing Python, where warnings of what was left open are printed."""
    file = folder / "script.py"
    file.write_text(text)
    env = {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1", **environ}
    command = [sys.executable, "-W", "error", str(file)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def public(kind: type) -> dict[str, Any]:
    """The public members of a class, but for the fields that both have."""
    parts = ("Calls", "OpenedTracker")
    classes = [base for base in kind.__mro__ if base is kind or base.__name__.endswith(parts)]
    found = {name: member for base in classes for name, member in vars(base).items()}
    return {name: member for name, member in found.items() if not name.startswith("_")}


def plain(member: Any) -> str:
    """A signature, as it reads where nothing is asynchronous."""
    if not callable(member := getattr(member, "__func__", member)):
        return type(member).__name__
    signature = str(inspect.signature(member)).replace("'", "").replace('"', "")
    for module in ("library.run", "library.batches", "library.client", "sync"):
        signature = signature.replace(f"tracker.{module}.", "")
    signature = signature.replace("collections.abc.", "")
    return re.sub(r"AsyncGenerator\[(.+), None\]", r"Iterator[\1]", signature)


@pytest.mark.parametrize("name", ["Tracker", "Run", "Batch"])
def test_both_have_the_same_methods(name: str) -> None:
    """What the asynchronous class has, the blocking one has under the same name and signature, with
    the same first sentence."""
    asynchronous = public(getattr(tracker, name))
    blocking = public(getattr(tracker.sync, name))
    assert set(blocking) - set(asynchronous) == ({"close"} if name == "Tracker" else set())
    only = set(asynchronous) - set(blocking)
    assert only <= {"asgi", "lifespan"}  # they need an event loop
    for method in set(asynchronous) - only:
        member = asynchronous[method]
        assert plain(blocking[method]) == plain(member), method
        first, same = (one.__doc__.splitlines()[0] for one in (member, blocking[method]))
        assert first == same


async def test_a_handler_uses_the_tracker_from_its_thread(
    blocking: Tracker, flora: Simulator
) -> None:
    """It gets blocking runs, and starts a follow-up that is waited for there; a coroutine function
    is refused."""
    done: list[Run] = []

    @blocking.on("run.settled", name="follow", tag="step=first")
    def follow(event: RunEvent) -> None:
        assert event.run.refresh().settled
        key = f"second-{event.run.run_id}"
        done.append(blocking.start("icon-pack", INPUTS, idempotency_key=key).wait(timeout=30))

    with pytest.raises(SettingsError, match="use def"):

        @blocking.on(name="later")
        async def later(_: RunEvent) -> None: ...

    await asyncio.to_thread(blocking.start, "icon-pack", INPUTS, tags={"step": "first"})
    await eventually(lambda: done, timeout=30)
    assert done[0].succeeded
    assert len(flora.world.runs) == 2


async def test_runs_are_started_and_awaited_by_many_threads(
    blocking: Tracker, flora: Simulator
) -> None:
    """The first call opens the tracker, once; every thread gets its own runs, and all lists."""

    def order(number: int) -> Run:
        run = blocking.start("icon-pack", INPUTS, idempotency_key=f"order-{number}")
        assert blocking.start("icon-pack", INPUTS, idempotency_key=f"order-{number}") == run
        return run

    def work() -> None:
        with ThreadPoolExecutor(8) as pool:
            runs = list(pool.map(order, range(8)))  # while nobody polls they stay as they are
            done = list(pool.map(lambda run: run.wait(timeout=30), runs))
        assert all(one.succeeded and one.outputs for one in done)
        assert {one.run_id for one in done} == set(flora.world.runs)
        assert blocking.wait(done) == [run.refresh() for run in done]
        for runs in (blocking.as_settled(done), blocking.runs(status="completed")):
            assert {run.run_id for run in runs} == set(flora.world.runs)
        assert next(iter(blocking.runs())).events()[-1].status == "completed"
        with pytest.raises(RunUnknown, match="run_none"):
            blocking.get("run_none")
        copied = pickle.loads(pickle.dumps(done[0]))  # noqa: S301
        assert copied == done[0]
        with pytest.raises(TrackerNotOpen, match="belongs to no tracker"):
            copied.refresh()

    await asyncio.to_thread(work)


async def test_the_run_of_an_error_blocks_too(blocking: Tracker, flora: Simulator) -> None:
    """A run that failed can be refreshed where it is caught."""
    flora.world.change({"failures": 1.0})

    def work() -> None:
        with pytest.raises(RunFailed) as failed:
            blocking.start("icon-pack", INPUTS).wait(timeout=30)
        run = failed.value.run
        assert isinstance(run, Run)
        assert run.refresh().status == "failed"

    await asyncio.to_thread(work)


async def test_batches_changes_and_callbacks_block_too(
    blocking: Tracker, flora: Simulator, tmp_path: Path
) -> None:
    """Rows become runs, whose changes, results, files and spending are read without an event loop;
    a loop over changes can be left, and a view hands over a callback."""

    def work() -> None:
        rows = [{"prompt": "garden tools"}, {"prompt": "beach toys"}]
        batch = blocking.start_batch("icon-pack", rows, tags={"campaign": "spring"})
        assert (batch.rows, batch.refresh().batch_id) == (2, batch.batch_id)
        for change in blocking.events(after=0):
            assert isinstance(change.run, Run)
            if change.run.wait(timeout=30).succeeded:
                break
        done = batch.wait(timeout=30)
        assert (done.completed, done.ended, list(blocking.batches())) == (2, True, [done])
        runs = [row.run for row in done.results() if row.run is not None]
        assert {run.run_id for run in runs} == set(flora.world.runs)
        assert len(blocking.download(runs, tmp_path).results) == 8
        assert blocking.spending("tag:campaign").total.charged == done.cost > 0
        with pytest.raises(InvalidRequest, match="by"):
            blocking.spending("nothing")
        body = event(runs[0].run_id)
        headers = signed(body, flora.world.options.webhook_secret)
        assert blocking.verify_callback(body, headers).run_id == runs[0].run_id
        assert not blocking.receive_callback(body, headers).repeated
        with pytest.raises(SignatureError):
            blocking.receive_callback(body + b" ", headers)

    await asyncio.to_thread(work)


@pytest.mark.parametrize("flora", [60], indirect=True)
async def test_closing_ends_what_other_threads_wait_for(
    blocking: Tracker, flora: Simulator
) -> None:
    """`close` returns at once; waits and loops in other threads raise; `with` opens it again."""

    def loop() -> None:
        for _ in blocking.as_settled([run]):
            pass

    def work() -> Run:
        with pytest.raises(WaitTimeout), blocking:
            run.wait(timeout=0.1)
        with pytest.raises(TrackerNotOpen, match="open it again with"):
            run.refresh()
        with blocking, pytest.raises(TrackerNotOpen, match="open already"), blocking:
            pass
        with blocking:
            return run.refresh()

    run = await asyncio.to_thread(blocking.start, "icon-pack", INPUTS)
    waits = [asyncio.to_thread(run.wait), asyncio.to_thread(loop)]
    waiting = asyncio.gather(*waits, return_exceptions=True)
    calls: Any = blocking._running
    await eventually(lambda: len(calls._calls) == 2)
    await asyncio.to_thread(blocking.close)
    for error in await waiting:
        assert isinstance(error, TrackerNotOpen)
        assert str(error) == "the tracker was closed during this call"
    assert (await asyncio.to_thread(work)).run_id == run.run_id
    assert not [one for one in threading.enumerate() if one.name == "tracker"]


@pytest.mark.parametrize("flora", [3], indirect=True)
async def test_ctrl_c_ends_the_wait_alone(
    flora: Simulator, database_url: str, tmp_path: Path
) -> None:
    """A wait raises KeyboardInterrupt at once, in a running event loop as in a notebook; the same
    tracker then finds the run, and the process exits without a word."""
    text = """
import asyncio
from tracker.sync import Tracker

tracker = Tracker.from_env()

async def cell():
    run = tracker.start("icon-pack", {"prompt": "garden tools"}, idempotency_key="one")
    try:
        print("waiting")
        run.wait()
    except KeyboardInterrupt:
        print("interrupted", run.refresh().settled)
    print(run.wait(timeout=30).status)

loop = asyncio.new_event_loop()  # asyncio.run would take the signal; a notebook does not
loop.run_until_complete(cell())
loop.close()
"""
    with script(text, tmp_path, environment(flora, database_url)) as process:
        assert await asyncio.to_thread(process.stdout.readline) == "waiting\n"
        process.send_signal(signal.SIGINT)
        out, errors = await asyncio.to_thread(process.communicate)
    assert (out, process.returncode) == ("interrupted False\ncompleted\n", 0), errors
    assert "Traceback" not in errors
    assert "Warning" not in errors


@pytest.mark.parametrize(
    "database_url",
    ["sqlite", pytest.param("postgres", marks=pytest.mark.thorough)],
    indirect=True,
)
async def test_each_forked_process_opens_its_own(
    flora: Simulator, database_url: str, tmp_path: Path
) -> None:
    """A child uses the tracker of its parent, and so does the parent afterwards; both exit as
    usual. A child that inherits open SQLite files is told what to do instead."""
    text = """
import os, sys, warnings
from tracker.errors import TrackerNotOpen
from tracker.sync import Tracker

warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
tracker = Tracker.from_env()

def work(who):
    try:
        run = tracker.start("icon-pack", {"prompt": "garden tools"}, idempotency_key="one")
        print(who, run.wait(timeout=30).status, len(list(tracker.runs())))
    except TrackerNotOpen as error:
        print(error)

def fork():
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        work("child")
        sys.exit()

fork()
work("parent")
fork()
work("parent")
"""
    with script(text, tmp_path, environment(flora, database_url)) as process:
        out, errors = await asyncio.to_thread(process.communicate)
    said = out.splitlines()
    assert said[:2] + said[3:] == ["child completed 1", *2 * ["parent completed 1"]], errors
    if database_url.startswith("sqlite"):
        assert said[2].startswith("this process was forked while the tracker was open")
    else:
        assert said[2] == "child completed 1"
    assert process.returncode == 0
    assert "Traceback" not in errors


async def test_a_tracker_that_cannot_open_says_why_and_tries_again(tmp_path: Path) -> None:
    """The call raises what opening raised; the next one opens it, once the cause is gone."""
    folder = tmp_path / "absent"
    tracker = Tracker(Settings(tracker_database_url=f"sqlite:///{folder}/tracker.db"))

    def work() -> None:
        with pytest.raises(StoreUnavailable):
            list(tracker.runs())
        folder.mkdir()
        assert list(tracker.runs()) == []
        tracker.close()

    await asyncio.to_thread(work)
