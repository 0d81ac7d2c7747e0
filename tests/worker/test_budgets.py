"""Starts within budgets, against a FLORA that quotes, bills late, fails and answers nothing."""

import asyncio
from decimal import Decimal
from typing import Any

import pytest

from tests.support.clocks import HandClock
from tests.support.logs import capture_logs
from tests.support.waiting import eventually
from tests.worker.conftest import MakeFlora, OpenServices
from tests.worker.test_batch import plan, silent
from tests.worker.test_poll import poll_to_the_end
from tests.worker.test_start import request
from tracker.core.errors import BudgetExceeded, IdempotencyConflict, StartPending
from tracker.core.starts import Period
from tracker.services import Services
from tracker.settings.model import BudgetSettings
from tracker.simulator import Simulator
from tracker.starting.batches import BatchProgress
from tracker.store.queries import runs as read
from tracker.store.queries import spending, starts
from tracker.store.queries.spending import Usage

RED = {"team": "red"}


def of_red(usd: str) -> tuple[BudgetSettings, ...]:
    """A budget of one team, for ever."""
    return (BudgetSettings(usd=Decimal(usd), period=Period.TOTAL, tag=("team", "red")),)


async def usage(services: Services) -> Usage:
    (found,) = await services.budgets.usages()
    return found


async def all_bills(services: Services, clock: HandClock) -> None:
    """Poll until every run has ended and every bill is final."""
    await poll_to_the_end(services, clock, within=900)
    for _ in range(8):
        clock.move(3600)
        await services.poller.recheck_due()


