"""Starting runs: one key, one run, whatever breaks on the way."""

import asyncio
import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest

from tests.support.clocks import HandClock, PassedTime
from tests.support.logs import capture_logs
from tests.support.waiting import eventually
from tests.worker.conftest import Hurry, MakeFlora, OpenServices, on_history, reads_of, the_run
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreadable,
    IdempotencyConflict,
    StartNotStored,
    StartPending,
    StartUnresolved,
    StoreUnavailable,
)
from tracker.core.observation import Source
from tracker.core.starts import digest_of
from tracker.flora.client import start_body
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.starting.recover import HistoryRead
from tracker.starting.start import StartRequest
from tracker.store.queries import starts

PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]


def request(key: str | None = "key-1", **changes: Any) -> StartRequest:
    given: dict[str, Any] = {"technique": "icon-pack", "inputs": PROMPT, "idempotency_key": key}
    return StartRequest(**(given | changes))


async def test_a_start_is_tracked_with_its_inputs(services: Services, flora: Simulator) -> None:
    """A started run is in the database with what it was started with, by the technique's id."""
    started = await services.starter.start(request())
    record = await the_run(services, started.record.run.run_id)
    truth = flora.world.runs[record.run.run_id]
    assert not started.replayed
    assert (record.source, record.inputs) == (Source.START, PROMPT)
    assert record.run.technique_id == truth.technique.technique_id  # type: ignore[union-attr]
    assert truth.callback_url is None


async def test_a_public_url_asks_for_a_callback(open_on: OpenServices, flora: Simulator) -> None:
    """With TRACKER_PUBLIC_URL set, FLORA is told to call it, and the run waits for that first."""
    services = await open_on(flora, tracker_public_url="http://127.0.0.1:9")
    record = (await services.starter.start(request())).record
    asked = flora.world.runs[record.run.run_id].callback_url or ""
    assert asked.startswith("http://127.0.0.1:9/callbacks/flora/")
    assert record.callback_expected
    assert record.next_check_at is not None
    assert record.next_check_at - record.created_at == timedelta(seconds=30)


async def test_the_same_key_again_is_the_same_run(services: Services, flora: Simulator) -> None:
    """A repeated start costs no request and starts nothing."""
    first = await services.starter.start(request())
    asked = sum(reads_of(flora).values())
    again = await services.starter.start(request())
    assert again.replayed
    assert again.record.run.run_id == first.record.run.run_id
    assert sum(reads_of(flora).values()) == asked


async def test_the_same_key_for_something_else_is_refused(
    services: Services, flora: Simulator
) -> None:
    """One key with other inputs is a conflict, and nothing is started."""
    await services.starter.start(request())
    other = [{"id": "prompt", "type": "text", "value": "fruit"}]
    with pytest.raises(IdempotencyConflict, match="key-1"):
        await services.starter.start(request(inputs=other))
    assert len(flora.world.runs) == 1


async def test_five_at_the_same_moment_start_one(open_on: OpenServices, flora: Simulator) -> None:
    """Five starts with one key at the same moment, over two processes, give one run five times."""
    one, two = await open_on(flora), await open_on(flora)
    all_five = await asyncio.gather(
        *(services.starter.start(request()) for services in (one, two, one, two, one))
    )
    assert len({started.record.run.run_id for started in all_five}) == 1
    assert sorted(started.replayed for started in all_five) == [False, True, True, True, True]
    assert len(flora.world.runs) == 1


