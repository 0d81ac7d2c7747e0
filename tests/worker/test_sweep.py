"""Sweeping the history: whatever FLORA lists is here afterwards, at the price of few pages."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.clocks import HandClock
from tests.support.waiting import eventually
from tests.worker.conftest import (
    Hurry,
    MakeFlora,
    OpenServices,
    assert_true_to,
    on_history,
    reads_of,
    the_run,
)
from tracker.core.observation import Source
from tracker.core.run import Tracking
from tracker.polling.sweep import LEASE, SweepReport
from tracker.services import Services
from tracker.settings import WorkspaceSettings
from tracker.simulator import SimulatedWorkspace, Simulator
from tracker.store import coordination
from tracker.store.queries import runs as read
from tracker.store.queries import sweeps as coverage
from tracker.store.schema import leases, sweeps

A_LOOK = 1
"""The page on which a first sweep looks whether there are generation runs."""


async def sweep(services: Services, since: timedelta | None = None) -> SweepReport:
    [workspace] = services.workspaces
    return await services.sweeper.sweep(workspace, since=since)


async def sweep_rows(services: Services) -> list[sa.Row]:  # type: ignore[type-arg]
    async with services.database.read() as connection:
        return list(await connection.execute(sa.select(sweeps).order_by(sweeps.c.id)))


async def test_runs_found_only_there_are_adopted(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Runs that nobody told us of are in the database after one sweep, whole."""
    ended = [flora.start() for _ in range(3)]
    clock.move(60)
    going = flora.start()
    report = await sweep(services)
    assert (report.error, report.items, report.discovered) == (None, 4, 4)
    for run in ended:
        record = await the_run(services, run.run_id)
        assert (record.source, record.ended_via) == (Source.HISTORY, Source.HISTORY)
        assert record.tracking is Tracking.SETTLED
        assert_true_to(record, flora)
    assert (await the_run(services, going.run_id)).tracking is Tracking.ACTIVE


