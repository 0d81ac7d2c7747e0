"""The bill is right: whatever FLORA quotes, bills late, corrects or refunds ends as it billed."""

from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text

from tests.support.clocks import HandClock
from tests.support.shares import shared
from tests.worker.conftest import Hurry, MakeFlora, OpenServices, reads_of, the_run
from tracker.core.record import Record
from tracker.core.run import Tracking
from tracker.core.starts import Budget, Period
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.starting.start import StartRequest
from tracker.store.queries import overview, runs, spending

PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]
HOUR = 3600.0
WRONG_QUOTES = {"quotes": 1.0, "quote_factor": 0.29, "bill_factor": 3.5}


async def start(services: Services, count: int) -> list[str]:
    request = StartRequest(technique="icon-pack", inputs=PROMPT)
    return [(await services.starter.start(request)).record.run.run_id for _ in range(count)]


async def find(services: Services, flora: Simulator, count: int) -> None:
    """So many runs that someone else started are found by a sweep."""
    for _ in range(count):
        flora.start("icon-pack")
    [workspace] = services.workspaces
    await services.sweeper.sweep(workspace)


async def settle_all(services: Services, clock: HandClock) -> None:
    """Poll every few seconds until nothing is active."""
    while (due := await services.poller.next_due_at()) is not None:
        clock.move(max((due - clock()).total_seconds(), 5))
        while (await services.poller.poll_due()).more:
            pass


async def recheck(services: Services, clock: HandClock, *, until: float, every: float = 30) -> None:
    """Let a worker's rounds go on for so many seconds."""
    end = clock() + timedelta(seconds=until)
    while clock() < end:
        clock.move(every)
        while (await services.poller.recheck_due()).more:
            pass


async def records(services: Services, run_ids: Sequence[str]) -> list[Record]:
    return [await the_run(services, run_id) for run_id in run_ids]


def assert_billed(found: Sequence[Record], flora: Simulator) -> None:
    """Each row has FLORA's bill, and says that it is final."""
    for record in found:
        run, truth = record.run, flora.world.runs[record.run.run_id]
        assert float(run.charged_cost or 0) == pytest.approx(truth.bill.amount), run.status
        assert record.cost_final
        assert record.recheck_at is None
        assert not run.conflict


