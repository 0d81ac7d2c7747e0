"""Callbacks over real HTTP: their bytes, their attempts and their faults."""

import json
from dataclasses import replace
from itertools import pairwise

import httpx
import pytest

from tests.simulator.receiver import Receiver
from tests.support.waiting import eventually
from tracker.simulator import Options, SimulatedWorkspace, Simulator, running
from tracker.simulator.callbacks import sign

QUICK = {"speed": 200, "run_seconds": 20}


def test_a_signature_is_floras() -> None:
    """The header for a known body, time and secret is the one that FLORA's SDK accepts."""
    body = (
        b'{"id":"whd_abc123","type":"run.completed","api_version":"2026-06-11",'
        b'"created_at":1750000000000,"data":{"run_id":"run_xyz789","run_type":"technique",'
        b'"workspace_id":"ws_abc123","status":"completed"}}'
    )
    assert sign(1750000000, body, ["whsec_test_0123456789abcdef"]) == (
        "t=1750000000,v1=1c60c64231ff59520c5495506ab7f2b26c4897388feb72245d6646408587cb64"
    )


async def test_a_callback_reports_the_end(receiver: Receiver) -> None:
    """Each run with a callback address sends one signed callback, after its end, as documented."""
    async with running(Options(**QUICK, failures=0.5)) as simulator:
        for _ in range(12):
            simulator.start(callback_url=receiver.url)
        simulator.start()  # and one that wants no callback
        simulator.start_generation(callback_url=receiver.url)
        await simulator.quiet()
        records = {run["run_id"]: run for run in simulator.world.records()}
        deliveries = simulator.world.deliveries
    assert len(receiver.received) == 13
    for received in receiver.received:
        body = json.loads(received.body)
        run = records[body["data"]["run_id"]]
        end = run["end"]
        assert body == {
            "id": received.headers["flora-webhook-id"],
            "type": received.headers["flora-event"],
            "api_version": "2026-06-11",
            "created_at": end["completed_at"],
            "data": {
                "run_id": run["run_id"],
                "run_type": run["run_type"],
                "workspace_id": "ws_simulator",
                "status": end["status"],
            }
            | {name: end[name] for name in ("error_code", "error_message") if name in end},
        }
        assert body["type"] == f"run.{end['status']}"
        assert received.headers["content-type"] == "application/json"
        assert received.signed_with("whsec_simulator")
        assert not received.signed_with("simulator")
    assert {json.loads(received.body)["data"]["run_type"] for received in receiver.received} == {
        "technique",
        "generation",
    }
    assert [(sent.kind, sent.status) for sent in deliveries] == [("callback", 200)] * 13
    assert all(sent.at_ms >= records[sent.run_id]["end"]["completed_at"] for sent in deliveries)


@pytest.mark.parametrize("failure", [500, 404, 302, 0, None])
async def test_a_refused_callback_is_sent_four_times(
    receiver: Receiver, failure: int | None
) -> None:
    """After anything but a 2xx there are three more attempts, with the same bytes and signature."""
    # Where none is answered, an attempt may be given up before the receiver has seen it: what it
    # does depends on the attempt, and only the last one has time enough for an answer.
    enough = 20
    timeout = 0.05 if failure is None else enough
    options = Options(speed=5000, run_seconds=20, callback_timeout=timeout)
    async with running(options) as simulator:
        attempts = simulator.world.deliveries
        receiver.answer = lambda: failure if len(attempts) < 3 else 200
        run = simulator.start(callback_url=receiver.url)
        await eventually(lambda: len(attempts) == 3, interval=0.005)
        simulator.world.options = replace(options, callback_timeout=enough)
        await simulator.quiet()
    if failure is not None:
        assert len(receiver.received) == 4
    assert len({(sent.body, *sorted(sent.headers.items())) for sent in receiver.received}) == 1
    assert all(sent.path == "/callbacks/flora" for sent in receiver.received)
    assert [sent.number for sent in attempts] == [1, 2, 3, 4]
    assert [sent.status for sent in attempts] == [failure or None] * 3 + [200]
    assert [sent.error is None for sent in attempts] == [bool(failure)] * 3 + [True]
    waits = [after.at_ms - before.at_ms for before, after in pairwise(attempts)]
    assert all(wait >= least for wait, least in zip(waits, (2, 12, 60), strict=True))
    assert {sent.delivery_id for sent in attempts} == {run.draws.delivery_id}


async def test_after_four_attempts_it_gives_up(receiver: Receiver) -> None:
    """A receiver that never accepts a callback is called four times, then no more."""
    receiver.script = [503] * 10
    async with running(Options(speed=5000, run_seconds=20)) as simulator:
        simulator.start(callback_url=receiver.url)
        await simulator.quiet()
    assert len(receiver.received) == 4


async def test_a_receiver_that_is_down_is_an_error_without_status() -> None:
    """Where nothing listens, the attempt is listed with the error's name."""
    async with running(Options(speed=5000, run_seconds=20)) as simulator:
        simulator.start(callback_url="http://127.0.0.1:1/")
        await simulator.quiet()
    assert [(sent.status, sent.error) for sent in simulator.world.deliveries] == [
        (None, "ConnectError")
    ] * 4


