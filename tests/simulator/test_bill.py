"""The cost of runs, and the cost that reads show: quotes, late bills, corrections, refunds."""

from typing import Any

import pytest

from tests.simulator.conftest import Flora, ServeFlora
from tests.support.clocks import HandClock
from tracker.simulator.runs import MEASURED_FAILURES

END = 30
"""Seconds after which every run has ended."""


async def _run(flora: Flora) -> str:
    run_id: str = (await flora.start()).json()["run_id"]
    return run_id


async def _costs(flora: Flora, run_id: str) -> tuple[float | None, float | None]:
    """The cost in a read of the run and in the list."""
    read = await flora.path(f"/techniques/icon-pack/runs/{run_id}")
    items = (await flora.path("/technique-runs"))["technique_runs"]
    (item,) = (item for item in items if item["run_id"] == run_id)
    return read.get("charged_cost"), item.get("charged_cost")


async def _bill(flora: Flora, run_id: str) -> dict[str, Any]:
    bills = (await flora.path("/simulator/bills"))["bills"]
    (bill,) = (bill for bill in bills if bill["run_id"] == run_id)
    return bill  # type: ignore[no-any-return]


async def test_a_quote_is_not_the_bill(serve_flora: ServeFlora, clock: HandClock) -> None:
    """The start and the running run show a quote, the ended run its bill; neither is the price."""
    flora = await serve_flora(quotes=1, quote_factor=1.012, bill_factor=3.492)
    started = (await flora.start()).json()
    assert started["charged_cost"] == 0.253
    clock.move(8)
    assert await _costs(flora, started["run_id"]) == (0.253, 0.253)
    clock.move(END)
    assert await _costs(flora, started["run_id"]) == (0.873, 0.873)
    bill = await _bill(flora, started["run_id"])
    assert (bill["quote"], bill["bill"], bill["shown"]) == (0.253, 0.873, 0.873)
    generation = (await flora.post("/generate", json={"prompt": "a mug"})).json()
    assert generation["charged_cost"] == pytest.approx(0.04 * 1.012, abs=1e-6)


async def test_quotes_follow_from_the_seed(serve_flora: ServeFlora) -> None:
    """Without a factor they lie on either side of the price, the same for the same seed."""

    async def quotes() -> list[float]:
        flora = await serve_flora(quotes=1)
        return [(await flora.start()).json()["charged_cost"] for _ in range(20)]

    first = await quotes()
    assert first == await quotes()
    assert min(first) < 0.25 < max(first)


@pytest.mark.parametrize("seconds", [5, 60, 600])
async def test_a_bill_comes_late(serve_flora: ServeFlora, clock: HandClock, seconds: int) -> None:
    """At the end no read shows a cost; some time later all do."""
    flora = await serve_flora(late_bills=1, bill_seconds=[seconds], quotes=1, quote_factor=0.29)
    run_id = await _run(flora)
    clock.move((flora.world.runs[run_id].completed_ms - flora.world.now_ms()) / 1000)
    assert await _costs(flora, run_id) == (None, None)
    clock.move(seconds - 1)
    assert await _costs(flora, run_id) == (None, None)
    bill = await _bill(flora, run_id)
    assert (bill["bill"], bill["final"], bill["priced"]) == (0.25, False, True)
    clock.move(1)
    assert await _costs(flora, run_id) == (0.25, 0.25)
    assert (await _bill(flora, run_id))["final"]


async def test_late_bills_take_one_of_several_waits(
    serve_flora: ServeFlora, clock: HandClock
) -> None:
    """Which one follows from the seed, run by run."""
    flora = await serve_flora(late_bills=1, bill_seconds="5,60,600")
    runs = [flora.world.start(flora.world.sample_request("icon-pack")) for _ in range(30)]
    assert {run.bill.final_ms - run.completed_ms for run in runs} == {5_000, 60_000, 600_000}


async def test_a_bill_never_comes(serve_flora: ServeFlora, clock: HandClock) -> None:
    """No read ever shows a cost, although the run has one."""
    flora = await serve_flora(missing_bills=1)
    run_id = await _run(flora)
    clock.move(1_000_000)
    assert await _costs(flora, run_id) == (None, None)
    bill = await _bill(flora, run_id)
    assert (bill["bill"], bill["shown"], bill["priced"]) == (0.25, None, False)


