"""`verify` says what is not the same here and at FLORA, and changes nothing."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
import sqlalchemy as sa

from tests.support.clocks import HandClock
from tests.worker.conftest import MakeFlora, OpenServices
from tests.worker.test_coverage import SPAN
from tests.worker.test_sweep import sweep
from tracker.polling.verify import VerifyReport
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.store.schema import run_outputs, runs, sweeps

DAYS = timedelta(days=30)


async def verify(services: Services, since: timedelta = DAYS) -> VerifyReport:
    [workspace] = services.workspaces
    return await services.verifier.verify(workspace, since=since)


async def execute(services: Services, *statements: sa.Executable) -> None:
    def work(connection: sa.Connection) -> None:
        for statement in statements:
            connection.execute(statement)

    await services.database.write(work)


async def settled(services: Services, clock: HandClock) -> None:
    """Swept, and every bill read for the last time."""
    await sweep(services)
    for _ in range(3):
        clock.move(300)
        await services.poller.poll_due()
        while (await services.poller.recheck_due()).more:
            pass


async def test_where_all_is_the_same_nothing_is_found(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Technique runs and generations, ended, failed and under way, over several pages: the same."""
    async with make_flora(history=240, history_seconds=SPAN, failures=0.2) as flora:
        services = await open_on(flora)
        flora.start_generation()
        flora.start()
        await settled(services, clock)
        flora.start()
        verdict = await verify(services)
        assert (verdict.error, verdict.differences) == (None, [])
        assert (verdict.compared, verdict.good) == (243, True)


async def test_a_history_that_cannot_be_read_makes_the_verdict_bad(
    services: Services, flora: Simulator
) -> None:
    """It is said which, and why."""
    flora.world.change({"api_key": "sk_test_another"})
    verdict = await verify(services)
    assert (verdict.good, verdict.differences) == (False, [])
    assert verdict.error is not None
    assert verdict.error.startswith("technique runs: FLORA answered 401")


async def test_each_difference_is_named(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run that is missing here, another status, cost or output, and one that FLORA does not list:
    each is named once, and nothing is changed by it."""
    made = [flora.start().run_id for _ in range(6)]
    clock.move(60)
    await settled(services, clock)
    gone, status, cost, output, denied, same = made
    await execute(
        services,
        sa.delete(runs).where(runs.c.run_id == gone),
        sa.update(runs).where(runs.c.run_id == cost).values(charged_cost=Decimal("99.5")),
        sa.update(run_outputs).where(run_outputs.c.run_id == output).values(output_id="other"),
    )
    truth = flora.world.runs[status]
    flora.world.runs[status] = replace(truth, error_code="model_timeout", outputs=())
    flora.world.delete({denied})
    for _ in range(2):
        verdict = await verify(services)
        found = {one.run_id: one.problem for one in verdict.differences}
        assert all(one.created_at.endswith("Z") for one in verdict.differences)
        assert verdict.since.endswith("Z")
        assert found.pop(status) in ("status", "outputs", "cost")
        assert found == {gone: "missing", cost: "cost", output: "outputs", denied: "not_listed"}
        assert not verdict.good
    assert same not in found
    async with services.database.read() as connection:
        log = (await connection.execute(sa.select(sa.func.count()).select_from(sweeps))).scalar()
    assert log == 1


async def test_a_run_that_is_final_here_is_compared_however_young(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """One that is unknown, or whose bill is to be read again, may still change by itself."""
    final, open_bill = [flora.start().run_id for _ in range(2)]
    clock.move(60)
    await sweep(services)
    clock.move(100)
    while (await services.poller.recheck_due()).more:
        pass
    clock.move(1)
    flora.start()
    changed = {"charged_cost": Decimal("99.5")}
    await execute(
        services,
        sa.update(runs).values(changed),
        sa.update(runs).where(runs.c.run_id == open_bill).values(recheck_at=clock()),
    )
    verdict = await verify(services)
    assert [(one.run_id, one.problem) for one in verdict.differences] == [(final, "cost")]
    assert (verdict.compared, verdict.unsettled) == (3, 2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("run_id", "technique_run_id"), "an item of the list cannot be read: the run has no"),
        (("status",), "without a status"),
    ],
)
async def test_an_item_that_cannot_be_compared_makes_the_verdict_bad(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    fields: tuple[str, ...],
    said: str,
) -> None:
    """It is said that an item could not be read; the others are compared, and no run that is here
    counts as missing there."""
    async with make_flora(bad_fields=fields) as flora:
        services = await open_on(flora)
        runs = [flora.start() for _ in range(12)]
        clock.move(3600)
        await sweep(services)
        clock.move(3600)
        assert (await verify(services)).good
        flora.world.change({"bad_runs": [runs[5].run_id]})
        verdict = await verify(services)
        assert verdict.error is not None
        assert said in verdict.error
        assert (verdict.differences, verdict.good) == ([], False)
        assert verdict.compared >= 11


async def test_what_retention_removed_is_no_difference(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A removed run that FLORA still lists is counted as removed; a page that cannot be read makes
    the verdict bad."""
    async with make_flora() as flora:
        services = await open_on(flora)
        run = flora.start()
        clock.move(60)
        await settled(services, clock)
        await sweep(services)
        clock.move(100 * 86_400)
        from tests.worker.test_retention import AGES, no_pause

        services.pruner.sleep = no_pause
        assert (await services.pruner.prune(AGES))["runs"] == 1
        verdict = await verify(services, timedelta(days=365))
        assert (verdict.good, verdict.removed, verdict.compared) == (True, 1, 1)
        flora.world.change({"bad_runs": [run.run_id]})
        assert (await verify(services, timedelta(days=365))).error is not None
