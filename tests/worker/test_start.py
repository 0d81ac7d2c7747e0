"""Starting runs: one key, one run, whatever breaks on the way."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.worker.conftest import HandClock, Hurry, MakeFlora, OpenServices, reads_of, the_run
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    IdempotencyConflict,
    StartUnresolved,
)
from tracker.core.observation import Source
from tracker.flora.client import FloraClient
from tracker.simulator import Simulator
from tracker.store import starts
from tracker.tracking.start import StartRequest, fingerprint
from tracker.wiring import Services

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
    assert flora.world.runs[record.run.run_id].callback_url == "http://127.0.0.1:9/callbacks/flora"
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
    """What FLORA refuses comes through as it said it; once mended, the same key starts a run."""
    async with make_flora(credits=0.0) as flora:
        services = await open_on(flora)
        with pytest.raises(FloraRefusal) as refused:
            await services.starter.start(request())
        assert (refused.value.status, refused.value.code) == (402, "insufficient_credits")
        flora.world.options = replace(flora.world.options, credits=100.0)
        await services.starter.start(request())
        assert len(flora.world.runs) == 1


@pytest.mark.parametrize("idempotency", ["replay", "conflict"])
async def test_cut_answers_never_pay_twice(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, idempotency: str, hurry: Hurry
) -> None:
    """With a third of the connections cut, each key is one run, or one visibly unresolved start."""
    async with make_flora(cut=0.3, idempotency=idempotency) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        tracked: dict[str, str] = {}
        for number in range(25):
            clock.move(1)
            key = f"key-{number}"
            for _ in range(6):
                try:
                    started = await services.starter.start(request(key))
                except (FloraError, StartUnresolved):
                    clock.move(1)
                    continue
                tracked[key] = started.record.run.run_id
                break
        rows = {
            key: await starts.get(services.database, "default", key)
            for key in (f"key-{number}" for number in range(25))
        }
        assert len(set(tracked.values())) == len(tracked)
        assert len(flora.world.runs) <= sum(row is not None for row in rows.values())
        unresolved = [row for row in rows.values() if row and row.state != "started"]
        assert len(tracked) + len(unresolved) == sum(row is not None for row in rows.values())
        if idempotency == "replay":
            assert not unresolved
            assert set(tracked.values()) == set(flora.world.runs)


async def reserve(services: Services, clock: HandClock, *, sent: bool = True) -> str:
    """A start whose process died after it was sent, or before; returns the technique's id."""
    key = "key-1"
    [workspace] = services.workspaces
    technique_id = await services.catalogue.technique_id(workspace, "icon-pack")
    await starts.reserve(
        services.database,
        workspace_slot="default",
        idempotency_key=key,
        technique_id=technique_id,
        fingerprint=fingerprint(technique_id, PROMPT),
        inputs=PROMPT,
        at=clock(),
    )
    if sent:
        db, now = services.database, clock()
        assert await starts.take(db, "default", key, "gone", now, timedelta(seconds=1))
        await starts.mark_sent(db, "default", key, holder="gone", at=now, callback_url=None)
        await starts.give_back(db, "default", key, "gone")
    return technique_id


