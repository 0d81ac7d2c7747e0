"""`Tracker.on`: what a handler gets, what it can do, and what cannot be one."""

import asyncio
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from tests.docs.pages import DOCS, blocks
from tests.library.conftest import INPUTS, MakeTracker
from tests.support.endpoint import SECRET
from tests.support.waiting import NO_SWEEPS, eventually
from tracker import Run, RunEvent, Tracker
from tracker.errors import SettingsError
from tracker.settings import EndpointSettings, Settings
from tracker.simulator import Simulator


async def test_a_handler_gets_the_run_and_starts_another(
    make_tracker: MakeTracker, flora: Simulator
) -> None:
    """Every run that matches the filters arrives with its outputs and bill, in a coroutine and in
    a thread; the coroutine starts a follow-up of each run, once, although it fails after the start
    the first time."""
    tracker = make_tracker(tracker_poll_interval=0.2, tracker_callback_grace=0)
    events: list[RunEvent] = []
    stored: list[tuple[Run, str]] = []
    followed: list[Run] = []

    @tracker.on("run.settled", name="follow", tag="step=first", status="completed")
    async def follow(event: RunEvent) -> None:
        events.append(event)
        key = f"second-{event.run.run_id}"
        followed.append(await tracker.start("icon-pack", INPUTS, idempotency_key=key))
        if event.attempt == 1:
            raise ConnectionError("the network is down")

    @tracker.on(name="store")
    def store(event: RunEvent) -> None:
        stored.append((event.run, threading.current_thread().name))

    async with tracker:
        run = await tracker.start("icon-pack", INPUTS, tags={"step": "first"})
        await eventually(lambda: len(events) == 2, timeout=30)
        await eventually(lambda: len(stored) == 2, timeout=30)
        present = await run.refresh()
    assert {one.run_id for one in followed} | {run.run_id} == set(flora.world.runs)
    first, second = events
    assert (first.message_id, first.attempt + 1) == (second.message_id, second.attempt)
    assert (first.type, first.run.run_id) == ("run.settled", run.run_id)
    truth = flora.world.runs[run.run_id]
    assert first.run.charged_cost == Decimal(str(truth.cost))
    assert (first.run.status, len(first.run.outputs)) == ("completed", len(truth.outputs))
    assert (first.run.outputs, first.run.settled_at) == (present.outputs, present.settled_at)
    assert {one.run_id for one, _ in stored} == set(flora.world.runs)
    assert {thread for _, thread in stored} == {"handler store"}


async def test_the_documented_chain_runs(
    flora: Simulator, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handlers of docs/notify.md, as they stand there, start a second technique once."""
    quick = {
        "TRACKER_CALLBACK_GRACE": "0",
        "TRACKER_POLL_INTERVAL": "0.2",
        "TRACKER_RECONCILE_CRON": NO_SWEEPS,
    }
    for name, value in (flora.environment | quick | {"TRACKER_DATABASE_URL": sqlite_url}).items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    (text,) = (one.text for one in blocks(DOCS / "notify.md", "python") if "tracker.on" in one.text)
    exec(compile(text, "notify.md", "exec"), names)  # noqa: S102
    tracker: Tracker = names["tracker"]
    async with tracker:
        first = await tracker.start("icon-pack", INPUTS, tags={"step": "first"})

        async def second() -> list[Run]:
            return [run async for run in tracker.runs(tag="step=second")]

        (run,) = await eventually(second, timeout=30)
        done = await run.wait(timeout=30)
    assert done.inputs[0]["value"] == (flora.world.runs[first.run_id].outputs[0].url)
    assert len(flora.world.runs) == 2


def yielding(_: RunEvent) -> Any:
    """A generator: calling it runs nothing."""
    yield


def no_argument() -> None:
    """Cannot be called with an event."""


async def fine(_: RunEvent) -> None:
    """A handler."""


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (fine, {"name": "with space"}, "name must be 1 to 64 of"),
        (fine, {"events": ["run.ended"]}, "event must be 'run.settled'"),
        (fine, {"technique_id": "icon-pack"}, "technique_id must be a technique's id"),
        (fine, {"tag": "campaign"}, "tag 'campaign' is not KEY=VALUE"),
        (fine, {"concurrency": 0}, "concurrency must be greater than or equal to 1"),
        (fine, {"timeout": 0}, "timeout must be greater than 0"),
        (yielding, {}, "must not yield"),
        (no_argument, {}, "must take one argument, the event"),
        (fine, {"name": "taken"}, "has this name already"),
    ],
)
def test_what_cannot_be_a_handler_is_refused(
    function: Callable[..., Any], given: dict[str, Any], message: str
) -> None:
    """The error names the handler, the argument, and what it must be."""
    tracker = Tracker(Settings())

    @tracker.on(name="taken")
    def taken(_: RunEvent) -> None: ...

    given = {"name": "new", **given}
    with pytest.raises(SettingsError, match=message) as refused:
        tracker.on(*given.pop("events", ["run.settled"]), **given)(function)
    assert str(refused.value).startswith(f"handler {given['name']!r}: ")


async def test_a_name_is_taken_by_an_endpoint_and_an_open_tracker_takes_none(
    make_tracker: MakeTracker,
) -> None:
    """Both are errors that say what to do; a module that is imported again replaces its own."""
    shop = EndpointSettings(id="fine", url="https://shop.example.com", secrets=[SECRET])
    tracker = make_tracker(endpoints=(shop,))
    for _ in range(2):
        tracker.on("run.settled", name="fine")(fine)
    with pytest.raises(SettingsError, match="rename one of them"):
        await tracker.__aenter__()
    async with make_tracker(worker=False) as opened:
        with pytest.raises(SettingsError, match="before it is opened"):
            opened.on("run.settled", name="late")
    assert not [one for one in asyncio.all_tasks() if one.get_name() == "outbox"]