async def test_bills_are_corrected_both_ways(serve_flora: ServeFlora, clock: HandClock) -> None:
    """The first cost is too high or too low; the later one is right."""
    flora = await serve_flora(corrections=1, correction_seconds=3600)
    runs = [await _run(flora) for _ in range(12)]
    clock.move(END)
    first = {(await _costs(flora, run_id))[0] for run_id in runs}
    assert first == {0.2, 0.3125}
    clock.move(3600)
    assert {await _costs(flora, run_id) for run_id in runs} == {(0.25, 0.25)}


@pytest.mark.parametrize(("refund", "shown"), [("zero", 0), ("absent", None)])
async def test_a_failed_run_is_refunded_later(
    serve_flora: ServeFlora, clock: HandClock, refund: str, shown: float | None
) -> None:
    """It shows its quote at first, and nothing or 0 later; it never costs anything."""
    flora = await serve_flora(failures=1, quotes=1, quote_factor=2, late_refunds=1, refund=refund)
    run_id = await _run(flora)
    clock.move(END)
    assert await _costs(flora, run_id) == (0.5, 0.5)
    assert (await _bill(flora, run_id))["bill"] == 0
    clock.move(60)
    assert await _costs(flora, run_id) == (shown, shown)


async def test_outputs_come_late(serve_flora: ServeFlora, clock: HandClock) -> None:
    """At the end a run shows an empty list of outputs or none; some time later all of them."""
    flora = await serve_flora(late_outputs=1, outputs_seconds=8)
    runs = [await _run(flora) for _ in range(12)]
    ends = [flora.world.runs[run_id].completed_ms for run_id in runs]
    clock.move((max(ends) - flora.world.now_ms()) / 1000)
    last = runs[ends.index(max(ends))]
    assert not (await flora.path(f"/runs/{last}")).get("outputs")
    clock.move(8)
    shown = [await flora.path(f"/runs/{run_id}") for run_id in runs]
    assert {len(run["outputs"]) for run in shown} == {4}
    truth = {run["run_id"]: run["end"] for run in flora.world.records()}
    assert all(truth[run["run_id"]] == run for run in shown)


async def test_links_are_signed_anew(serve_flora: ServeFlora, clock: HandClock) -> None:
    """Each read has other links to the same files."""
    flora = await serve_flora(signed_links=True)
    run_id = await _run(flora)
    clock.move(END)
    first, second = [await flora.path(f"/runs/{run_id}") for _ in range(2)]
    links = [[output["url"] for output in run["outputs"]] for run in (first, second)]
    assert not set(links[0]) & set(links[1])
    files = [
        (await flora.get(url)).raise_for_status().content for url in (links[0][0], links[1][0])
    ]
    assert files[0] == files[1]


async def test_failures_may_be_the_measured_ones(serve_flora: ServeFlora, clock: HandClock) -> None:
    """In upper case; some messages name moderation where the code does not."""
    flora = await serve_flora(failures=1, failure_codes="measured", full_progress=True)
    for _ in range(100):
        flora.world.start(flora.world.sample_request("icon-pack"))
    clock.move(END)
    ends = (await flora.path("/technique-runs", limit=100))["technique_runs"]
    assert {end["error_code"] for end in ends} <= {code for code, _ in MEASURED_FAILURES}
    assert len({end["error_code"] for end in ends}) > 20
    assert all(end["progress"] == 100 and end["completed_at"] for end in ends)
    hidden = {end["error_code"] for end in ends if "safety_violations" in end["error_message"]}
    assert hidden == {"GPU_PROVIDER_ERROR", "GENERATION_NO_RESULT"}


async def test_failures_may_be_chosen(serve_flora: ServeFlora, clock: HandClock) -> None:
    """Any codes, also undocumented ones."""
    flora = await serve_flora(failures=1, failure_codes=["LLM_REFUSAL", "NEW_CODE"])
    runs = [await _run(flora) for _ in range(12)]
    clock.move(END)
    ends = [await flora.path(f"/runs/{run_id}") for run_id in runs]
    assert {end["error_code"] for end in ends} == {"LLM_REFUSAL", "NEW_CODE"}
