"""Polling: what is due is read, with as few requests as possible."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.clocks import HandClock
from tests.support.waiting import never
from tests.worker.conftest import Hurry, MakeFlora, OpenServices, assert_true_to, reads_of, the_run
from tracker.core.observation import Source
from tracker.core.run import Tracking
from tracker.services import Services, open_services
from tracker.settings import Rotation, read_settings
from tracker.simulator import Simulator
from tracker.simulator.callbacks import sign_callback
from tracker.starting.start import StartRequest
from tracker.store import coordination
from tracker.store.queries import overview

PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]


async def start(services: Services, count: int = 1) -> list[str]:
    request = StartRequest(technique="icon-pack", inputs=PROMPT)
    return [(await services.starter.start(request)).record.run.run_id for _ in range(count)]


async def adopt(services: Services, flora: Simulator, count: int) -> list[str]:
    """Runs that someone else starts now and a sweep finds: they are due in four to five
    seconds."""
    run_ids = [flora.start().run_id for _ in range(count)]
    [workspace] = services.workspaces
    await services.sweeper.sweep(workspace)
    return run_ids


async def poll_to_the_end(services: Services, clock: HandClock, *, within: float) -> None:
    """Poll as a worker does, turning the clock from one due time to the next, until no run is
    active any more."""
    give_up = clock().timestamp() + within

    async def active() -> int:
        return (await overview.counts(services.database, now=clock())).active

    while await active():
        due = await services.poller.next_due_at()
        if due is None:  # someone else, who polls as well, has read the last one meanwhile
            assert not await active(), "no poll is due for an active run"
            return
        clock.move(max((due - clock()).total_seconds(), 0))
        assert clock().timestamp() < give_up, "a run did not settle in time"
        await services.poller.poll_due()


async def test_a_run_without_callback_is_polled_to_its_end(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run that nobody calls back about ends here as it ended there, by polls alone."""
    [run_id] = await start(services)
    await poll_to_the_end(services, clock, within=120)
    record = await the_run(services, run_id)
    assert (record.tracking, record.ended_via) == (Tracking.SETTLED, Source.POLL)
    assert_true_to(record, flora)


