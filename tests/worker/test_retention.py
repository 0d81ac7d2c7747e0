"""What retention removed does not come back by itself, and nothing is paid for again."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import pytest
import sqlalchemy as sa

from tests.support.clocks import HandClock
from tests.web.callbacks import event
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tests.worker.test_batch import batch, begun, statuses
from tests.worker.test_poll import poll_to_the_end, start
from tests.worker.test_replay import body, keep
from tests.worker.test_sweep import sweep
from tracker.core.errors import StartUnresolved
from tracker.core.record import DeliveryOutcome, Entry
from tracker.core.run import Tracking
from tracker.flora.callback import sign
from tracker.operations.retention import Ages
from tracker.receiving.apply import APPLIED_BEFORE
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.starting.rows import Retry
from tracker.starting.start import StartRequest
from tracker.store.queries import runs as read
from tracker.store.queries.spending import spending
from tracker.store.writing import rollups
from tracker.store.writing.writer import WriteResult

AGES = Ages(runs=timedelta(days=90), bodies=timedelta(days=30))
AGES_OF_BODIES = Ages(runs=timedelta(days=900), bodies=timedelta(days=30))
LATER = 100 * 86_400


async def no_pause(_: float) -> None:
    await asyncio.sleep(0)


async def prune(services: Services, clock: HandClock) -> dict[str, int]:
    """The history is swept, and a quarter later what has settled until now goes."""
    clock.move(300)
    await sweep(services)
    clock.move(LATER)
    services.pruner.sleep = no_pause
    return await services.pruner.prune(AGES)


async def known(services: Services) -> set[str]:
    records, _ = await read.list_runs(services.database)
    return {record.run.run_id for record in records}


async def stored_rollups(services: Services) -> dict[str, int]:
    """How many runs each measure counts."""
    statement = sa.text(
        "SELECT measure, CAST(sum(runs) AS bigint) AS runs FROM run_tallies_now"
        " WHERE measure IN ('state', 'end', 'cost', 'seen') GROUP BY measure"
    )
    async with services.database.read() as connection:
        return {row.measure: row.runs for row in await connection.execute(statement)}


async def test_what_was_never_here_is_news(
    open_on: OpenServices, make_flora: MakeFlora, clock: HandClock
) -> None:
    """Where retention has removed runs, older ones that no sweep had ever read are found by one
    that is asked to go back so far, and the removed ones are not, but for a few where it ended."""
    async with make_flora(history=150, history_seconds=60 * 86_400) as flora:
        services = await open_on(flora)
        assert (await prune(services, clock))["runs"] == 100
        report = await sweep(services, timedelta(days=365))
        assert report.items == 150
        assert 50 <= report.discovered <= 55


async def test_a_run_whose_bill_could_not_be_read_stays(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """FLORA could not be read again after the end: the run is removed when its bill is final."""
    async with make_flora(late_bills=1.0, bill_seconds=(3600.0,)) as flora:
        services = await open_on(flora)
        [run_id] = await start(services)
        await poll_to_the_end(services, clock, within=120)
        assert (await the_run(services, run_id)).run.charged_cost is None
        assert (await prune(services, clock))["runs"] == 0
        await services.poller.recheck_due()
        record = await the_run(services, run_id)
        assert (record.cost_final, record.recheck_at) == (True, None)
        assert (await services.pruner.prune(AGES))["runs"] == 1


async def test_a_run_that_was_never_billed_goes_but_stays_in_spending(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Its bill was given up, so nothing more is read of it; spending still has it as unpriced."""
    async with make_flora(missing_bills=1.0) as flora:
        services = await open_on(flora)
        [run_id] = await start(services)
        await poll_to_the_end(services, clock, within=120)
        while (await the_run(services, run_id)).recheck_at is not None:
            clock.move(3600)
            await services.poller.recheck_due()
        await rollups.compact(services.database)
        before = await spending(services.database, "day")
        assert before[1].unpriced == 1
        assert (await prune(services, clock))["runs"] == 1
        assert await spending(services.database, "day") == before


