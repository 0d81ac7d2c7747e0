"""Runs from Python: started once, waited for whoever brings the news, listed and shown."""

import asyncio
import copy
import dataclasses
import pickle
import socket
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from tests.library.conftest import INPUTS, MakeTracker
from tests.support.waiting import assert_takes_less, eventually, let_pass
from tracker import Run, Tracker, errors
from tracker.core.record import FailedRead
from tracker.simulator import Simulator
from tracker.store.schema import techniques


async def test_a_script_starts_and_waits(tracker: Tracker, flora: Simulator) -> None:
    """With all callbacks lost and no worker, `wait` returns the run with its outputs and bill."""
    run = await tracker.start("icon-pack", INPUTS, tags={"campaign": "spring"})
    done = await run.wait(timeout=30)
    truth = flora.world.runs[run.run_id]
    assert (done.status, done.settled, done.succeeded) == ("completed", True, True)
    assert [one.url for one in done.outputs] == [one.url for one in truth.outputs]
    assert done.charged_cost == Decimal(str(truth.cost))
    assert done.inputs == ({"id": "prompt", "type": "text", "value": "garden tools"},)
    assert done.tags == {"campaign": "spring"}
    assert done == await run.refresh() != run
    assert [event.status for event in await run.events()][-1] == "completed"
    summary = await tracker.spending(by="tag:campaign")
    assert [(row.of, row.charged) for row in summary.rows] == [("spring", done.charged_cost)]
    listed = [one.run_id async for one in tracker.runs(status="completed", tag="campaign=spring")]
    assert listed == [run.run_id]


async def test_the_same_key_is_the_same_run_after_a_restart(
    make_tracker: MakeTracker, flora: Simulator
) -> None:
    """It is started and paid once, and is returned settled even where FLORA is away by then."""
    async with make_tracker() as tracker:
        run = await tracker.start("icon-pack", INPUTS, idempotency_key="order-17")
        await run.wait(timeout=30)
    flora.world.change({"gateway": 1.0})
    async with make_tracker() as again:
        same = await again.start("icon-pack", INPUTS, idempotency_key="order-17")
        assert (same.run_id, same.settled) == (run.run_id, True)
        with pytest.raises(errors.IdempotencyConflict):
            await again.start("icon-pack", {"prompt": "another"}, idempotency_key="order-17")
    assert len(flora.world.runs) == 1


async def test_a_start_rides_out_a_doubt(tracker: Tracker, flora: Simulator) -> None:
    """Where it is unknown whether FLORA took it, it is pending; asked again, it goes on and is paid
    once."""
    flora.world.change({"failed_starts": 1.0})
    with pytest.raises(errors.StartPending, match="order-18"):
        await tracker.start("icon-pack", INPUTS, idempotency_key="order-18", timeout=0.1)
    flora.world.change({"failed_starts": 0.0})
    run = await tracker.start("icon-pack", INPUTS, idempotency_key="order-18", timeout=40)
    assert list(flora.world.runs) == [run.run_id]


async def test_a_known_key_needs_neither_order_nor_definition(
    small_tracker: Tracker, flora: Simulator
) -> None:
    """It returns its run for inputs in another order, and although the technique is gone."""
    given = {"building": "https://example.com/a.png", "material": "brick"}
    run = await small_tracker.start("facade-swap", given, idempotency_key="order-20")
    await small_tracker._services().database.execute(update(techniques).values(defined_at=None))
    flora.world.technique = lambda reference: None  # type: ignore[method-assign]
    turned = dict(reversed(given.items()))
    again = await small_tracker.start("facade-swap", turned, idempotency_key="order-20", timeout=3)
    assert again.run_id == run.run_id
    with pytest.raises(errors.IdempotencyConflict):
        await small_tracker.start("facade-swap", {"material": "brick"}, idempotency_key="order-20")