async def test_a_run_whose_starter_died_is_found(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A start that reached FLORA before its process was killed is found in the history."""
    await reserve(services, clock)
    clock.move(1)
    run = flora.start("icon-pack")
    clock.move(120)
    assert await services.recovery.recover() == 1
    record = await the_run(services, run.run_id)
    assert (record.source, record.inputs) == (Source.START, PROMPT)
    row = await starts.get(services.database, "default", "key-1")
    assert row is not None
    assert (row.state, row.run_id) == ("started", run.run_id)


async def test_a_start_that_was_never_sent_is_nothing(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A process that died before it sent its start leaves a key that may be used again."""
    await reserve(services, clock, sent=False)
    clock.move(120)
    assert await services.recovery.recover() == 0
    row = await starts.get(services.database, "default", "key-1")
    assert row is not None
    assert row.state == "refused"
    started = await services.starter.start(request())
    assert list(flora.world.runs) == [started.record.run.run_id]


async def run_it(services: Services, technique_id: str) -> None:
    """What the request of `reserve` did at FLORA before its process died."""
    [workspace] = services.workspaces
    await workspace.require_client().start_run(technique_id, inputs=PROMPT, idempotency_key="key-1")


@pytest.mark.parametrize("trouble", ["rate_limit", "unreachable"])
async def test_a_refusal_of_the_second_request_says_nothing_of_the_first(
    services: Services, flora: Simulator, clock: HandClock, hurry: Hurry, trouble: str
) -> None:
    """A start in doubt stays in doubt while FLORA refuses to be asked; a day later it is found."""
    await run_it(services, await reserve(services, clock))
    clock.move(3)
    services.starter._deadline = 0.5
    hurry(services, flora, deadline=0.5)
    [workspace] = services.workspaces
    if trouble == "rate_limit":
        flora.world.options = flora.world.options.with_rates({"rate_limit": 1.0})
    else:
        workspace.client = FloraClient(
            base_url="http://127.0.0.1:9", api_key="sk_test", deadline=0.3, clock=clock
        )
    with pytest.raises(FloraError):
        await services.starter.start(request())
    row = await starts.get(services.database, "default", "key-1")
    assert row is not None
    assert row.state == "sent"
    flora.world.options = flora.world.options.with_rates({"rate_limit": 0.0})
    await workspace.require_client().aclose()
    hurry(services, flora)
    services.starter._deadline = 10
    clock.move(25 * 3600)
    assert (await services.starter.start(request())).replayed
    assert len(flora.world.runs) == 1


async def test_another_public_url_is_no_other_request(
    services: Services, open_on: OpenServices, flora: Simulator, clock: HandClock, hurry: Hurry
) -> None:
    """A start in doubt is sent again as it was first sent, whatever the settings are now."""
    await run_it(services, await reserve(services, clock))
    clock.move(60)
    other = await open_on(flora, tracker_public_url="http://127.0.0.1:9")
    hurry(other, flora)
    assert (await other.starter.start(request())).replayed
    assert len(flora.world.runs) == 1


async def test_a_key_used_again_after_a_refusal_is_in_use_from_then_on(
    services: Services, flora: Simulator, clock: HandClock, hurry: Hurry
) -> None:
    """Runs that others began between a refusal and the next use of its key are not taken for it."""
    hurry(services, flora)
    flora.world.options = replace(flora.world.options, credits=0.0)
    with pytest.raises(FloraRefusal):
        await services.starter.start(request())
    flora.world.options = replace(flora.world.options, credits=None)
    clock.move(3600)
    stranger = flora.start("icon-pack")
    clock.move(3600)
    flora.world.options = replace(flora.world.options, idempotency="conflict")
    started = await services.starter.start(request())
    assert not started.replayed
    assert started.record.run.run_id != stranger.run_id


async def test_a_run_that_somebody_else_accounts_for_is_not_taken(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Runs begun before the key was stored, tracked by somebody or started by another key are not
    it."""
    flora.start("icon-pack")
    clock.move(1)
    await reserve(services, clock)
    clock.move(1)
    tracked = flora.start("icon-pack")
    await services.tracker.track(tracked.run_id)
    await services.starter.start(request("key-2"))
    clock.move(120)
    assert await services.recovery.recover() == 0
    clock.move(1000)
    assert await services.recovery.recover() == 0
    row = await starts.get(services.database, "default", "key-1")
    assert row is not None
    assert row.state == "unresolved"
    assert len(flora.world.runs) == 3


async def test_two_candidates_leave_a_start_unresolved(
    services: Services, flora: Simulator, clock: HandClock, hurry: Hurry
) -> None:
    """Where two runs could be it, nothing is guessed, and nothing is started again."""
    await reserve(services, clock)
    clock.move(1)
    flora.start("icon-pack")
    flora.start("icon-pack")
    clock.move(3 * 3600)
    hurry(services, flora)
    with pytest.raises(StartUnresolved, match="key-1"):
        await services.starter.start(request())
    assert len(flora.world.runs) == 2


async def test_a_forgotten_key_is_looked_for_before_anything_is_sent(
    services: Services, flora: Simulator, clock: HandClock, hurry: Hurry
) -> None:
    """Hours later, when FLORA may have forgotten the key, the original is found and not paid
    again."""
    hurry(services, flora)
    await reserve(services, clock)
    clock.move(1)
    run = flora.start("icon-pack")
    clock.move(3 * 3600)
    started = await services.starter.start(request())
    assert (started.replayed, started.record.run.run_id) == (True, run.run_id)
    assert len(flora.world.runs) == 1