async def test_a_refusal_starts_nothing_and_the_key_may_be_used_again(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """What FLORA refuses comes through as it said it; once corrected, the same key starts a run,
    with other tags if these are asked for now."""
    async with make_flora(credits=0.0) as flora:
        services = await open_on(flora)
        with pytest.raises(FloraRefusal) as refused:
            await services.starter.start(request())
        assert (refused.value.status, refused.value.code) == (402, "insufficient_credits")
        flora.world.options = replace(flora.world.options, credits=100.0)
        started = await services.starter.start(request(tags={"campaign": "spring"}))
        assert started.record.tags == {"campaign": "spring"}
        assert len(flora.world.runs) == 1


@pytest.mark.parametrize(
    "idempotency", [pytest.param("replay", marks=pytest.mark.thorough), "conflict"]
)
async def test_cut_answers_never_pay_twice(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    hurry: Hurry,
    idempotency: str,
) -> None:
    """With a third of the connections cut, each key is one run, or one start for a person."""
    async with make_flora(cut=0.3, idempotency=idempotency) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        keys = [f"key-{number}" for number in range(12)]
        tracked: dict[str, str] = {}
        for round_ in range(8):
            for key in keys:
                if key in tracked:
                    continue
                try:
                    started = await services.starter.start(request(key), wait_in_doubt=False)
                except (FloraError, StartPending, StartUnresolved):
                    clock.move(1)
                else:
                    tracked[key] = started.record.run.run_id
            clock.move(200 if round_ < 4 else 3600)
            await services.recovery.recover()
        rows = [await starts.get(services.database, "ws_simulator", key) for key in keys]
        assert len(set(tracked.values())) == len(tracked)
        assert len(flora.world.runs) <= len(keys)
        assert {row.state for row in rows if row} <= {"started", "unresolved"}


async def reserve(services: Services, clock: HandClock, *, sent: bool = True) -> str:
    """A start whose process died after it was sent, or before; returns the technique's id."""
    key = "key-1"
    [workspace] = services.workspaces
    technique_id = await services.catalogue.technique_id(workspace, "icon-pack")
    await starts.reserve(
        services.database,
        starts.StartRow(
            workspace_id="ws_simulator",
            idempotency_key=key,
            technique_id=technique_id,
            fingerprint=digest_of([technique_id, PROMPT]),
            inputs=PROMPT,
            created_at=clock(),
        ),
    )
    if sent:
        db, now = services.database, clock()
        assert await starts.take(db, "ws_simulator", key, "gone", now, timedelta(seconds=1))
        await starts.mark_sent(
            db,
            "ws_simulator",
            key,
            holder="gone",
            at=now,
            callback_url=None,
            request_body=start_body(PROMPT, idempotency_key=key),
        )
        await starts.give_back(db, "ws_simulator", key, "gone")
    return technique_id


async def test_a_run_whose_starter_died_is_no_guess(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The history shows a run that may be its own, or a colleague's: it is a run of the history,
    and the start is left to a person."""
    await reserve(services, clock)
    clock.move(1)
    run = flora.start("icon-pack")
    for minutes in (1, 5, 60, 60):
        clock.move(minutes * 60)
        assert await services.recovery.recover() == 0
    [workspace] = services.workspaces
    await services.sweeper.sweep(workspace)
    record = await the_run(services, run.run_id)
    assert (record.source, record.inputs) == (Source.HISTORY, None)
    row = await starts.get(services.database, "ws_simulator", "key-1")
    assert row is not None
    assert row.state == "unresolved"


async def test_a_start_that_was_never_sent_is_nothing(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A process that died before it sent its start leaves a key that may be used."""
    await reserve(services, clock, sent=False)
    clock.move(120)
    assert await services.recovery.recover() == 0
    row = await starts.get(services.database, "ws_simulator", "key-1")
    assert row is not None
    assert row.state == "stored"
    started = await services.starter.start(request())
    assert list(flora.world.runs) == [started.record.run.run_id]


async def run_it(services: Services, technique_id: str) -> None:
    """What the request of `reserve` did at FLORA before its process died."""
    [workspace] = services.workspaces
    await workspace.require_client().start_run(
        technique_id,
        body=start_body(PROMPT, idempotency_key="key-1"),
        idempotency_key="key-1",
    )


@pytest.mark.parametrize("gone", [1, 40])
async def test_a_search_misses_no_run_that_slips_between_two_pages(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, gone: int
) -> None:
    """Runs that are deleted while the history is searched move others up over the edge of a page.
    The search finds them all, or says that it did not: a start that is sent again is paid."""
    async with make_flora(history=600, history_seconds=3600.0, history_ties=8) as flora:
        services = await open_on(flora)
        (workspace,) = services.workspaces
        services.recovery._unfiltered.add(workspace.place)
        newest, *_ = flora.world.history("technique", flora.world.options.workspaces[0])
        assert newest.request.technique is not None
        technique_id = newest.request.technique.technique_id

        async def shrink(page: list[str]) -> None:
            flora.world.delete(set(page[:gone]))

        on_history(services, shrink)
        try:
            read = await services.recovery.read_history(
                workspace, technique_id, clock(), give_up=math.inf
            )
        except FloraUnreadable:
            assert gone > 1
        else:
            left = flora.world.history("technique", flora.world.options.workspaces[0])
            assert {
                run.run_id
                for run in left
                if run.request.technique and run.request.technique.technique_id == technique_id
            } <= read.runs.keys()


async def test_a_key_that_flora_knows_finds_its_run(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """It was sent again, since the history showed nothing, and FLORA answers 409: the one run that
    turns up then is its own."""
    flora.world.options = replace(flora.world.options, idempotency="conflict")
    technique_id = await reserve(services, clock)
    clock.move(200)
    read = services.recovery.read_history

    async def read_nothing(*given: Any, **named: Any) -> HistoryRead:
        found = await read(*given, **named)
        await run_it(services, technique_id)  # listed late
        return found

    services.recovery.read_history = read_nothing  # type: ignore[method-assign]
    assert await services.recovery.recover() == 0
    services.recovery.read_history = read  # type: ignore[method-assign]
    clock.move(61)
    assert await services.recovery.recover() == 1
    row = await starts.get(services.database, "ws_simulator", "key-1")
    assert row is not None
    assert [row.run_id] == list(flora.world.runs)


async def test_a_key_used_again_after_a_refusal_is_in_use_from_then_on(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Runs that others began between a refusal and the next use of its key are not taken for it."""
    flora.world.options = replace(flora.world.options, credits=0.0)
    with pytest.raises(FloraRefusal):
        await services.starter.start(request())
    flora.world.options = replace(flora.world.options, credits=None)
    clock.move(3600)
    foreign = flora.start("icon-pack")
    clock.move(3600)
    flora.world.options = replace(flora.world.options, idempotency="conflict")
    started = await services.starter.start(request())
    assert not started.replayed
    assert started.record.run.run_id != foreign.run_id


@pytest.mark.parametrize("fault", ["fails", "is slow"])
async def test_an_interrupted_database_leaves_no_doubt_about_a_start_that_was_not_sent(
    services: Services, flora: Simulator, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The database stored that the start is sent, and did not confirm it, so it was not sent: it is
    as before as soon as the database answers, and the waiting caller's request is sent then."""
    await services.starter.start(request("key-0"))
    mark_sent, failed = starts.mark_sent, asyncio.Event()

    async def mark_and_fail_once(*given: Any, **named: Any) -> Any:
        row = await mark_sent(*given, **named)
        if failed.is_set():
            return row
        failed.set()
        if fault == "fails":
            raise StoreUnavailable("the connection was lost")
        await asyncio.sleep(60)

    monkeypatch.setattr(starts, "mark_sent", mark_and_fail_once)
    monkeypatch.setattr(services.starter, "deadline", 1.0)
    started = await services.starter.start(request(), wait=30, wait_in_doubt=False)
    assert failed.is_set()
    assert (started.replayed, len(flora.world.runs)) == (False, 2)


async def test_a_start_in_doubt_that_was_not_sent_again_keeps_its_times(
    services: Services, flora: Simulator, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doubt is about the first request, also where a second was stored and not sent."""
    await reserve(services, clock)
    clock.move(200)
    mark_sent = starts.mark_sent

    async def mark_and_fail(*given: Any, **named: Any) -> None:
        await mark_sent(*given, **named)
        raise StoreUnavailable("the connection was lost")

    async def stored() -> starts.StartRow | None:
        return await starts.get(services.database, "ws_simulator", "key-1")

    with monkeypatch.context() as patched:
        patched.setattr(starts, "mark_sent", mark_and_fail)
        before = await stored()
        assert await services.recovery.recover() == 0
    after = await stored()
    assert before
    assert after
    assert (after.state, after.sent_at, after.lease_holder) == ("in_doubt", before.sent_at, None)
    assert not flora.world.runs
    clock.move(60)
    assert await services.recovery.recover() == 1
    assert len(flora.world.runs) == 1


async def test_an_answer_that_cannot_be_stored_is_stored_later(
    services: Services, flora: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller learns which run is paid for. A process that ends waits for it, and names what is
    lost where it cannot."""

    async def submit(*_: object) -> None:
        raise StoreUnavailable("the database does not answer")

    sender = services.starter.sender
    with monkeypatch.context() as patched:
        patched.setattr(services.writer, "submit", submit)
        with pytest.raises(StartNotStored) as raised:
            await services.starter.start(request())
        (run_id,) = flora.world.runs
        assert raised.value.run_id == run_id
        with capture_logs() as lines, pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await sender.aclose()
        assert [(line["event"], line["run_id"]) for line in lines] == [
            ("start.answer_lost", run_id)
        ]
        with pytest.raises(StartNotStored):
            await services.starter.start(request("key-2"))
    await sender.aclose()
    (_, second) = flora.world.runs
    assert (await the_run(services, second)).source is Source.START


async def test_a_refusal_that_names_a_run_is_evidence(
    services: Services, flora: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any answer of FLORA is that has a run's id."""

    async def start_run(*_: object, **__: object) -> None:
        raise FloraRefusal(status=409, code="conflict", message="it runs", run_id=run_id)

    run_id = flora.start().run_id
    (workspace,) = services.workspaces
    monkeypatch.setattr(workspace.client, "start_run", start_run)
    started = await services.starter.start(request())
    assert started.record.run.run_id == run_id
    row = await starts.get(services.database, "ws_simulator", "key-1")
    assert row is not None
    assert (row.state, row.run_id) == ("started", run_id)


async def test_a_refusal_that_is_not_stored_is_not_told(
    services: Services, flora: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is stored the start is in doubt, and would be sent again: who heard that nothing was
    started could start it anew, and would pay twice. The next request finds it refused."""
    flora.world.options = replace(flora.world.options, credits=0.0)
    give_back, is_down = starts.give_back, True

    async def mark(*given: Any, **named: Any) -> None:
        raise StoreUnavailable("the database does not answer")

    async def give_back_later(*given: Any, **named: Any) -> bool:
        if is_down:
            raise StoreUnavailable("the database does not answer")
        return await give_back(*given, **named)

    monkeypatch.setattr(starts, "give_back", give_back_later)
    database = services.database
    with monkeypatch.context() as patched:
        patched.setattr(starts, "mark", mark)
        # It waits for the release no longer than this, and for its answer as long as it takes.
        times = replace(database.url.times, release=0.1)
        patched.setattr(database, "url", replace(database.url, times=times))
        patched.setattr(services.starter, "monotonic", passed := PassedTime())
        patched.setattr(services.starter, "sleep", passed.sleep)
        with pytest.raises(StartPending):
            await services.starter.start(request(), wait_in_doubt=False)

    async def state() -> str:
        row = await starts.get(services.database, "ws_simulator", "key-1")
        assert row is not None
        return row.state

    assert await state() == "sent"
    is_down = False

    async def is_refused() -> bool:
        return await state() == "refused"

    await eventually(is_refused)
    flora.world.options = replace(flora.world.options, credits=None)
    started = await services.starter.start(request())
    assert (started.replayed, list(flora.world.runs)) == (False, [started.record.run.run_id])


async def test_a_fault_is_logged_when_the_caller_has_gone(services: Services) -> None:
    """Else nobody would know of it; the caller of a start that is still waited for is told."""
    gone = asyncio.Event()

    async def fails_late(asked: httpx.Request) -> None:
        if asked.method == "POST":
            await gone.wait()
            raise ZeroDivisionError("a fault")

    [workspace] = services.workspaces
    workspace.require_client().http.event_hooks = {"request": [fails_late]}
    with capture_logs() as lines:
        with pytest.raises(StartPending):
            await services.starter.start(request("key-1"), wait=0.05)
        gone.set()
        await eventually(lambda: [line for line in lines if line["event"] == "start.broken"])