async def test_a_sweep_does_not_bring_it_back(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The history lists a removed run as before: no sweep discovers it, not even one that was asked
    to go back so far, and what is new is found."""
    await start(services, 3)
    await poll_to_the_end(services, clock, within=120)
    assert (await prune(services, clock))["runs"] == 3
    new = flora.start()
    for since in (None, timedelta(days=365)):
        report = await sweep(services, since)
        assert report.error is None
        assert await known(services) == {new.run_id}
    assert (report.items, report.discovered) == (4, 0)


async def test_a_page_read_for_others_does_not_either(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Runs that are due are read by pages, which show the removed ones beside them."""
    await start(services, 2)
    await poll_to_the_end(services, clock, within=120)
    await prune(services, clock)
    new = await start(services, 3)
    await poll_to_the_end(services, clock, within=120)
    assert await known(services) == set(new)


@pytest.mark.parametrize("reads", ["sweep", "poll", "again"])
async def test_what_was_read_before_does_not_either(
    services: Services,
    flora: Simulator,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
    reads: str,
) -> None:
    """A run that is removed between its read, singly or on a page, and the write: it is not
    discovered, and its end and its cost count once."""
    await start(services, 3)
    await poll_to_the_end(services, clock, within=120)
    clock.move(300)
    await sweep(services)
    counted = await stored_rollups(services)
    clock.move(LATER)
    services.pruner.sleep = no_pause
    submit_all, removed = services.writer.submit_all, []

    async def submit_late(entries: Sequence[Entry]) -> list[WriteResult]:
        removed.append((await services.pruner.prune(AGES))["runs"])
        return await submit_all(entries)

    monkeypatch.setattr(services.writer, "submit_all", submit_late)
    if reads == "sweep":
        report = await sweep(services, timedelta(days=365))
        assert (report.items, report.discovered, report.error) == (3, 0, None)
    elif reads == "again":
        for record in (await read.list_runs(services.database))[0]:
            await services.poller.read_again(record)
    else:
        new = await start(services, 3)
        await poll_to_the_end(services, clock, within=120)
        assert await known(services) == set(new)
        monkeypatch.undo()
        for run_id in new:
            await services.tracker.forget(run_id, force=True)
    assert sum(removed) == 3
    assert await known(services) == set()
    assert await stored_rollups(services) == {**counted, "state": 0}


async def test_someone_may_ask_for_it_again(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A removed run that is tracked on purpose is read once more, and settles; its end and its cost
    count once."""
    [run_id] = await start(services)
    await poll_to_the_end(services, clock, within=120)
    counted = await stored_rollups(services)
    await prune(services, clock)
    await services.tracker.track(run_id, technique="icon-pack")
    await poll_to_the_end(services, clock, within=120)
    again = await the_run(services, run_id)
    assert again.tracking is Tracking.SETTLED
    assert again.run.charged_cost is not None
    assert await stored_rollups(services) == counted


async def test_a_callback_of_long_ago_leaves_nothing_that_never_ends(
    open_on: OpenServices, make_flora: MakeFlora, clock: HandClock
) -> None:
    """Where the signed time is not checked an old callback counts as new; its run is read to its
    end, or lost where FLORA does not know it any more."""
    async with make_flora() as flora:
        services = await open_on(flora, tracker_signature_tolerance=0)
        [run_id] = await start(services)
        await poll_to_the_end(services, clock, within=120)
        secret = flora.world.options.webhook_secret
        bodies = [event(one) for one in (run_id, "run_of_nobody")]
        signed = [sign(one, secret, at=clock()) for one in bodies]
        await prune(services, clock)
        for one, signature in zip(bodies, signed, strict=True):
            await services.receiver.receive(one, signature=signature, webhook_id=None)[1]
        await services.applier.drain()
        await poll_to_the_end(services, clock, within=86_400)
        assert (await the_run(services, run_id)).tracking is Tracking.SETTLED
        assert (await the_run(services, "run_of_nobody")).tracking is Tracking.LOST


async def test_a_repeated_batch_pays_nothing_again(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The rows of a sheet whose runs were removed are known to have been started; to run them again
    is still a decision."""
    await batch(services, "a", "b")
    await poll_to_the_end(services, clock, within=120)
    assert (await prune(services, clock))["runs"] == 2
    repeated = await batch(services, "a", "b", "c", retry=Retry.ALL)
    assert statuses(repeated)[:2] == ["forgotten", "forgotten"]
    assert sorted(begun(flora)) == ["a", "b", "c"]
    await batch(services, "a", "b", again=True)
    assert sorted(begun(flora)) == ["a", "a", "b", "b", "c"]


async def test_a_repeated_start_pays_nothing_again(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The same key says that its run is no longer kept, and FLORA is not asked."""
    inputs = [{"id": "prompt", "type": "text", "value": "tools"}]
    request = StartRequest(technique="icon-pack", inputs=inputs, idempotency_key="key-1")
    await services.starter.start(request)
    await poll_to_the_end(services, clock, within=120)
    await prune(services, clock)
    with pytest.raises(StartUnresolved, match="no longer kept"):
        await services.starter.start(request)
    assert len(flora.world.runs) == 1


async def test_a_replay_does_not_bring_it_back(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A quarantined callback of a removed run stays where it is, and says why."""
    [run_id] = await start(services)
    await keep(services, body(run_id, workspace_id=flora.world.options.workspace_id))
    await poll_to_the_end(services, clock, within=120)
    await prune(services, clock)
    done = await services.replayer.replay("whd_1")
    assert done.outcome is DeliveryOutcome.QUARANTINED
    assert "retention" in (done.reason or "")
    assert await known(services) == set()


async def test_a_replay_of_what_retention_went_over_says_so(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """An applied callback had been applied, with its body or without; where it outlived its run,
    that is told too."""
    [run_id] = await start(services)
    content = event(run_id)
    secret = flora.world.options.webhook_secret

    async def comes() -> None:
        signature = sign(content, secret, at=clock())
        await services.receiver.receive(content, signature=signature, webhook_id=None)[1]

    await comes()
    await poll_to_the_end(services, clock, within=120)
    clock.move(LATER - 86_400)
    await services.poller.recheck_due()
    await comes()
    services.pruner.sleep = no_pause
    told = []
    for ages in (AGES_OF_BODIES, AGES):
        await services.pruner.prune(ages)
        told.append((await services.replayer.replay(f"whd_{run_id}")).reason)
    assert told[0] == APPLIED_BEFORE
    assert told[1] == f"{APPLIED_BEFORE}; its run has been deleted"