@pytest.mark.parametrize(
    "inputs", [INPUTS, [{"id": "prompt", "type": "text", "value": "garden tools"}]]
)
async def test_a_start_waits_no_longer_for_a_flora_that_does_not_answer(
    make_tracker: MakeTracker, inputs: Any
) -> None:
    """Neither for the definition that checks the inputs, nor for anything else."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts connections
        root = f"http://127.0.0.1:{silent.getsockname()[1]}/api/v1"

        async def unreachable() -> None:
            async with make_tracker(flora_base_url=root) as tracker:
                with pytest.raises(errors.FloraUnreachable):
                    await tracker.start("icon-pack", inputs, timeout=1)

        await assert_takes_less(4, unreachable)


async def test_many_are_waited_for_by_whoever_brings_the_news(
    make_tracker: MakeTracker, tracker: Tracker, flora: Simulator
) -> None:
    """Another process polls; a failed run raises when all have ended, or is returned."""
    good = await tracker.start("icon-pack", INPUTS)
    flora.world.change({"failures": 1.0, "failure_codes": "GPU_PROVIDER_ERROR"})
    bad = await tracker.start("icon-pack", INPUTS)
    tracker._services().poller.poll_due = _never  # type: ignore[method-assign]
    tracker._services().follower.overdue_after = timedelta(hours=1)
    async with make_tracker(worker=True):
        with pytest.raises(errors.RunFailed) as failed:
            await tracker.wait([good, bad.run_id], timeout=30)
        assert failed.value.run.run_id == bad.run_id
        assert (failed.value.code, failed.value.retry_advice) == ("GPU_PROVIDER_ERROR", "retry_now")
        assert [run.status for run in failed.value.runs] == ["completed", "failed"]
        ended = await tracker.wait([bad, good, bad], raise_on_failure=False)
        assert [run.status for run in ended] == ["failed", "completed", "failed"]
        assert {run.run_id async for run in tracker.as_settled([good, bad])} == {
            good.run_id,
            bad.run_id,
        }


async def _never(**_: object) -> None:
    raise AssertionError("another process polls")


async def test_a_wait_that_ends_early_ends_nothing_else(tracker: Tracker, flora: Simulator) -> None:
    """A time-out says how the run stands, a cancelled wait leaves it; waiting can go on."""
    run = await tracker.start("icon-pack", INPUTS)
    follower = tracker._services().follower
    soon, follower.overdue_after = follower.overdue_after, timedelta(hours=1)
    with pytest.raises(TimeoutError, match=f"run {run.run_id} is") as late:  # nobody sees its end
        await run.wait(timeout=0.01)
    follower.overdue_after = soon
    assert isinstance(late.value, errors.WaitTimeout)
    assert [one.run_id for one in late.value.runs] == [run.run_id]
    waiting = asyncio.create_task(run.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await run.wait(timeout=30)).succeeded
    with pytest.raises(errors.RunUnknown, match="run_none"):
        await tracker.wait(["run_none", run], timeout=5)


async def test_a_lost_run_raises(small_tracker: Tracker) -> None:
    """A run that FLORA denies for over an hour ends the wait with `RunLost`."""
    small_tracker._services().follower.overdue_after = timedelta(hours=1)  # it is not polled
    run = await small_tracker.start("icon-pack", INPUTS)
    writer, now = small_tracker._services().writer, run.created_at
    waiting = asyncio.create_task(run.wait(timeout=30))
    for minutes in range(0, 90, 15):
        at = now + timedelta(minutes=minutes)
        await writer.submit(FailedRead(run_id=run.run_id, at=at, error="404", missing=True))
    with pytest.raises(errors.RunLost, match=f"run {run.run_id} is lost"):
        await waiting
    lost = await run.wait(raise_on_failure=False)
    assert (lost.tracking, lost.succeeded) == ("lost", False)


async def test_a_timeout_says_why_runs_cannot_be_read(make_tracker: MakeTracker) -> None:
    """Such as a refused key, so that nobody waits again in vain."""
    async with make_tracker(flora_api_key="sk_test_wrong") as tracker:
        tracker._services().follower.overdue_after = timedelta(0)
        run = await tracker.track("run_1", force=True)
        poller, rounds = tracker._services().poller, 0
        poll_due = poller.poll_due

        async def counted() -> None:
            nonlocal rounds
            await poll_due()
            rounds += 1

        poller.poll_due = counted  # type: ignore[method-assign,assignment]
        waiting = asyncio.create_task(run.wait(timeout=600))
        await eventually(lambda: rounds > 1)  # the reason is reported after the first round
        let_pass(601)
        with pytest.raises(errors.WaitTimeout, match="runs cannot be read: FLORA answered 401"):
            await waiting


async def test_inputs_are_python_values(tracker: Tracker, flora: Simulator) -> None:
    """Types come from the definition; a list is several values, and `None` leaves an input out."""
    image = "https://example.com/a.png"
    given = {"asset": image, "brief": None}
    run = await tracker.start("art-directors-critique", given)
    assert run.inputs == ({"id": "asset", "type": "imageUrl", "value": image},)
    run = await tracker.start("icon-pack", {"prompt": 12.5})
    assert run.inputs[0]["value"] == "12.5"
    run = await tracker.start("color-transfer", {"image": [image, image], "reference": image})
    assert [one["id"] for one in run.inputs] == ["image", "image", "reference"]
    typed = [{"id": "prompt", "type": "text", "value": "as in the API"}]
    assert (await tracker.start("icon-pack", typed)).inputs == tuple(typed)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"asset": ""}, "inputs.asset: must not be empty"),
        ({"asset": "http://example.com/a.png"}, "inputs.asset: asset must be an https link"),
        ({}, "inputs.asset: is required"),
        ({"asset": "https://example.com/a", "mood": "x"}, "inputs.mood: the technique has no"),
        (
            {"asset": object()},
            "inputs.asset: must be a text, a number, a boolean or a date, not object",
        ),
        (
            {"asset": float("nan")},
            "inputs.asset: must be a text, a number, a boolean or a date, not nan",
        ),
        ([{"id": "asset", "value": "x"}], "inputs.0.value: asset must be"),
    ],
)
async def test_wrong_inputs_are_named(small_tracker: Tracker, inputs: object, named: str) -> None:
    """Before anything is paid, the error's text and `fields` name the input and its fault."""
    with pytest.raises(errors.InvalidRequest) as refused:
        await small_tracker.start("art-directors-critique", inputs)  # type: ignore[arg-type]
    assert named in str(refused.value)
    assert refused.value.fields


