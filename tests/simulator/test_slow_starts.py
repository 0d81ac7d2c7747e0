"""Starts whose answer is late, lost, or followed by other runs."""

import asyncio

import pytest

from tests.simulator.conftest import ServeFlora, SlowStarts
from tests.simulator.receiver import Receiver
from tests.support.clocks import HandClock
from tests.support.waiting import eventually

KEY = {"idempotency_key": "k"}


async def test_a_slow_start_runs_before_its_answer(
    serve_flora: ServeFlora, slow_starts: SlowStarts
) -> None:
    """A client that does not wait for the answer has started a run nevertheless."""
    flora = await serve_flora(slow_starts=1)
    flora.world.sleep = slow_starts.sleep
    answer = asyncio.create_task(flora.start())
    await eventually(lambda: flora.world.runs, interval=0.001)
    assert slow_starts.waiting == 1
    assert not answer.done()
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert len(flora.world.runs) == 1


async def test_a_slow_start_may_run_at_the_end_only(
    serve_flora: ServeFlora, slow_starts: SlowStarts
) -> None:
    """The run may start after the client has given up."""
    flora = await serve_flora(slow_starts=1, slow_run="last")
    flora.world.sleep = slow_starts.sleep
    answer = asyncio.create_task(flora.start())
    await eventually(lambda: slow_starts.waiting, interval=0.001)
    assert not flora.world.runs
    slow_starts.release()
    assert (await answer).json()["run_id"] in flora.world.runs


@pytest.mark.parametrize("slow_run", ["first", "last"])
async def test_a_key_known_at_the_end_lets_two_at_once_run(
    serve_flora: ServeFlora, slow_starts: SlowStarts, slow_run: str
) -> None:
    """Two requests with one key at the same moment both run; a third one afterwards does not."""
    flora = await serve_flora(slow_starts=1, slow_run=slow_run, keys_known="at_end")
    flora.world.sleep = slow_starts.sleep
    answers = asyncio.gather(flora.start(**KEY), flora.start(**KEY))
    await eventually(lambda: slow_starts.waiting == 2, interval=0.001)
    slow_starts.release()
    both = await answers
    assert len({answer.json()["run_id"] for answer in both}) == len(flora.world.runs) == 2
    assert (await flora.start(**KEY)).headers["idempotent-replayed"] == "true"
    assert [run["idempotency_key"] for run in flora.world.records()] == ["k", "k"]