async def test_durations_are_read_for_runs_that_have_not_ended_alone(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """They say when to poll next: a page of ended runs asks for none."""
    ended = flora.start()
    technique = ended.technique.technique_id
    clock.move(60)
    await sweep(services)
    assert services.sweeper.durations.of(technique) is None
    flora.start()
    await sweep(services)
    known = services.sweeper.durations.of(technique)
    assert known is not None
    assert known.count == 1


async def test_an_end_that_was_missed_is_repaired(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A known run that ended unseen is settled by the sweep, and counted as repaired."""
    run = flora.start()
    await sweep(services)
    clock.move(60)
    report = await sweep(services)
    assert (report.discovered, report.repaired) == (0, 1)
    assert_true_to(await the_run(services, run.run_id), flora)


async def test_the_first_sweep_goes_far_back_and_the_next_does_not(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The first sweep reads all pages within a week; one with nothing new costs one page."""
    for _ in range(250):
        flora.start()
        clock.move(30)
    clock.move(60)
    first = await sweep(services)
    assert (first.error, first.pages, first.items) == (None, 3 + A_LOOK, 250)
    asked = reads_of(flora)
    second = await sweep(services)
    assert (second.error, second.pages) == (None, 1)
    assert sum(reads_of(flora).values()) == sum(asked.values()) + 1


async def test_after_a_burst_sweeps_cost_one_page_again(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Three hundred runs within seconds are read again while one of them may be listed late; once
    that was looked for, a sweep that finds nothing new costs one page."""
    for _ in range(300):
        flora.start()
        clock.move(0.02)
    clock.move(60)
    assert (await sweep(services)).pages == 4 + A_LOOK
    clock.move(90)
    assert (await sweep(services)).pages == 4
    clock.move(60)
    assert (await sweep(services)).pages == 1


async def test_a_run_that_is_listed_late_is_found(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run that the list shows two minutes after its start, below newer ones, is not missed."""
    late = flora.start()
    for _ in range(250):
        clock.move(0.02)
        flora.start()
    flora.world.deleted.add(late.run_id)
    await sweep(services)
    clock.move(110)
    await sweep(services)
    flora.world.deleted.clear()
    clock.move(300)
    assert (await sweep(services)).discovered == 1
    assert_true_to(await the_run(services, late.run_id), flora)
    assert (await sweep(services)).pages == 1


async def test_history_older_than_asked_for_is_left_alone(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """The first sweep stops behind TRACKER_HISTORY_SINCE; one that goes further back by hand makes
    no later one do so."""
    for _ in range(300):
        flora.start()
        clock.move(60)
    services = await open_on(flora, tracker_history_since=timedelta(hours=1))
    report = await sweep(services)
    assert (report.error, report.pages) == (None, 1 + A_LOOK)
    assert (await sweep(services, timedelta(days=1))).discovered == 200
    assert (await sweep(services)).pages == 1


async def test_a_failed_sweep_covers_nothing(
    services: Services, flora: Simulator, clock: HandClock, hurry: Hurry
) -> None:
    """A sweep that FLORA does not answer is logged as failed, and the next reads everything."""
    for _ in range(150):
        flora.start()
        clock.move(30)
    hurry(services, flora)
    flora.world.options = flora.world.options.with_changes({"cut": 1.0})
    broken = await sweep(services)
    flora.world.options = flora.world.options.with_changes({"cut": 0.0})
    assert broken.error is not None
    whole = await sweep(services)
    assert (whole.error, whole.items) == (None, 150)
    first, second = await sweep_rows(services)
    assert (first.error, first.pages) == (broken.error, 0)
    assert (second.error, second.pages, second.items, second.discovered) == (
        None,
        2 + A_LOOK,
        150,
        150,
    )
    assert second.finished_at is not None


async def test_a_short_sweep_by_hand_leaves_no_gap(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """`reconcile --since 1h` after a long outage does not make the next sweep start there."""
    await sweep(services)
    missed = [flora.start() for _ in range(120)]
    clock.move(5 * 3600)
    for _ in range(110):
        flora.start()
    clock.move(60)
    by_hand = await sweep(services, timedelta(hours=1))
    assert by_hand.error is None
    scheduled = await sweep(services)
    assert by_hand.discovered + scheduled.discovered == 230
    for run in missed:
        await the_run(services, run.run_id)


async def test_an_old_stuck_run_makes_no_sweep_long(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run that never ends is polled alone; no sweep goes back for it."""
    stuck = flora.start()
    flora.world.runs[stuck.run_id] = replace(stuck, completed_ms=stuck.completed_ms + 10**9)
    for _ in range(220):
        clock.move(60)
        flora.start()
    clock.move(60)
    assert (await sweep(services)).pages == 3 + A_LOOK
    assert (await sweep(services)).pages == 1


async def test_runs_that_start_meanwhile_do_not_hide_others(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Runs pushed to the next page by new ones are seen twice, never skipped."""
    for _ in range(180):
        flora.start()
        clock.move(1)
    growing = True

    async def grow(_: list[str]) -> None:
        for _ in range(7 if growing else 0):
            flora.start()

    on_history(services, grow)
    assert (await sweep(services)).error is None
    growing = False
    await sweep(services)
    for run_id in flora.world.runs:
        await the_run(services, run_id)


async def test_generations_are_swept_once_one_was_shown(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The list of generation runs is looked at once a day, and swept once there is one."""
    await sweep(services)
    assert reads_of(flora)["generations.list"] == 1
    await sweep(services)
    assert reads_of(flora)["generations.list"] == 1
    run = flora.start_generation()
    clock.move(24 * 3600 + 1)
    await sweep(services)
    assert_true_to(await the_run(services, run.run_id), flora)
    await sweep(services)
    assert reads_of(flora)["generations.list"] == 3, "the run was shown, so it is swept"


async def test_one_sweep_at_a_time(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """Of two processes that sweep one workspace at the same moment, one does."""
    one, other = await open_on(flora), await open_on(flora)
    flora.start()

    async def until_the_other_is_done(_: list[str]) -> None:
        await asyncio.wait(sweeps, timeout=10, return_when=asyncio.FIRST_COMPLETED)

    for services in (one, other):
        on_history(services, until_the_other_is_done)
    sweeps = [asyncio.create_task(sweep(services)) for services in (one, other)]
    reports = await asyncio.gather(*sweeps)
    assert sorted(report.skipped for report in reports) == [False, True]
    assert not (await sweep(other)).skipped


async def test_a_sweep_begins_when_it_holds_the_lease(
    services: Services, flora: Simulator, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waited for it while another process finished is not logged as beside that one."""
    take = coordination.take_lease

    async def waits(*args: Any, **named: Any) -> bool:
        clock.move(10)
        return await take(*args, **named)

    began = clock()
    with monkeypatch.context() as patched:
        patched.setattr(coordination, "take_lease", waits)
        await sweep(services)
    [row] = await sweep_rows(services)
    assert row.started_at >= began + timedelta(seconds=10)
    assert row.finished_at >= row.started_at


async def test_a_workspace_learns_its_id(services: Services, flora: Simulator) -> None:
    """The id of a workspace that was not given is learnt from the history, and the start log has
    it."""
    flora.start()
    await sweep(services)
    [workspace] = services.workspaces
    assert workspace.workspace_id == flora.world.options.workspace_id
    assert [row.workspace_id for row in await sweep_rows(services)] == [workspace.workspace_id]


async def test_a_key_that_is_replaced_and_comes_back_is_of_the_same_workspace(
    services: Services, flora: Simulator
) -> None:
    """The id is known again, also where nothing is listed, and coverage is stored under it."""
    [workspace] = services.workspaces
    known = await services.workspaces.id_of(workspace)
    for key in ("sk_test_wrong", flora.world.options.api_key):
        services.workspaces.rotate("default", api_key=key, secrets=())
        assert workspace.workspace_id is None
    assert await services.workspaces.id_of(workspace) == known
    await sweep(services)
    covered = await coverage.everything(services.database)
    assert {workspace_id for workspace_id, _ in covered} == {known}


async def test_sweeps_before_the_id_is_known_become_those_of_the_workspace(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """A first sweep may find no run that names the workspace, and older versions stored a
    placeholder. None of them is left to grow older for ever, and each process learns the id."""
    async with make_flora(refuse={"workspaces.list": "not_found"}) as flora:
        services, other = await open_on(flora), await open_on(flora)
        await sweep(services)
        assert [row.workspace_id for row in await sweep_rows(services)] == [None]
        counts = dict.fromkeys(("pages", "items", "discovered", "repaired", "unreadable"), 0)
        old = {"workspace_id": "default", "started_at": services.clock(), **counts}
        await services.database.execute(sa.insert(sweeps).values(old))
        flora.start()
        await sweep(services)
        known = flora.world.options.workspace_id
        assert [row.workspace_id for row in await sweep_rows(services)] == [known] * 3
        await other.contacts.read()
        assert [one.workspace_id for one in other.workspaces] == [known]


async def test_each_workspace_is_swept_with_its_own_key(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Two workspaces, two keys: each run is found under its own workspace."""
    second = SimulatedWorkspace(
        workspace_id="ws_two", api_key="sk_test_two", webhook_secret="whsec_two"
    )
    async with make_flora(more_workspaces=(second,)) as flora:
        services = await open_on(
            flora,
            flora_workspace_id=flora.world.options.workspace_id,
            workspaces=(WorkspaceSettings(id="ws_two", api_key="sk_test_two"),),
        )
        mine, theirs = flora.start(), flora.start(workspace=second)
        clock.move(60)
        reports = [await services.sweeper.sweep(workspace) for workspace in services.workspaces]
        assert [report.discovered for report in reports] == [1, 1]
        assert (await the_run(services, theirs.run_id)).run.workspace_id == "ws_two"
        assert (await the_run(services, mine.run_id)).run.workspace_id != "ws_two"


async def test_faults_of_flora_end_a_sweep_as_failed_or_whole(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, hurry: Hurry
) -> None:
    """Under 500s and cut connections a sweep is whole or says that it failed; the last one is
    whole."""
    async with make_flora(errors=0.2, cut=0.2, retry_after=0) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        for _ in range(250):
            flora.start()
        clock.move(60)
        report = await sweep(services)
        known, _ = await read.list_runs(services.database, limit=100)
        assert (report.error is None) == (report.items == 250)
        flora.world.options = flora.world.options.with_changes({"errors": 0, "cut": 0})
        assert (await sweep(services)).error is None
        for run_id in flora.world.runs:
            await the_run(services, run_id)
        assert len(known) <= 100


async def test_a_sweep_that_was_taken_over_ends(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A process that stood still until its lease ran out leaves the sweep to who has it now."""
    for _ in range(150):
        flora.start()
        clock.move(1)
    [workspace] = services.workspaces
    lease = f"sweep:{workspace.place}"
    pages = 0

    async def halt(_: list[str]) -> None:
        nonlocal pages
        pages += 1
        if pages == 2:
            clock.move(LEASE.total_seconds() + 1)
            assert await coordination.take_lease(
                services.database, lease, "another", clock(), LEASE
            )

    on_history(services, halt)
    report = await sweep(services)
    assert (report.items > 0, report.error is None) == (True, False)
    [row] = await sweep_rows(services)
    assert (row.error, row.through) == (report.error, None)
    assert not await coordination.take_lease(services.database, lease, "third", clock(), LEASE)


async def test_a_sweep_that_waits_for_flora_stays_alone(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """However long a page takes, nobody else begins a sweep; what a dead one held is free within
    two minutes."""
    flora.start()
    [workspace] = services.workspaces
    lease = f"sweep:{workspace.place}"
    take = partial(coordination.take_lease, services.database, lease, "another")
    until = sa.select(leases.c.until).where(leases.c.name == lease)

    async def renewed() -> bool:
        async with services.database.read() as connection:
            return (await connection.execute(until)).scalar_one() == clock() + LEASE

    async def wait(_: list[str]) -> None:
        for _ in range(3):
            clock.move(LEASE.total_seconds() * 0.9)
            await eventually(renewed)
        assert not await take(clock(), LEASE)

    on_history(services, wait)
    services.sweeper.renew_after = 0.01
    assert (await sweep(services)).error is None
    assert await take(clock(), LEASE)
    assert timedelta(minutes=2) > LEASE


async def held_leases(services: Services) -> list[str]:
    async with services.database.read() as connection:
        found = await connection.execute(sa.select(leases.c.name))
        return [name for name in found.scalars() if name.startswith("sweep:")]


async def test_a_sweep_that_is_cancelled_as_it_drops_its_lease_drops_it(
    services: Services, flora: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is told to stop just then leaves no lease for which the next one waits."""
    dropping = asyncio.Event()
    write = services.database.write

    async def waits(work: Any) -> Any:
        dropping.set()
        await asyncio.sleep(0.05)
        return await write(work)

    async def drops(*args: Any) -> None:
        monkeypatch.setattr(services.database, "write", waits)
        await drop(*args)

    drop = coordination.drop_lease
    monkeypatch.setattr(coordination, "drop_lease", drops)
    sweeping = asyncio.create_task(sweep(services))
    await dropping.wait()
    sweeping.cancel()
    await asyncio.wait([sweeping])
    assert await held_leases(services) == []


async def test_a_sweep_that_is_cancelled_as_it_takes_its_lease_drops_it(
    services: Services, flora: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is committed, and the sweep is told to stop before it knows: another process can
    sweep at once."""
    taken = asyncio.Event()
    take = coordination.take_lease

    async def takes_long(*args: Any, **more: Any) -> bool:
        held = await take(*args, **more)
        taken.set()
        await asyncio.Event().wait()
        return held

    monkeypatch.setattr(coordination, "take_lease", takes_long)
    sweeping = asyncio.create_task(sweep(services))
    await taken.wait()
    sweeping.cancel()
    await asyncio.wait([sweeping])
    assert await held_leases(services) == []


async def test_a_sweep_that_is_cancelled_as_it_ends_drops_its_lease(
    services: Services, flora: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to stop while the last renewal, which may take the lease again, comes to its
    end."""
    flora.start()
    renewing, ending = asyncio.Event(), asyncio.Event()
    take = coordination.take_lease

    async def takes(*args: Any, **more: Any) -> bool:
        if asyncio.current_task() is sweeping:
            return await take(*args, **more)
        renewing.set()
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await asyncio.sleep(0.05)
            await take(*args, **more)

    monkeypatch.setattr(coordination, "take_lease", takes)
    services.sweeper.renew_after = 0.0

    async def wait(_: list[str]) -> None:
        await renewing.wait()

    on_history(services, wait)
    sweeping = asyncio.create_task(sweep(services))
    await ending.wait()
    sweeping.cancel()
    await asyncio.wait([sweeping])
    assert await held_leases(services) == []