async def test_each_workspace_signs_with_its_own_secrets(receiver: Receiver) -> None:
    """A callback carries one signature for each secret of its run's workspace."""
    other = SimulatedWorkspace(
        workspace_id="ws_2", api_key="sk_2", webhook_secret="whsec_a, whsec_b"
    )
    async with running(Options(**QUICK, more_workspaces=(other,))) as simulator:
        simulator.start(callback_url=receiver.url, workspace=other)
        await simulator.quiet()
    (received,) = receiver.received
    assert received.signed_with("whsec_a")
    assert received.signed_with("whsec_b")
    assert not received.signed_with("whsec_simulator")
    assert json.loads(received.body)["data"]["workspace_id"] == "ws_2"


async def test_dropped_callbacks_are_not_sent(receiver: Receiver) -> None:
    """About the configured share of callbacks is dropped, without any attempt."""
    async with running(Options(**QUICK, drop=0.4, duplicate=1)) as simulator:
        runs = [simulator.start(callback_url=receiver.url) for _ in range(100)]
        await simulator.quiet()
    dropped = {run.run_id for run in runs if "drop" in run.faults}
    assert 25 <= len(dropped) <= 55
    sent = [json.loads(received.body)["data"]["run_id"] for received in receiver.received]
    assert set(sent) == {run.run_id for run in runs} - dropped
    assert len(sent) == 2 * (100 - len(dropped))


async def test_a_duplicate_callback_is_identical(receiver: Receiver) -> None:
    """A duplicate follows an accepted callback, with the same identifier and bytes."""
    async with running(Options(**QUICK, duplicate=1)) as simulator:
        simulator.start(callback_url=receiver.url)
        await simulator.quiet()
    first, second = receiver.received
    assert first == second
    assert [sent.kind for sent in simulator.world.deliveries] == ["callback", "duplicate"]


async def test_an_early_callback_comes_before_the_answer_to_the_start(receiver: Receiver) -> None:
    """The run has ended before its start is answered, at times with a stale answer."""
    statuses = set()
    async with running(Options(early=1, failures=0)) as simulator, _client(simulator) as client:
        for number in range(1, 9):
            answer = await client.post("/techniques/icon-pack/runs", json=_body(receiver.url))
            assert len(receiver.received) == number
            assert (
                json.loads(receiver.received[-1].body)["data"]["run_id"] == answer.json()["run_id"]
            )
            statuses.add(answer.json()["status"])
            read = await client.get(f"/runs/{answer.json()['run_id']}")
            assert read.json()["status"] == "completed"
    assert statuses == {"pending", "completed"}


async def test_an_early_callback_that_is_refused_does_not_hold_the_answer(
    receiver: Receiver,
) -> None:
    """The answer waits for the first attempt only."""
    receiver.script = [500]
    async with running(Options(early=1)) as simulator, _client(simulator) as client:
        assert (
            await client.post("/techniques/icon-pack/runs", json=_body(receiver.url))
        ).is_success
    assert len(receiver.received) == 1


async def test_a_late_callback_comes_long_after_the_end(receiver: Receiver) -> None:
    """A late callback leaves three run durations after the end."""
    async with running(Options(**QUICK, late=1)) as simulator:
        run = simulator.start(callback_url=receiver.url)
        await simulator.quiet()
    (sent,) = simulator.world.deliveries
    assert sent.at_ms - run.completed_ms >= 3 * 100


async def test_callbacks_out_of_order_overtake_each_other(receiver: Receiver) -> None:
    """Callbacks that are held back arrive in another order than their runs ended in."""
    async with running(Options(**QUICK, reorder=0.5)) as simulator:
        runs = [simulator.start(callback_url=receiver.url) for _ in range(20)]
        await simulator.quiet()
    ended = [run.run_id for run in sorted(runs, key=lambda run: run.completed_ms)]
    sent = [json.loads(received.body)["data"]["run_id"] for received in receiver.received]
    assert sorted(sent) == sorted(ended)
    assert sent != ended


async def test_a_forged_callback_comes_first_with_the_opposite_status(receiver: Receiver) -> None:
    """A forgery is not signed with the secret, and the true callback follows it."""
    async with running(Options(**QUICK, bad_signature=1)) as simulator:
        simulator.start(callback_url=receiver.url)
        await simulator.quiet()
    forged, true = receiver.received
    assert not forged.signed_with("whsec_simulator")
    assert true.signed_with("whsec_simulator")
    data = [json.loads(sent.body)["data"] for sent in (forged, true)]
    assert data[0]["run_id"] == data[1]["run_id"]
    assert {one["status"] for one in data} == {"completed", "failed"}


def _client(simulator: Simulator) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {simulator.world.options.api_key}"}
    return httpx.AsyncClient(base_url=simulator.base_url, headers=headers)


def _body(callback_url: str) -> dict[str, object]:
    prompt = {"id": "prompt", "type": "text", "value": "tools"}
    return {"inputs": [prompt], "mode": "async", "callback_url": callback_url}