async def test_a_key_known_at_once_is_refused_while_its_request_lasts(
    serve_flora: ServeFlora, slow_starts: SlowStarts
) -> None:
    """Where a key is known from the beginning, a second request at the same moment is 409."""
    flora = await serve_flora(slow_starts=1, slow_run="last")
    flora.world.sleep = slow_starts.sleep
    starting = [asyncio.create_task(flora.start(**KEY)) for _ in range(2)]
    await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
    assert slow_starts.waiting == 1
    slow_starts.release()
    both = await asyncio.gather(*starting)
    assert sorted(answer.status_code // 100 for answer in both) == [2, 4]
    assert {answer.json().get("error", {}).get("code") for answer in both} == {None, "conflict"}
    assert len(flora.world.runs) == 1


@pytest.mark.parametrize(("released", "runs"), [(False, 1), (True, 2)])
async def test_a_start_answered_500_may_have_run(
    serve_flora: ServeFlora, released: bool, runs: int
) -> None:
    """The run exists; its key gives the run afterwards, or is free and starts another one."""
    flora = await serve_flora(lost_starts=1, keys_released=released)
    lost = await flora.start(**KEY)
    assert (lost.status_code, lost.json()["error"]["code"]) == (500, "internal_error")
    assert len(flora.world.runs) == 1
    await flora.set(lost_starts=0)
    assert (await flora.start(**KEY)).json()["run_id"] == list(flora.world.runs)[-1]
    assert len(flora.world.runs) == runs


async def test_a_start_answered_500_may_not_have_run(serve_flora: ServeFlora) -> None:
    """The same answer without a run; the key is unused."""
    flora = await serve_flora(failed_starts=1)
    assert (await flora.start(**KEY)).json()["error"]["code"] == "internal_error"
    assert not flora.world.runs
    await flora.set(failed_starts=0)
    assert "idempotent-replayed" not in (await flora.start(**KEY)).headers


@pytest.mark.parametrize("status", [400, 402, 404])
async def test_the_second_answer_may_be_a_refusal(serve_flora: ServeFlora, status: int) -> None:
    """The first attempt is 500 with a run, the second is refused, the third starts a second run."""
    flora = await serve_flora(lost_starts=1, keys_released=True, second_answer=str(status))
    assert (await flora.start(**KEY)).status_code == 500
    await flora.set(lost_starts=0)
    refused = await flora.start(**KEY)
    assert refused.status_code == status
    assert refused.json()["error"]["message"]
    assert len(flora.world.runs) == 1
    assert (await flora.start(**KEY)).is_success
    assert len(flora.world.runs) == 2


async def test_a_key_may_be_forgotten_after_two_hours(
    serve_flora: ServeFlora, clock: HandClock
) -> None:
    """By the simulator's clock, also where a used key gives its answer again."""
    flora = await serve_flora(key_hours=2)
    await flora.start(**KEY)
    clock.move(7199)
    assert (await flora.start(**KEY)).headers["idempotent-replayed"] == "true"
    clock.move(1)
    assert "idempotent-replayed" not in (await flora.start(**KEY)).headers


async def test_keys_may_be_read_by_type(serve_flora: ServeFlora) -> None:
    """Technique runs read only the body's field, generations only the header."""
    flora = await serve_flora(key_source="by_type", idempotency="conflict")
    header = {"Idempotency-Key": "k"}

    async def statuses(path: str, body: dict[str, object], **sent: dict[str, str]) -> list[int]:
        return [(await flora.post(path, json=body, **sent)).status_code // 100 for _ in range(2)]

    run = {"inputs": [{"id": "prompt", "type": "text", "value": "tools"}], "mode": "async"}
    assert await statuses("/techniques/icon-pack/runs", run, headers=header) == [2, 2]
    assert await statuses("/techniques/icon-pack/runs", run | KEY) == [2, 4]
    assert await statuses("/generate", {"prompt": "a mug"} | KEY) == [2, 2]
    header = {"Idempotency-Key": "another"}
    assert await statuses("/generate", {"prompt": "a mug"}, headers=header) == [2, 4]


async def test_a_colleague_starts_the_same_technique(
    serve_flora: ServeFlora, receiver: Receiver
) -> None:
    """Beside our start stands another run of the technique, without callback, at once or later."""
    flora = await serve_flora(colleague=1, speed=1000, run_seconds=0.001)
    await flora.start(callback_url=receiver.url)
    await flora.set(colleague_seconds=20)
    await flora.start(callback_url=receiver.url)
    assert len(flora.world.runs) == 3
    await flora.quiet()
    ours, theirs, second, *late = flora.world.records()
    assert [run["colleague"] for run in (ours, theirs, second, *late)] == [False, True] * 2
    assert ours["technique"] == theirs["technique"]
    assert theirs["callback_url"] is None
    assert len(receiver.received) == 2


async def test_a_colleague_starts_runs_on_demand(serve_flora: ServeFlora) -> None:
    """The control route starts the requested number, untouched by faults."""
    flora = await serve_flora(errors=1)
    url = f"{flora.world.root}/simulator/colleague"
    started = await flora.post(url, json={"technique": "cctv-cam", "count": 2})
    assert started.json()["run_ids"] == list(flora.world.runs)
    assert (await flora.post(url, json={"technique": "nothing"})).status_code == 400


async def test_a_callback_address_is_used_unchanged(
    serve_flora: ServeFlora, receiver: Receiver
) -> None:
    """Path and query of the address are sent unchanged."""
    flora = await serve_flora(speed=1000, run_seconds=0.001)
    tail = "/aB3_-~.%2Fx/?q=1&r=%20"
    assert (await flora.start(callback_url=receiver.url + tail)).is_success
    (received,) = await receiver.arrivals(1)
    assert received.path == "/callbacks/flora" + tail