async def test_nothing_is_read_before_it_is_due(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run started without a callback is left alone for one poll interval."""
    await start(services)
    clock.move(4.9)
    assert (await services.poller.poll_due()).claimed == 0
    clock.move(0.2)
    assert (await services.poller.poll_due()).claimed == 1


async def test_a_page_reads_many(services: Services, flora: Simulator, clock: HandClock) -> None:
    """Forty runs that ended are settled by one page of the history and no single read."""
    run_ids = await start(services, 40)
    clock.move(60)
    before = reads_of(flora)
    report = await services.poller.poll_due()
    assert (report.pages, report.reads, report.settled) == (1, 0, 40)
    assert sum(reads_of(flora).values()) == sum(before.values()) + 1
    for run_id in run_ids:
        assert_true_to(await the_run(services, run_id), flora)


async def test_pages_are_read_through_those_that_show_nothing(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Twenty due runs below two hundred that are not due cost three pages, not twenty reads."""
    await adopt(services, flora, 20)
    clock.move(2)
    await adopt(services, flora, 200)
    clock.move(3.1)
    report = await services.poller.poll_due()
    assert (report.claimed, report.pages, report.reads) == (20, 3, 0)


async def test_where_pages_cost_more_runs_are_read_alone(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Two due runs below two hundred others cost two reads, and no page is read for them."""
    await adopt(services, flora, 2)
    clock.move(2)
    await adopt(services, flora, 200)
    clock.move(3.1)
    report = await services.poller.poll_due()
    assert (report.claimed, report.pages, report.reads) == (2, 0, 2)


async def test_runs_that_are_not_known_here_push_others_down(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Where FLORA's list holds runs that are not known here, the page after is read as well."""
    await adopt(services, flora, 20)
    for _ in range(150):
        flora.start()
    clock.move(5.1)
    report = await services.poller.poll_due()
    assert (report.claimed, report.pages, report.reads) == (20, 2, 0)


async def test_due_runs_gather_after_pages_were_read(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Who polls again and again makes a read a second: after three pages what becomes due is left
    for three seconds; after a single read, for one. Who polls once reads all."""
    run_ids = await adopt(services, flora, 220)
    clock.move(5.1)
    assert (await services.poller.poll_due(coalesce=True)).pages == 3
    await services.tracker.track(run_ids[0])
    clock.move(2.9)
    assert (await services.poller.poll_due(coalesce=True)).claimed == 0
    due = await services.poller.next_due_at(coalesce=True)
    assert due == clock() + timedelta(seconds=0.1)
    clock.move(0.1)
    assert (await services.poller.poll_due(coalesce=True)).reads == 1
    await services.tracker.track(run_ids[1])
    clock.move(0.9)
    assert (await services.poller.poll_due(coalesce=True)).claimed == 0
    assert (await services.poller.poll_due()).reads == 1


async def test_a_sweep_counts_like_a_round(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """What becomes due right after a sweep of three pages is left to gather, too."""
    run_ids = await adopt(services, flora, 220)
    clock.move(1)
    await services.tracker.track(run_ids[0])
    assert (await services.poller.poll_due(coalesce=True)).claimed == 0
    clock.move(2)
    assert (await services.poller.poll_due(coalesce=True)).claimed == 1


async def test_ends_without_details_in_the_list_are_read_all_the_time(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Where lists leave outputs out, nothing is shared, and runs that ended do not wait for more
    of their kind; those that have not ended do."""
    async with make_flora(history_outputs=False, run_seconds=4) as flora:
        services = await open_on(flora)
        run_ids = await adopt(services, flora, 150)
        clock.move(5.1)
        report = await services.poller.poll_due(coalesce=True)
        assert report.pages == 2
        while (report := await services.poller.poll_due(coalesce=True)).claimed:
            assert report.pages == 0
        ended = [one for one in run_ids if (await the_run(services, one)).run.precedence.ended]
        assert ended
        assert all([(await the_run(services, one)).run.settled for one in ended])


async def test_a_backlog_does_not_keep_fresh_ends_waiting(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """While hundreds of runs are due that have to be read one by one, the run that ended last is
    among the first that the next round reads."""
    async with make_flora(history_outputs=False) as flora:
        services = await open_on(flora)
        run_ids = await adopt(services, flora, 180)
        clock.move(60)
        await services.poller.poll_due()
        last = flora.world.runs[run_ids[-1]]
        assert not (await the_run(services, last.run_id)).run.settled
        clock.move(1)
        callback = sign_callback(last, flora.world.now_ms())
        await services.receiver.receive(
            callback.body,
            signature=callback.headers["Flora-Signature"],
            webhook_id=callback.delivery_id,
        )[1]
        await services.applier.drain()
        assert (await services.poller.poll_due()).settled < 30
        assert (await the_run(services, last.run_id)).run.settled


async def test_lists_without_details_are_not_asked_twice(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Where lists leave outputs out, each run is read once, and pages are not read for nothing."""
    async with make_flora(history_outputs=False) as flora:
        services = await open_on(flora)
        run_ids = await start(services, 5)
        clock.move(60)
        report = await services.poller.poll_due()
        assert (report.pages, report.reads, report.settled) == (1, 5, 5)
        run_ids += await start(services, 5)
        for run_id in run_ids:
            await services.tracker.track(run_id)
        clock.move(60)
        await poll_to_the_end(services, clock, within=300)
        for run_id in run_ids:
            assert_true_to(await the_run(services, run_id), flora)


@pytest.mark.parametrize("history_outputs", [True, False])
async def test_a_run_of_an_unknown_technique_is_found(
    services: Services, flora: Simulator, clock: HandClock, history_outputs: bool
) -> None:
    """A tracked run whose technique nobody knows is read at once, through the history, which may
    only name the technique."""
    flora.world.change({"history_outputs": history_outputs})
    run = flora.start()
    clock.move(60)
    tracked = await services.tracker.track(run.run_id)
    assert not tracked.known
    report = await services.poller.poll_due()
    record = await the_run(services, run.run_id)
    assert (report.settled, record.source) == (1, Source.TRACK)
    assert record.run.technique_id == run.technique.technique_id  # type: ignore[union-attr]
    assert_true_to(record, flora)


async def test_a_generation_run_is_read_too(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run that is in no list of technique runs is read by its id alone."""
    run = flora.start_generation()
    clock.move(60)
    await services.tracker.track(run.run_id)
    await services.poller.poll_due()
    record = await the_run(services, run.run_id)
    assert record.tracking is Tracking.SETTLED
    assert_true_to(record, flora)


async def test_a_run_that_flora_denies_is_lost_in_the_end(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Five denials over an hour make a run lost; until then it is active and says why."""
    await services.tracker.track("run_nobody_knows")
    await services.poller.poll_due()
    record = await the_run(services, "run_nobody_knows")
    assert (record.tracking, record.missing) == (Tracking.ACTIVE, 1)
    assert "404" in (record.last_error or "")
    await poll_to_the_end(services, clock, within=2 * 3600)
    record = await the_run(services, "run_nobody_knows")
    assert record.tracking is Tracking.LOST
    assert record.missing >= 5


async def test_a_forged_poll_url_is_not_followed(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The key goes to FLORA's origin only: a run with a foreign poll_url is read another way."""
    run = flora.start()
    clock.move(60)
    await services.tracker.track(run.run_id, poll_url="http://127.0.0.1:9/steal")
    await services.poller.poll_due()
    assert_true_to(await the_run(services, run.run_id), flora)


async def test_a_refused_key_harms_no_run(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """While FLORA refuses the key, runs stay due and uncounted, and it is not asked again and
    again."""
    async with make_flora() as flora:
        run = flora.start()
        services = await open_on(flora, flora_api_key="sk_test_wrong")
        await services.tracker.track(run.run_id)
        await services.poller.poll_due()
        record = await the_run(services, run.run_id)
        assert (record.checks, record.lease_holder) == (0, None)
        asked = sum(reads_of(flora).values())
        for _ in range(5):
            await services.poller.poll_due()
        assert sum(reads_of(flora).values()) == asked


async def test_a_new_key_reads_at_once_what_waited(
    flora: Simulator, clock: HandClock, database_url: str, tmp_path: Path
) -> None:
    """However long FLORA has refused the old key, a due run is read as soon as there is a new one:
    the worker is woken, and pauses no longer."""
    key = tmp_path / "key"
    key.write_text(flora.world.options.api_key)
    (tmp_path / "tracker.toml").write_text('flora_api_key = "file:key"')
    environ = {
        "TRACKER_CONFIG": str(tmp_path / "tracker.toml"),
        "TRACKER_DATABASE_URL": database_url,
        "FLORA_BASE_URL": flora.base_url,
    }
    loaded = read_settings(environ)
    rotation = Rotation(loaded.settings, loaded, lambda: read_settings(environ))
    async with open_services(rotation, wall=clock, seconds=clock.seconds) as services:
        [run_id] = await start(services)
        flora.world.change({"api_key": "sk_test_new"})
        [workspace] = services.workspaces
        breaker = workspace.require_client().breaker
        breaker._monotonic = lambda: clock().timestamp()
        for _ in range(8):  # half-open probes
            clock.move(61)
            assert (await services.poller.poll_due()).trouble is not None
        await services.signals.wait_due(0)
        key.write_text("sk_test_new")
        assert rotation.check()
        assert await services.signals.wait_due(0)
        due = await services.poller.next_due_at()
        assert due is not None
        assert due <= clock()
        assert (await services.poller.poll_due()).settled == 1
        assert_true_to(await the_run(services, run_id), flora)


async def test_an_outage_of_flora_harms_no_run(
    services: Services, flora: Simulator, clock: HandClock, hurry: Hurry
) -> None:
    """While FLORA answers nothing, few requests are made and runs stay due; then all are read."""
    run_ids = await start(services, 40)
    hurry(services, flora, backoff=never)
    clock.move(60)
    flora.world.options = flora.world.options.with_changes({"cut": 1.0})
    rounds, before = 0, flora.world.requests
    for _ in range(40):
        clock.move(5)
        rounds += (await services.poller.poll_due()).claimed > 0
    assert rounds <= 12, "it rests for half a minute in the end"
    most = 7 * rounds  # a page of the history, and two runs: in two ways, and again in the first
    assert flora.world.requests - before <= most
    checked = [await the_run(services, run_id) for run_id in run_ids]
    assert sum(record.checks for record in checked) <= 6 * rounds
    assert all(record.lease_holder is None for record in checked)
    flora.world.options = flora.world.options.with_changes({"cut": 0.0})
    clock.move(31)
    assert (await services.poller.poll_due()).settled >= 40 - 2 * rounds
    await poll_to_the_end(services, clock, within=600)
    for run_id in run_ids:
        assert_true_to(await the_run(services, run_id), flora)


async def test_a_rate_limit_is_no_fault_of_a_run(
    services: Services, flora: Simulator, clock: HandClock, hurry: Hurry
) -> None:
    """Told to wait for longer than a read may take, runs stay due and uncounted."""
    [run_id] = await start(services)
    hurry(services, flora)
    [workspace] = services.workspaces
    workspace.require_client().request_limit.pause(90)
    clock.move(60)
    report = await services.poller.poll_due()
    record = await the_run(services, run_id)
    assert (report.reads, record.checks, record.last_error) == (0, 0, None)
    assert report.trouble is not None
    due = await services.poller.next_due_at()
    assert due is not None
    assert (due - clock()).total_seconds() >= 80, "and nobody asks before FLORA will hear it"


@pytest.fixture
async def two(open_on: OpenServices, flora: Simulator) -> tuple[Services, Services]:
    """Two processes' worth of services on one database."""
    return await open_on(flora), await open_on(flora)


async def test_two_pollers_share_the_work(
    two: tuple[Services, Services], flora: Simulator, clock: HandClock
) -> None:
    """A run that one poller claims is not polled by the other, and every claim is given back."""
    one, other = two
    run_ids = await start(one, 6)
    clock.move(6)
    reports = await asyncio.gather(one.poller.poll_due(), other.poller.poll_due())
    assert sum(report.claimed for report in reports) == 6
    clock.move(60)
    await poll_to_the_end(other, clock, within=300)
    for run_id in run_ids:
        record = await the_run(one, run_id)
        assert record.lease_holder is None
        assert_true_to(record, flora)


async def test_a_claim_that_was_not_given_back_runs_out(
    two: tuple[Services, Services], flora: Simulator, clock: HandClock
) -> None:
    """What a process that died had claimed is polled by another once its lease is over."""
    one, other = two
    [run_id] = await start(one)
    clock.move(60)
    await coordination.claim_due(
        one.database,
        holder="a process that died",
        now=clock(),
        lease=timedelta(minutes=3),
        limit=10,
        workspaces=None,
    )
    assert (await other.poller.poll_due()).claimed == 0
    clock.move(181)
    assert (await other.poller.poll_due()).settled == 1
    assert_true_to(await the_run(one, run_id), flora)
