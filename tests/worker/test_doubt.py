"""A start is known by evidence, never by a guess: whatever FLORA answers, nothing is paid twice."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.support.clocks import HandClock, PassedTime, server_clock
from tests.support.endpoint import SECRET, Receiver
from tests.support.waiting import assert_takes_less, eventually
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tests.worker.doubt import (
    GATEWAY,
    HOUR,
    PROMPT,
    attempt,
    change,
    posts,
    request,
    send_again,
    state_of,
    sweep,
)
from tracker.core.errors import (
    FloraError,
    StartError,
    StartPending,
    StoreUnavailable,
)
from tracker.core.events import MessageState
from tracker.core.observation import Observation, Source
from tracker.core.run import RunStatus
from tracker.services import Services, open_services
from tracker.settings import EndpointSettings, Settings
from tracker.simulator import Options, Simulator, running
from tracker.starting.recover import DoubtTimes, _callback_is_over
from tracker.store.queries import starts as start_log
from tracker.store.queries.endpoints import list_messages
from tracker.store.queries.starts import StartRow, StartState


@pytest.mark.parametrize(
    "answer",
    [
        *("502", "404", "empty", "page"),
        *(pytest.param(answer, marks=pytest.mark.thorough) for answer in ("503", "504")),
    ],
)
async def test_what_a_gateway_says_is_doubt_and_nothing_is_sent_again(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, answer: str
) -> None:
    """FLORA may be at work behind it and does not know the key yet: one POST, and one run."""
    async with make_flora(
        gateway_starts=1.0, gateway_answers=(answer,), gateway_works=1.0, keys_known="at_end"
    ) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        assert await attempt(services) is None
        clock.move(60)
        await services.recovery.recover()
        assert (posts(flora), len(flora.world.runs)) == (1, 1)
        assert await state_of(services.database) == "in_doubt"


@pytest.mark.both_databases
async def test_an_endpoint_that_filters_by_tag_gets_the_run_of_a_lost_answer(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A sweep finds the run, and it is settled before anyone knows that it is the start's. Its tags
    come with that: the endpoint that wants them gets the run then, the other only once."""
    async with Receiver() as receiver, make_flora(gateway_starts=1.0) as flora:
        tags, shop = {"customer": "acme"}, {"url": receiver.url, "allow_private": True}
        endpoints = [
            EndpointSettings(id="all", secrets=[SECRET], **shop),
            EndpointSettings(id="acme", secrets=[SECRET], tag=("customer", "acme"), **shop),
        ]
        services = await open_on(flora, endpoints=endpoints)
        await services.webhooks.start()

        async def sent(count: int) -> dict[str, int]:
            state = MessageState.DELIVERED
            await eventually(lambda: _has(list_messages(services.database, state=state), count))
            rows, _ = await list_messages(services.database)
            return Counter(row.endpoint_id for row in rows)

        try:
            assert await attempt(services, tags=tags) is None
            change(flora, gateway_starts=0.0)
            clock.move(60)
            [workspace] = services.workspaces
            assert (await services.sweeper.sweep(workspace)).discovered == 1
            assert await sent(1) == {"all": 1}
            while await state_of(services.database) == "in_doubt":
                clock.move(60)
                await services.recovery.recover()
            await services.resolver.is_run(await services.resolver.find("key-1"), *flora.world.runs)
            assert await sent(2) == {"all": 1, "acme": 1}
            assert receiver.taken[-1].data["tags"] == tags
        finally:
            await services.webhooks.stop()


async def _has(listing: Awaitable[tuple[Sequence[object], object]], count: int) -> bool:
    return len((await listing)[0]) == count