async def test_pages_that_show_nothing_new_of_a_run_add_nothing_to_its_timeline(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """While other runs are polled, each page lists the ended ones, whose bills are not final yet.
    Only what changes is stored: the bill is final in time, and on the way nothing is written."""
    async with make_flora() as flora:
        services = await open_on(flora)
        [run_id] = await start(services, 1)
        await settle_all(services, clock)
        assert not (await the_run(services, run_id)).cost_final
        [workspace] = services.workspaces
        await services.sweeper.sweep(workspace)  # the list names its project
        before = len(await runs.events(services.database, run_id))
        for _ in range(5):
            await start(services, 3)
            clock.move(4)
            await services.poller.poll_due()
            await services.sweeper.sweep(workspace)
        assert reads_of(flora)["runs.list"] > 5
        assert not (await the_run(services, run_id)).cost_final
        assert len(await runs.events(services.database, run_id)) == before
        clock.move(60)
        await services.sweeper.sweep(workspace)
        assert_billed([await the_run(services, run_id)], flora)
        assert len(await runs.events(services.database, run_id)) == before + 1


async def test_a_quote_is_not_the_bill(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """What a start answers stands as the quote; the charge is null until an ended run was read."""
    async with make_flora(**WRONG_QUOTES) as flora:
        services = await open_on(flora)
        [run_id] = await start(services, 1)
        run = (await the_run(services, run_id)).run
        assert run.charged_cost is None
        assert float(run.quoted_cost or 0) == pytest.approx(0.29 * 0.25)
        await settle_all(services, clock)
        record = await the_run(services, run_id)
        assert (record.tracking, record.cost_final) == (Tracking.SETTLED, False)
        await recheck(services, clock, until=90)
        assert_billed([await the_run(services, run_id)], flora)


@pytest.mark.parametrize(
    "late", [60.0, *(pytest.param(late, marks=pytest.mark.thorough) for late in (5.0, 600.0))]
)
async def test_a_late_bill_is_read(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, late: float
) -> None:
    """With wrong quotes, and bills and refunds that come late, every row ends as FLORA billed it;
    the failed ones cost nothing, and none was settled later for it."""
    faults = {"late_bills": 1.0, "late_refunds": 1.0, "bill_seconds": (late,), "failures": 0.3}
    async with make_flora(**WRONG_QUOTES, **faults) as flora:
        services = await open_on(flora)
        run_ids = await start(services, 20)
        await settle_all(services, clock)
        for record in await records(services, run_ids):
            ended = flora.world.runs[record.run.run_id].completed_ms / 1000
            assert record.settled_at is not None
            assert record.settled_at.timestamp() - ended < 45
        await recheck(services, clock, until=max(180, 3 * late))
        found = await records(services, run_ids)
        assert {record.run.status for record in found} == {"completed", "failed"}
        assert_billed(found, flora)


async def test_a_run_that_is_never_billed_stays_unpriced(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A cost that never comes is looked for with growing waits, then given up: null, not final."""
    async with make_flora(quotes=1.0, missing_bills=1.0) as flora:
        services = await open_on(flora)
        [run_id] = await start(services, 1)
        await settle_all(services, clock)
        waits = []
        while (due := (await the_run(services, run_id)).recheck_at) is not None:
            waits.append((due - clock()).total_seconds())
            clock.move(waits[-1])
            assert (await services.poller.recheck_due()).reads == 1
        record = await the_run(services, run_id)
        assert (record.run.charged_cost, record.cost_final) == (None, False)
        assert record.run.quoted_cost is not None
        assert [round(wait, -1) for wait in waits[1:5]] == [120, 240, 480, 960]
        assert len(waits) == 11
        assert sum(waits) == pytest.approx(86_400, abs=60)
        # Spending counts it like the metric, and its price stays in budgets.
        database, price = services.database, record.run.quoted_cost
        _, total = await spending.spending(database, "day")
        assert (total.runs, total.charged, total.quoted, total.unpriced) == (1, 0, price, 1)
        [usage] = await spending.usages(
            database, [Budget(usd=price, period=Period.TOTAL)], now=clock()
        )
        assert (usage.quoted, usage.left) == (price, 0)
        view = text("SELECT quoted, unpriced FROM v_spending_daily")
        async with database.read() as connection:
            [row] = await connection.execute(view)
        assert (Decimal(str(row.quoted)), row.unpriced) == (price, 1)
        counted = await overview.read_gauges(database, now=clock())
        assert sum(counted.unpriced.values()) == 1


async def test_a_bill_is_given_up_by_an_answer_alone(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, hurry: Hurry
) -> None:
    """FLORA is away for longer than bills are waited for: what it shows then is read, and an answer
    without a cost is the last."""
    async with make_flora(late_bills=1.0, bill_seconds=(30.0,), missing_bills=0.5) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        run_ids = await start(services, 6)
        await settle_all(services, clock)
        flora.world.change({"gateway": 1.0, "gateway_works": 0.0})
        give_up = clock() + timedelta(hours=27)
        while clock() < give_up:
            await services.poller.recheck_due()
            clock.move(3 * HOUR)
        assert all(one.recheck_at is not None for one in await records(services, run_ids))
        flora.world.change({"gateway": 0.0})
        await recheck(services, clock, until=6 * HOUR, every=HOUR)
        for record in await records(services, run_ids):
            truth = flora.world.runs[record.run.run_id]
            is_priced = truth.bill.shown(truth.bill.final_ms) is not None
            assert record.cost_final == is_priced
            assert float(record.run.charged_cost or 0) == (truth.cost if is_priced else 0)
            assert record.recheck_at is None


async def test_a_refund_that_shows_no_cost_clears_it(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A failed run that shows its quote first and no cost after its refund costs nothing."""
    faults = {"failures": 1.0, "late_refunds": 1.0, "refund": "absent", "bill_seconds": (30.0,)}
    async with make_flora(quotes=1.0, **faults) as flora:
        services = await open_on(flora)
        [run_id] = await start(services, 1)
        await settle_all(services, clock)
        assert (await the_run(services, run_id)).run.charged_cost is not None
        await recheck(services, clock, until=90)
        record = await the_run(services, run_id)
        assert (record.run.charged_cost, record.cost_final) == (None, True)


@pytest.mark.parametrize("listed", shared([True, False], of=2))
async def test_a_correction_is_seen(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, listed: bool
) -> None:
    """A cost that FLORA corrects, down as well as up, is seen by a single read and by a page."""
    async with make_flora(corrections=1.0, correction_seconds=50.0) as flora:
        services = await open_on(flora)
        run_ids = await start(services, 8)
        await settle_all(services, clock)
        first = [one.run.charged_cost for one in await records(services, run_ids)]
        if listed:
            clock.move(120)
            [workspace] = services.workspaces
            await services.sweeper.sweep(workspace)
        else:
            for workspace in services.workspaces:
                workspace.lists_carry_outputs = False
            await recheck(services, clock, until=120)
        found = await records(services, run_ids)
        assert_billed(found, flora)
        changes = [
            one.run.charged_cost - before
            for one, before in zip(found, first, strict=True)
            if one.run.charged_cost is not None and before is not None
        ]
        assert min(changes) < 0 < max(changes)


@pytest.mark.parametrize("seconds", [pytest.param(8.0, marks=pytest.mark.thorough), 100.0])
async def test_outputs_that_come_after_the_end_are_read(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, seconds: float
) -> None:
    """A run that completed and showed no outputs is settled, and read again until it does."""
    async with make_flora(late_outputs=1.0, outputs_seconds=seconds) as flora:
        services = await open_on(flora)
        run_ids = await start(services, 5)
        await settle_all(services, clock)
        assert any(one.run.lacks_outputs for one in await records(services, run_ids))
        await recheck(services, clock, until=300)
        for record in await records(services, run_ids):
            truth = flora.world.runs[record.run.run_id]
            assert [one.output_id for one in record.run.outputs or ()] == [
                one.output_id for one in truth.outputs
            ]
            assert record.recheck_at is None


async def test_many_bills_share_pages(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Two hundred runs whose bills are due are read again by two pages; a lone run by one read."""
    async with make_flora() as flora:
        services = await open_on(flora)
        await find(services, flora, 200)
        await settle_all(services, clock)
        clock.move(120)
        before = reads_of(flora)
        report = await services.poller.recheck_due()
        assert (report.claimed, report.pages, report.reads, report.more) == (200, 2, 0, False)
        assert sum(reads_of(flora).values()) == sum(before.values()) + 2
        [run_id] = await start(services, 1)
        await settle_all(services, clock)
        clock.move(60)
        report = await services.poller.recheck_due()
        assert (report.pages, report.reads) == (0, 1)
        assert (await the_run(services, run_id)).cost_final


async def test_bills_that_are_late_cost_no_single_reads(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Where the pages show that bills are not there yet, one run is read alone, not each."""
    async with make_flora(late_bills=1.0, bill_seconds=(600.0,)) as flora:
        services = await open_on(flora)
        await find(services, flora, 100)
        await settle_all(services, clock)
        clock.move(60)
        report = await services.poller.recheck_due()
        assert (report.claimed, report.pages, report.reads) == (100, 1, 1)
        clock.move(900)
        assert (await services.poller.recheck_due()).reads == 0


async def test_a_sweep_s_pages_serve_for_the_bill(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A page that a sweep reads a minute after the end makes the cost final: no read is made for
    it."""
    run_ids = await start(services, 20)
    await settle_all(services, clock)
    clock.move(61)
    [workspace] = services.workspaces
    await services.sweeper.sweep(workspace)
    assert_billed(await records(services, run_ids), flora)
    clock.move(3600)
    assert (await services.poller.recheck_due()).claimed == 0


async def test_lists_without_costs_are_found_out(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Where lists carry no details, bills are read alone, and each is right."""
    async with make_flora(history_outputs=False, late_bills=1.0, bill_seconds=(30.0,)) as flora:
        services = await open_on(flora)
        run_ids = await start(services, 10)
        await settle_all(services, clock)
        await recheck(services, clock, until=120)
        assert_billed(await records(services, run_ids), flora)


async def test_one_process_at_a_time_reads_bills_again(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """While one process has read them again, the others leave a workspace's bills alone."""
    one, other = await open_on(flora), await open_on(flora)
    once_per = timedelta(seconds=54)
    await start(one, 3)
    await settle_all(one, clock)
    clock.move(60)
    assert (await one.poller.recheck_due(once_per=once_per)).claimed == 3
    await start(one, 3)
    await settle_all(one, clock)
    clock.move(30)
    assert (await other.poller.recheck_due(once_per=once_per)).claimed == 0
    clock.move(30)
    assert (await other.poller.recheck_due(once_per=once_per)).claimed == 3