async def test_tags_of_a_wrong_type_are_named(small_tracker: Tracker) -> None:
    """Nothing is started; the error's text names the argument."""
    tags: Any = ["campaign=spring"]
    with pytest.raises(errors.InvalidRequest, match="tags: must be a mapping"):
        await small_tracker.start("icon-pack", INPUTS, tags=tags)


NAIVE = datetime(2026, 1, 31)  # noqa: DTZ001


@pytest.mark.parametrize("since", [NAIVE, timedelta.max, "30d"])
async def test_spending_names_a_wrong_time(small_tracker: Tracker, since: Any) -> None:
    """A time without a zone, an age before all times, and a text."""
    with pytest.raises(errors.InvalidRequest, match="since: "):
        await small_tracker.spending(since=since)


async def test_spending_begins_with_a_day_and_is_short(small_tracker: Tracker) -> None:
    """`since` is the beginning of the first day, and no amount has zeros at its end."""
    run = await (await small_tracker.start("icon-pack", INPUTS)).wait(timeout=30)
    at = datetime(2026, 1, 31, 23, 30, tzinfo=timezone(-timedelta(hours=1)))
    summary = await small_tracker.spending(since=at)
    assert summary.since == datetime(2026, 2, 1, tzinfo=UTC)
    assert str(summary.total.charged) == str(run.charged_cost) == "0.25"
    assert str(summary.total.quoted) == "0"


async def test_a_run_is_a_value(small_tracker: Tracker) -> None:
    """It is compared, copied and pickled by its fields, and shows neither inputs nor links."""
    run = await small_tracker.start("icon-pack", {"prompt": "a secret prompt"})
    for same in (copy.deepcopy(run), pickle.loads(pickle.dumps(run)), dataclasses.replace(run)):  # noqa: S301
        assert isinstance(same, Run)
        assert (same, hash(same)) == (run, hash(run))
        with pytest.raises(errors.TrackerNotOpen, match="belongs to no tracker"):
            await same.wait()
    assert dataclasses.asdict(run)["run_id"] == run.run_id
    done = await run.wait(timeout=30)
    assert repr(done) == f"<Run {run.run_id} · completed · tech_icon-pack · 4 outputs · $0.25>"
    assert "secret" not in repr(run)
    assert (
        repr(Run.from_json({"run_id": "run_1", "status": "running"}))
        == "<Run run_1 · running · 0 %>"
    )
    assert not [name for name in ("of", "bound") if name in dir(Run)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.status = "failed"  # type: ignore[misc]


async def test_track_asks_flora_first(small_tracker: Tracker, flora: Simulator) -> None:
    """A run started elsewhere is tracked; one that FLORA does not have is refused."""
    run = await small_tracker.track(flora.start().run_id)
    assert (await run.wait(timeout=30)).succeeded
    with pytest.raises(errors.NotTracked):
        await small_tracker.track("run_nobody")
    with pytest.raises(errors.InvalidRequest, match="tag: 'spring' is not KEY=VALUE"):
        _ = [one async for one in small_tracker.runs(tag="spring")]


async def test_any_number_and_whatever_names_a_run_is_taken(
    small_tracker: Tracker, flora: Simulator, tmp_path: Path
) -> None:
    """A `Decimal` or a fraction of seconds, half a gigabyte as `5e8`, a run by an event."""
    tracker: Any = small_tracker
    run = await tracker.track(flora.start().run_id)
    (done,) = await tracker.wait(iter((await run.events())[:1]), timeout=Decimal(30))
    assert done.run_id == run.run_id
    assert (await tracker.wait(run, timeout=Fraction(1, 2))).settled
    for max_bytes in (5e8, float("inf"), Decimal(10**9)):
        await tracker.download((await run.events())[:1], tmp_path, max_bytes=max_bytes)


async def test_changes_are_followed_and_resumed(tracker: Tracker) -> None:
    """Each change once, in order, with the run; after an interruption from the last event on. A
    technique is named by id or slug."""
    events = tracker.events()
    first = asyncio.create_task(anext(events))
    await eventually(lambda: tracker._services().changes._readers)
    run = await tracker.start("icon-pack", INPUTS)
    begun = await asyncio.wait_for(first, 20)
    await events.aclose()
    assert (begun.run.run_id, begun.source) == (run.run_id, "start")
    await run.wait(timeout=30)
    assert [one.run_id async for one in tracker.runs(technique_id="icon-pack")] == [run.run_id]
    assert [one async for one in tracker.runs(technique_id="cctv-cam")] == []
    async for change in tracker.events(begun.event_id, run_id=run.run_id, technique_id="icon-pack"):
        assert change.event_id is not None
        assert begun.event_id is not None
        assert change.event_id > begun.event_id
        if change.status == "completed":
            assert change.run.succeeded
            break