async def test_who_asks_again_ends_the_doubt(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """No worker is needed for that: `runs start` and a batch have none."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        clock.move(200)
        started = await services.starter.start(request())
        assert [started.record.run.run_id] == [*flora.world.runs]
        assert posts(flora) == 2


async def test_a_slow_post_is_sent_once(make_flora: MakeFlora, open_on: OpenServices) -> None:
    """Its answer is waited for after the caller has been told that the start is pending."""
    async with make_flora(slow_starts=1.0, slow_seconds=1.5, slow_run="last") as flora:
        services = await open_on(flora)
        with pytest.raises((FloraError, StartError)):
            await services.starter.start(request(), wait=0.5)

        async def is_started() -> bool:
            return await state_of(services.database) == "started"

        await eventually(is_started)
        assert (posts(flora), len(flora.world.runs)) == (1, 1)
        assert await attempt(services) == next(iter(flora.world.runs))


async def test_who_waits_in_doubt_is_told_when_the_process_stops(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """It would wait for minutes, and hold up the stop; the same key has the result later."""
    async with make_flora(gateway_starts=1.0, gateway_works=1.0, keys_known="at_end") as flora:
        services = await open_on(flora)
        starting = asyncio.create_task(services.starter.start(request(), wait=60))

        async def is_in_doubt() -> bool:
            return await state_of(services.database) == "in_doubt"

        await eventually(is_in_doubt)
        assert not starting.done()
        services.starter.stop_waiting()
        with pytest.raises(StartPending):
            await asyncio.wait_for(starting, 30)


@pytest.mark.parametrize("second", ["400", "402", "404"])
async def test_a_refusal_after_doubt_frees_no_key(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, second: str
) -> None:
    """The first POST made a run and was answered 500: the same key never pays again."""
    async with make_flora(lost_starts=1.0, second_answer=second, keys_released=True) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        for hours in (0.1, 1.0, 2.5, 24.0):
            clock.move(hours * HOUR)
            change(flora, lost_starts=0.0)
            await services.recovery.recover()
            assert await attempt(services) is None
        assert len(flora.world.runs) == 1
        assert await state_of(services.database) == "unresolved"


async def test_a_start_that_reached_nobody_is_sent_again_after_the_window(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Where a complete read of the history, begun after it, shows no run that could be its own."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        clock.move(170)
        assert await services.recovery.recover() == 0
        clock.move(20)
        assert await services.recovery.recover() == 1
        assert list(flora.world.runs) == [await attempt(services)]


async def test_a_caller_waits_no_longer_for_a_start_that_is_sent_again(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """FLORA is as slow with it as with the first request. Its answer counts all the same."""
    async with make_flora(**GATEWAY, slow_seconds=3.0) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0, slow_starts=1.0)
        clock.move(200)

        async def wait() -> None:
            with pytest.raises(StartPending):
                await services.starter.start(request(), wait=1)

        await assert_takes_less(2.5, wait)

        async def is_started() -> bool:
            return await state_of(services.database) == "started"

        await eventually(is_started)
        assert (posts(flora), len(flora.world.runs)) == (2, 1)


async def test_a_history_of_many_runs_is_read_however_long_that_takes(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
) -> None:
    """As after a large batch. Here FLORA takes a second for each page."""
    history = {"history": 2200, "history_seconds": 5000, "refuse": {"filtered": "forbidden"}}
    async with make_flora(**GATEWAY, **history) as flora:
        services = await open_on(flora)
        await sweep(services)
        clock.move(120)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        clock.move(200)
        [workspace] = services.workspaces
        client, seconds = workspace.require_client(), 0

        async def takes_a_second(request: httpx.Request) -> None:
            nonlocal seconds
            seconds += 1
            if client.wait is None or client.wait.left < 1:
                raise httpx.ReadTimeout("too slow")

        client.http.event_hooks = {"request": [takes_a_second]}
        services.recovery.monotonic = lambda: time.monotonic() + seconds
        assert await services.recovery.recover() == 1
        assert seconds > 20


async def test_doubt_outlives_the_refusal_of_what_is_sent_again(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A 402 to the second request says nothing of the first, whose run is listed late."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0, credits=0.0)
        clock.move(200)
        await services.recovery.recover()
        assert posts(flora) == 2
        assert await state_of(services.database) == "in_doubt"


async def test_a_forgotten_key_is_not_sent_again(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Two hours after the first sending FLORA may take it for a new one: a person decides."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        clock.move(2 * HOUR)
        assert await services.recovery.recover() == 0
        assert await attempt(services) is None
        assert (posts(flora), await state_of(services.database)) == (1, "unresolved")


async def test_a_colleagues_run_is_not_taken(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """It is a run of the history, without inputs of ours; and what could be ours is not paid
    again."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        clock.move(150)
        colleagues = flora.start("icon-pack")
        change(flora, gateway_starts=0.0)
        for _ in range(10):
            clock.move(100)
            await services.recovery.recover()
        [workspace] = services.workspaces
        await services.sweeper.sweep(workspace)
        record = await the_run(services, colleagues.run_id)
        assert (record.source, record.inputs) == (Source.HISTORY, None)
        assert (posts(flora), len(flora.world.runs)) == (1, 1)
        clock.move(2 * HOUR)
        await services.recovery.recover()
        assert await state_of(services.database) == "unresolved"


async def test_a_start_is_left_to_a_person_once_no_callback_can_tell_what_it_became(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Who decides is told which run to look at, and does not wait until the key is forgotten."""
    async with make_flora(lost_starts=1.0, keys_released=True, run_seconds=1200.0) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        [run_id] = flora.world.runs
        for _ in range(12):
            clock.move(100)
            await services.recovery.recover()
        assert await state_of(services.database) == "in_doubt"  # it runs, or its callback may come
        for _ in range(18):
            clock.move(100)
            await services.recovery.recover()
        assert (posts(flora), await state_of(services.database)) == (1, "unresolved")
        [row] = await start_log.of_key(services.database, "key-1")
        assert row.error is not None
        assert run_id in row.error["message"]


@pytest.mark.parametrize(
    "ahead",
    [-10_800.0, 1.6, *(pytest.param(s, marks=pytest.mark.thorough) for s in (-1.6, 0.0, 10_800.0))],
)
async def test_the_run_of_a_used_key_is_found_whatever_floras_clock_says(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, ahead: float
) -> None:
    """None that was known before is taken for it."""
    async with make_flora(idempotency="conflict", clock_offset=ahead, date_offset=-ahead) as flora:
        services = await open_on(flora)
        flora.start("icon-pack")
        await sweep(services)
        clock.move(61)
        change(flora, lost_starts=1.0)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        ours = list(flora.world.runs)[-1]
        # What a process that died had sent is sent again by this one, within the window.
        await send_again(services)
        clock.move(61)
        await services.recovery.recover()
        assert await attempt(services) == ours


async def test_a_run_is_not_taken_while_the_starts_own_may_not_be_listed_yet(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A colleague's, from before and not known here, is the only one that is listed for a while."""
    async with make_flora(idempotency="conflict") as flora:
        services = await open_on(flora)
        flora.start("icon-pack")
        change(flora, lost_starts=1.0)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        await send_again(services)
        ours = list(flora.world.runs)[-1]
        unlisted = flora.world.runs.pop(ours)
        for _ in range(5):
            clock.move(10)
            assert await services.recovery.recover() == 0
        flora.world.runs[ours] = unlisted
        for _ in range(40):  # until no callback can tell any more
            clock.move(30)
            assert await services.recovery.recover() == 0
        assert await state_of(services.database) == "unresolved"


async def test_a_process_that_stood_still_sends_nothing(
    flora: Simulator, open_on: OpenServices, clock: HandClock
) -> None:
    """While it waited for its permit another process took the key over and started it; hours later
    FLORA has forgotten the key."""
    one, two = await open_on(flora), await open_on(flora)
    for services in (one, two):
        await services.catalogue.technique_id(next(iter(services.workspaces)), "icon-pack")
        await attempt(services, "warm-up")
    [workspace] = one.workspaces
    workspace.require_client().request_limit.pause(1.5)
    one.starter.deadline = two.starter.deadline = 10
    slow = asyncio.create_task(one.starter.start(request()))
    await asyncio.sleep(0.5)
    clock.move(HOUR)  # as far as leases go, for an hour
    quick = await two.starter.start(request())
    clock.move(25 * HOUR)
    assert (await slow).record.run.run_id == quick.record.run.run_id
    assert len(flora.world.runs) == 2


async def test_a_database_whose_clock_is_set_pays_nothing_twice(postgres_url: str) -> None:
    """Leases and windows of starts that FLORA is at work on seem to be over then."""
    options = Options(slow_starts=1.0, slow_seconds=3.0, slow_run="last", keys_known="at_end")
    async with (
        running(options) as flora,
        server_clock(postgres_url) as set_to,
        AsyncExitStack() as stack,
    ):
        settings = Settings(
            flora_base_url=flora.base_url,
            flora_api_key=options.api_key,
            tracker_database_url=postgres_url,
        )
        one, two = [await stack.enter_async_context(open_services(settings)) for _ in range(2)]
        starting = asyncio.create_task(one.starter.start(request()))

        async def is_sent() -> bool:
            return [row.state for row in await start_log.open_starts(two.database)] == ["sent"]

        await eventually(is_sent)
        await set_to(3600)
        for services in (two, one):
            assert services.clock.is_servers
            await services.clock.check()
            await services.recovery.recover()
        assert (await starting).record.run.run_id in flora.world.runs
        assert (posts(flora), len(flora.world.runs)) == (1, 1)


async def test_a_sleep_between_the_database_and_the_socket_sends_nothing(
    flora: Simulator, open_on: OpenServices, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is checked last of all, by a clock that goes on while the machine sleeps."""
    services = await open_on(flora)
    mark_sent = start_log.mark_sent
    marked: list[Any] = []

    async def mark_and_sleep(*given: Any, **named: Any) -> Any:
        marked.append(await mark_sent(*given, **named))
        clock.move(HOUR)
        return marked[-1]

    monkeypatch.setattr(start_log, "mark_sent", mark_and_sleep)
    monkeypatch.setattr(services.starter, "monotonic", passed := PassedTime())
    monkeypatch.setattr(services.starter, "sleep", passed.sleep)
    services.starter.deadline = 5
    assert await attempt(services) is None
    assert len(marked) > 1
    assert None not in marked
    assert not flora.world.runs


async def test_an_answer_outlives_the_database(
    open_on: OpenServices, flora: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is told the run's id, and the run is kept as soon as the database is back."""
    services = await open_on(flora)
    submit = services.writer.submit
    is_down = True

    async def submit_or_not(entry: Any) -> Any:
        if is_down:
            raise StoreUnavailable("the database does not answer")
        return await submit(entry)

    monkeypatch.setattr(services.writer, "submit", submit_or_not)
    services.starter.deadline = 5
    with pytest.raises(StartError) as told:
        await services.starter.start(request())
    run_id = next(iter(flora.world.runs))
    assert getattr(told.value, "run_id", None) == run_id
    is_down = False

    async def is_started() -> bool:
        return await state_of(services.database) == "started"

    await eventually(is_started)
    assert await attempt(services) == run_id


async def test_a_dead_process_leaves_doubt(
    flora: Simulator, open_on: OpenServices, clock: HandClock
) -> None:
    """What it was sending is in doubt as soon as its lease has run out."""
    services = await open_on(flora)
    [workspace] = services.workspaces
    technique_id = await services.catalogue.technique_id(workspace, "icon-pack")
    db = services.database
    await services.workspaces.id_of(workspace)
    from tracker.core.starts import digest_of

    await start_log.reserve(
        db,
        start_log.StartRow(
            workspace_id="ws_simulator",
            idempotency_key="key-1",
            technique_id=technique_id,
            fingerprint=digest_of([technique_id, PROMPT]),
            inputs=PROMPT,
            created_at=clock(),
        ),
    )
    lease = timedelta(seconds=30)
    assert await start_log.take(db, "ws_simulator", "key-1", "gone", clock(), lease)
    await start_log.mark_sent(
        db,
        "ws_simulator",
        "key-1",
        holder="gone",
        at=clock(),
        callback_url=None,
        request_body="{}",
    )
    await services.recovery.recover()
    assert await state_of(db) == "sent"
    clock.move(31)
    await services.recovery.recover()
    assert await state_of(db) == "in_doubt"
    assert not flora.world.runs


@pytest.mark.parametrize(("minutes", "is_over"), [(16, True), (14, False)])
@pytest.mark.parametrize("ahead", [-120.0, 120.0])
def test_a_callback_is_over_by_floras_clock(minutes: int, is_over: bool, ahead: float) -> None:
    """FLORA's time of the end is compared with its own clock, which may be `ahead` of ours."""
    at = datetime(2026, 7, 1, 12, tzinfo=UTC)
    ended = at + timedelta(seconds=ahead) - timedelta(minutes=minutes)
    run = Observation(
        run_id="run_1",
        source=Source.HISTORY,
        at=at,
        status=RunStatus.COMPLETED,
        completed_at=ended,
        clock_skew=ahead,
    )
    assert _callback_is_over(run) is is_over


@pytest.mark.parametrize(
    ("doubt", "error", "window"),
    [(10, {}, 10), (10, {"conflict": True}, 60), (180, {"conflict": True}, 180)],
)
async def test_the_run_of_a_known_key_has_a_minute_to_be_listed(
    services: Services, doubt: int, error: dict[str, Any], window: int
) -> None:
    """However short TRACKER_START_DOUBT is, since FLORA's list lags; without a run nothing does."""
    row = StartRow(
        workspace_id="ws_1",
        idempotency_key="key-1",
        technique_id="tech_1",
        fingerprint="f",
        inputs=[],
        state=StartState.IN_DOUBT,
        created_at=services.clock(),
        error=error,
    )
    times = DoubtTimes(row, services.clock, timedelta(seconds=doubt))
    assert times.window == timedelta(seconds=window)