async def test_beyond_a_budget_nothing_is_sent(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """The start is refused by name, what is left and when it begins anew; its key is not kept. The
    next day it is started."""
    services = await open_on(flora, tracker_budget_day="0.60")
    for key in ("a", "b"):
        await services.starter.start(request(key))
    with pytest.raises(BudgetExceeded) as refused:
        await services.starter.start(request("c"))
    told = str(refused.value)
    assert "day:workspace_id=ws_simulator has $0.10 of $0.60 left" in told
    assert "costs $0.25; it starts again at 2026-07-02T00:00:00Z" in told
    assert len(flora.world.runs) == 2
    assert await starts.get(services.database, "ws_simulator", "c") is None
    clock.move(12 * 3600)
    await services.starter.start(request("c"))
    assert len(flora.world.runs) == 3


async def test_many_at_once_over_two_processes_stay_within_it(
    open_on: OpenServices, flora: Simulator
) -> None:
    """Of 30 starts at the same moment exactly the 5 that fit are sent; the same keys again are the
    same runs, and cost nothing."""
    pair = [await open_on(flora, budgets=of_red("1.25")) for _ in range(2)]

    async def start(number: int) -> Any:
        return await pair[number % 2].starter.start(request(f"key-{number}", tags=RED))

    answers = await asyncio.gather(*map(start, range(30)), return_exceptions=True)
    refused = [isinstance(one, BudgetExceeded) for one in answers]
    assert (sum(refused), len(flora.world.runs)) == (25, 5), answers
    kept = [number for number, is_refused in enumerate(refused) if not is_refused]
    for number in kept:
        assert (await start(number)).replayed
    found = await usage(pair[0])
    assert (found.reserved, found.quoted, found.left) == (0, Decimal("1.25"), 0)


@pytest.mark.parametrize("bill_factor", [pytest.param(1.0, marks=pytest.mark.thorough), 3.5])
async def test_sums_agree_with_floras_bill(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, bill_factor: float
) -> None:
    """Quotes that are off, late bills and refunds, failed runs and a colleague's: when every bill
    is final, what was spent is what FLORA charged, above the budget where bills were."""
    faults = {"failures": 0.4, "late_refunds": 0.5, "late_bills": 0.5, "quotes": 0.7, "seed": 5}
    async with make_flora(**faults, bill_factor=bill_factor) as flora:
        services = await open_on(flora, tracker_budget_month="3.00")
        for number in range(10):
            await services.starter.start(request(f"key-{number}", tags={"n": str(number % 3)}))
        flora.start()
        await services.sweeper.sweep(next(iter(services.workspaces)))
        await all_bills(services, clock)
        truth = round(Decimal(str(sum(run.cost for run in flora.world.runs.values()))), 6)
        found = await usage(services)
        assert (found.charged, found.reserved) == (truth, 0)
        assert found.quoted == 0, found
        assert (found.left > 0) == (truth < 3)
        for by in ("day", "technique", "tag:n"):
            rows, total = await spending.spending(services.database, by)
            assert sum(row.charged for row in rows) == total.charged == truth
            assert total.runs == len(flora.world.runs)


async def test_failed_runs_make_room(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A run that failed keeps its share until its bill is final; then another start fits."""
    late: dict[str, Any] = {"failures": 1.0, "late_refunds": 1.0, "bill_seconds": (3600.0,)}
    async with make_flora(**late) as flora:
        services = await open_on(flora, budgets=of_red("0.25"))
        await services.starter.start(request("a", tags=RED))
        await poll_to_the_end(services, clock, within=900)
        with pytest.raises(BudgetExceeded):
            await services.starter.start(request("b", tags=RED))
        await all_bills(services, clock)
        await services.starter.start(request("b", tags=RED))


async def test_doubt_keeps_its_share(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A start that may have reached FLORA takes room until someone says that it did not."""
    async with make_flora(gateway_starts=1.0, gateway_works=0.0) as flora:
        services = await open_on(flora, budgets=of_red("0.25"))
        with pytest.raises(StartPending):
            await services.starter.start(request("a", tags=RED), wait_in_doubt=False)
        flora.world.change({"gateway_starts": 0.0})
        assert (await usage(services)).reserved == Decimal("0.25")
        with pytest.raises(BudgetExceeded):
            await services.starter.start(request("b", tags=RED))
        row = await services.resolver.find("a")
        await services.resolver.is_nothing(row)
        await services.starter.start(request("b", tags=RED))
        assert len(flora.world.runs) == 1


async def test_what_flora_refuses_is_given_back(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """A refusal in FLORA's own words costs nothing."""
    async with make_flora(credits=0.0) as flora:
        services = await open_on(flora, budgets=of_red("0.25"))
        for _ in range(2):
            with pytest.raises(Exception, match="insufficient_credits"):
                await services.starter.start(request("a", tags=RED))
        assert (await usage(services)).left == Decimal("0.25")


async def test_tags_stay_with_start_and_run(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """They are kept with both and found by; the same key with other tags is another request."""
    services = await open_on(flora)
    tags = {"team": "red", "order": "a=b"}
    run = (await services.starter.start(request("a", tags=tags))).record
    assert run.tags == tags
    assert run.reserved_cost == Decimal("0.25")
    await services.starter.start(request("b", tags={"team": "blue"}))
    row = await starts.get(services.database, "ws_simulator", "a")
    assert row is not None
    assert (row.tags, row.reserved_cost) == (tags, Decimal("0.25"))
    for tag in ("team=red", "order=a=b"):
        found, _ = await read.list_runs(services.database, tag=tag)
        assert [one.run.run_id for one in found] == [run.run.run_id]
    project = flora.world.options.project_id
    await poll_to_the_end(services, clock, within=900)
    found, _ = await read.list_runs(services.database, tag="team=red", project_id=project)
    assert len(found) == 1
    assert (await read.list_runs(services.database, project_id="prj_other"))[0] == []
    with pytest.raises(IdempotencyConflict, match="other tags"):
        await services.starter.start(request("a", tags=RED))


async def test_a_batch_stops_at_a_budget_and_goes_on_when_it_begins_anew(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """The rows that fit are started, the others, whose number is logged, when the command is
    repeated later; or it waits."""
    services = await open_on(flora, tracker_budget_day="0.50")
    planned = await plan(services, "a", "b", "c", tags=RED)
    run = services.batches.run
    with capture_logs() as lines:
        outcome = await run(planned, concurrency=1, wait=False, on_progress=silent)
    assert isinstance(outcome.stopped, BudgetExceeded)
    assert [row.status for row in outcome.rows] == ["pending", "pending", "not_started"]
    assert [line["left"] for line in lines if line["event"] == "batch.stopped"] == [1]

    told: list[BatchProgress] = []

    async def moves(seconds: float) -> None:
        clock.move(3600)
        await asyncio.sleep(0)

    services.batches.sleep = moves
    planned = await plan(services, "a", "b", "c", tags=RED)
    outcome = await run(
        planned, concurrency=1, wait=False, on_progress=told.append, wait_for_budget=True
    )
    assert outcome.stopped is None
    assert len(flora.world.runs) == 3
    assert clock().day == 2
    assert {one.record.tags["team"] for one in outcome.rows if one.record} == {"red"}  # type: ignore[index]


async def test_a_batch_that_waits_for_a_budget_settles_its_doubts(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A start in doubt holds room: what became of it is found out while another row waits for it,
    and not the next day."""
    async with make_flora(gateway_starts=1.0, gateway_works=0.0) as flora:
        services = await open_on(flora, tracker_budget_day="0.25")
        settled: list[bool] = []

        async def moves(seconds: float) -> None:
            flora.world.change({"gateway_starts": 0.0})
            settled.append(clock().day == 1 and len(flora.world.runs) == 1)
            clock.move(12 * 3600 if settled[-1] else 600)
            await asyncio.sleep(0.01)

        services.batches.sleep = moves
        planned = await plan(services, "a", "b", tags=RED)
        running = services.batches.run(
            planned, concurrency=1, wait=True, on_progress=silent, wait_for_budget=True
        )
        batch = asyncio.create_task(running)
        await eventually(lambda: len(flora.world.runs) == 2)
        batch.cancel()
        await asyncio.wait([batch])
        assert any(settled)


async def test_a_batch_does_not_wait_for_what_never_fits(
    open_on: OpenServices, flora: Simulator
) -> None:
    """A price above the whole budget, or a budget that never begins anew, ends it all the same."""
    for budget in ({"tracker_budget_day": "0.20"}, {"budgets": of_red("0.20")}):
        services = await open_on(flora, **budget)
        planned = await plan(services, "a", tags=RED)
        outcome = await services.batches.run(
            planned, concurrency=1, wait=True, on_progress=silent, wait_for_budget=True
        )
        assert isinstance(outcome.stopped, BudgetExceeded)
