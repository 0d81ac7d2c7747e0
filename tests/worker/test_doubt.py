"""A start is known by evidence, never by a guess: whatever FLORA answers, nothing is paid twice."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from tests.support.clocks import HandClock
from tests.support.endpoint import SECRET, Receiver
from tests.support.waiting import eventually, free_port
from tests.web.serving import serving
from tests.worker.conftest import (
    Hurry,
    MakeFlora,
    OpenServices,
    on_history,
    reads_of,
    the_run,
)
from tracker.core.clock import utc_now
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    InvalidRequest,
    SettingsError,
    StartError,
    StartPending,
    StoreUnavailable,
)
from tracker.core.events import MessageState
from tracker.core.observation import Source
from tracker.services import Services, open_services
from tracker.settings import EndpointSettings, Settings
from tracker.simulator import Options, Simulator, running
from tracker.simulator.options import SimulatedWorkspace
from tracker.starting.sheets.sheet import sheet_of_objects
from tracker.starting.start import StartRequest
from tracker.store import clock as store_clock
from tracker.store.engine import Database
from tracker.store.queries import starts as start_log
from tracker.store.queries.endpoints import list_messages
from tracker.store.schema import runs, starts
from tracker.web.app import build_app

PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]
HOUR = 3600.0


def request(key: str = "key-1", **changes: Any) -> StartRequest:
    given: dict[str, Any] = {"technique": "icon-pack", "inputs": PROMPT, "idempotency_key": key}
    return StartRequest(**(given | changes))


async def attempt(services: Services, key: str = "key-1", **changes: Any) -> str | None:
    """Start it; the run's id, or `None` where it was not started or is seen to be in doubt."""
    starting = asyncio.create_task(services.starter.start(request(key, **changes)))
    for _ in range(1000):
        await asyncio.wait([starting], timeout=0.02)
        if starting.done() or await state_of(services.database, key) == "in_doubt":
            break
    await asyncio.wait([starting], timeout=0.05)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        return None
    try:
        return starting.result().record.run.run_id
    except (FloraError, StartError):
        return None


async def state_of(database: Database, key: str = "key-1") -> str:
    async with database.read() as connection:
        query = select(starts.c.state).where(starts.c.idempotency_key == key)
        return str(await connection.scalar(query))


def posts(flora: Simulator) -> int:
    return reads_of(flora).get("runs.start", 0)


def change(flora: Simulator, **options: Any) -> None:
    flora.world.options = replace(flora.world.options, **options)


GATEWAY = {"gateway_starts": 1.0, "gateway_works": 0.0}


@pytest.mark.parametrize("answer", ["502", "503", "504", "404", "empty", "page"])
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
        await _sweep(services)
        clock.move(61)
        change(flora, lost_starts=1.0)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        ours = list(flora.world.runs)[-1]
        # What a process that died had sent is sent again by this one, within the window.
        await _send_again(services)
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
        await _send_again(services)
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


async def _sweep(services: Services) -> None:
    [workspace] = services.workspaces
    assert (await services.sweeper.sweep(workspace)).error is None


LOST = {"lost_starts": 1.0, "keys_released": True}
"""A start is answered 500 although it made a run, and its key would start another."""


async def _recover_for_long(services: Services, clock: HandClock) -> None:
    """For longer than FLORA may be at work; not so long that a person is asked."""
    for _ in range(8):
        clock.move(100)
        await services.recovery.recover()


@pytest.mark.parametrize("known", [0, pytest.param(1, marks=pytest.mark.thorough), 5])
@pytest.mark.parametrize(
    "clocks",
    [
        {"date_offset": 3600},
        {"clock_offset": -10_800, "date_offset": 10_800},
        {"clock_offset": 172_800},
        *(
            pytest.param(clocks, marks=pytest.mark.thorough)
            for clocks in (
                {"date_offset": -3600},
                {"clock_offset": 10_800, "date_offset": -10_800},
                {"clock_offset": -172_800, "date_offset": 172_800},
                {"clock_offset": -172_800},
            )
        ),
    ],
)
async def test_nothing_is_paid_twice_whatever_floras_clock_says(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    clocks: dict[str, float],
    known: int,
) -> None:
    """Nor whatever `Date` says, which a gateway may write; also before a start was answered."""
    async with make_flora(**clocks) as flora:
        services = await open_on(flora)
        for number in range(known):
            assert await attempt(services, f"an-earlier-one-{number}") is not None
        clock.move(1)
        change(flora, **LOST)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        await _recover_for_long(services, clock)
        assert len(flora.world.runs) == posts(flora) == 1 + known
        assert await state_of(services.database) == "in_doubt"


@pytest.mark.parametrize("ahead", [3 * HOUR, pytest.param(1e9, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("known", [pytest.param(1, marks=pytest.mark.thorough), 6])
async def test_nothing_is_paid_twice_where_floras_clock_was_ahead(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, ahead: float, known: int
) -> None:
    """The run of the start is then older, by its time of creation, than those known before."""
    async with make_flora() as flora:
        services = await open_on(flora)
        change(flora, clock_offset=ahead)
        for _ in range(known):
            flora.start("icon-pack")
        change(flora, clock_offset=0)
        await _sweep(services)
        clock.move(61)
        change(flora, **LOST)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        await _recover_for_long(services, clock)
        assert (len(flora.world.runs), posts(flora)) == (known + 1, 1)


@pytest.mark.parametrize("back", [60, pytest.param(3600, marks=pytest.mark.thorough)])
async def test_nothing_is_paid_twice_where_floras_clock_is_set_back(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, back: float
) -> None:
    """The run of the start is then older, by its time of creation, than those known before."""
    async with make_flora() as flora:
        services = await open_on(flora)
        for number in range(6):
            assert await attempt(services, f"an-earlier-one-{number}") is not None
        await _sweep(services)
        clock.move(300)
        change(flora, **LOST, clock_offset=-back)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        await _recover_for_long(services, clock)
        assert len(flora.world.runs) == posts(flora) == 7


async def test_nothing_is_paid_twice_where_our_clock_is_set_back(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """The run of the start seems to be known from before."""
    async with make_flora(**LOST) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        clock.move(-50)
        await _sweep(services)
        await _recover_for_long(services, clock)
        assert len(flora.world.runs) == posts(flora) == 1


async def test_one_wrong_creation_time_hides_no_run(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A run that was created in a year to come is no measure of what was known before."""
    async with make_flora() as flora:
        services = await open_on(flora)
        change(flora, clock_offset=1e9)
        flora.start("icon-pack")
        change(flora, clock_offset=0)
        flora.start("icon-pack")
        await _sweep(services)
        clock.move(61)
        change(flora, **LOST)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        await _recover_for_long(services, clock)
        assert (len(flora.world.runs), posts(flora)) == (3, 1)


@pytest.mark.parametrize("behind", [0, 10_800])
async def test_a_run_that_was_known_before_holds_up_nothing(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, behind: float
) -> None:
    """Whatever FLORA's clock says; nor do those from before the runs that were known."""
    async with make_flora(clock_offset=-behind, date_offset=behind) as flora:
        services = await open_on(flora)
        flora.start("icon-pack")
        clock.move(10 * 24 * HOUR)  # the first sweep does not read so far back
        colleagues = [flora.start("icon-pack").run_id for _ in range(5)]
        await _sweep(services)
        clock.move(61)
        change(flora, **GATEWAY)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        await _recover_for_long(services, clock)
        assert await attempt(services) == list(flora.world.runs)[-1]
        assert (len(flora.world.runs), len(colleagues)) == (7, 5)


@pytest.mark.parametrize("technique", ["icon-pack", 7, None])
@pytest.mark.parametrize("known", [False, True])
async def test_a_run_whose_technique_is_not_shown_may_be_the_starts(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, technique: object, known: bool
) -> None:
    """It is not paid again; and though FLORA knows the key, the run is not taken for its own."""
    async with make_flora(idempotency="conflict", **LOST) as flora:
        services = await open_on(flora)
        [workspace] = services.workspaces

        async def shown(response: httpx.Response) -> None:
            if response.url.path.endswith("/technique-runs"):
                page = json.loads(await response.aread())
                for item in page["technique_runs"]:
                    item["technique"] = {"technique_id": technique}
                response._content = json.dumps(page).encode()

        workspace.require_client()._http.event_hooks = {"response": [shown]}
        change(flora, keys_released=not known)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        if known:
            await _send_again(services)
        sent = posts(flora)
        await _recover_for_long(services, clock)
        assert (len(flora.world.runs), posts(flora)) == (1, sent)
        clock.move(2 * HOUR)
        await services.recovery.recover()
        assert await state_of(services.database) == "unresolved"


@pytest.mark.parametrize("fields", [("status",), ("run_id", "technique_run_id")])
async def test_an_item_that_cannot_be_read_may_be_the_starts(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, fields: tuple[str, ...]
) -> None:
    """Nothing is paid again while the history shows it, and the start is left to a person."""
    async with make_flora(**LOST, bad_fields=fields) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0, bad_runs=tuple(flora.world.runs))
        for moved in (0.0, 3600.0):
            clock.move(moved)
            await _recover_for_long(services, clock)
            assert len(flora.world.runs) == posts(flora) == 1
            assert await state_of(services.database) == "in_doubt"
        clock.move(2 * HOUR)
        await services.recovery.recover()
        assert await state_of(services.database) == "unresolved"


async def test_an_older_item_that_cannot_be_read_holds_up_nothing(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """It is below a run that was known long before the start."""
    async with make_flora(bad_fields=("run_id", "technique_run_id")) as flora:
        services = await open_on(flora)
        bad = flora.start("icon-pack")
        flora.start("icon-pack")
        await _sweep(services)
        clock.move(3 * HOUR)
        change(flora, **GATEWAY, bad_runs=(bad.run_id,))
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        await _recover_for_long(services, clock)
        assert await attempt(services) == list(flora.world.runs)[-1]
        assert len(flora.world.runs) == 3


async def _send_again(services: Services) -> None:
    """Let FLORA say that it knows the key."""
    [workspace] = services.workspaces
    async with services.database.read() as connection:
        query = select(starts.c.request_body).where(starts.c.idempotency_key == "key-1")
        body = await connection.scalar(query)
    with pytest.raises(FloraRefusal) as refused:
        await workspace.require_client().start_run(
            "tech_icon-pack", body=str(body), idempotency_key="key-1"
        )
    assert refused.value.status == 409
    error = {"status": 409, "message": "known", "conflict": True}
    known = starts.update().where(starts.c.idempotency_key == "key-1").values(error=error)
    await services.database.write(lambda connection: connection.execute(known).rowcount)


async def test_two_starts_in_doubt_do_not_guess_between_runs(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Each key is known to FLORA, two runs are there, and which is whose nobody can tell."""
    async with make_flora(idempotency="conflict", lost_starts=1.0) as flora:
        services = await open_on(flora)
        assert await attempt(services, "key-1") is None
        clock.move(1)
        assert await attempt(services, "key-2") is None
        change(flora, lost_starts=0.0)
        error = {"status": 409, "message": "known", "conflict": True}
        await services.database.write(
            lambda connection: connection.execute(starts.update().values(error=error)).rowcount
        )
        for _ in range(12):  # until no callback can tell any more
            clock.move(100)
            assert await services.recovery.recover() == 0
        assert {await state_of(services.database, key) for key in ("key-1", "key-2")} == {
            "unresolved"
        }


# Which runs a start may have become


async def _in_doubt_beside_a_run(
    services: Services, flora: Simulator, clock: HandClock
) -> tuple[str, list[str]]:
    """`key-1` made nothing and is in doubt beside `key-2`, which made a run; the run, and the runs
    that `key-1` may have become as soon as all of these are listed."""
    change(flora, **GATEWAY)
    assert await attempt(services, "key-1") is None
    change(flora, gateway_starts=0.0, **LOST)
    assert await attempt(services, "key-2") is None
    change(flora, lost_starts=0.0)
    [run_id] = flora.world.runs
    clock.move(200)
    await services.recovery.recover()
    assert await _possible(services) is None  # a run may be listed late
    clock.move(60)
    await services.recovery.recover()
    return run_id, sorted(await _possible(services) or ())


async def _possible(services: Services, key: str = "key-1") -> frozenset[str] | None:
    [row] = await start_log.of_key(services.database, key)
    return row.possible_runs


async def _became(services: Services, key: str, run_id: str) -> None:
    [row] = await start_log.of_key(services.database, key)
    await services.resolver.is_run(row, run_id)


async def test_a_run_that_is_listed_after_the_window_holds_up_nothing(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """While a technique is in use there is always a run that is not accounted for yet: a start
    waits for those alone that were listed when FLORA was done with it."""
    async with make_flora() as flora:
        services = await open_on(flora)
        run_id, possible = await _in_doubt_beside_a_run(services, flora, clock)
        assert possible == [run_id]
        flora.start("icon-pack")  # someone else's
        again = await open_on(flora)
        clock.move(60)
        await again.recovery.recover()
        assert await state_of(services.database) == "in_doubt"
        await _became(again, "key-2", run_id)
        clock.move(120)
        assert await again.recovery.recover() == 1
        assert await attempt(services, "key-1") == list(flora.world.runs)[-1]
        assert (len(flora.world.runs), posts(flora)) == (3, 3)


async def test_a_run_that_is_listed_within_a_minute_of_the_window_may_be_the_starts(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """FLORA made it at the last moment: it is not paid again, whatever becomes of the others."""
    async with make_flora(**LOST) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        other = flora.start("icon-pack").run_id
        [ours] = flora.world.runs.keys() - {other}
        unlisted = flora.world.runs.pop(ours)
        clock.move(181)
        await services.recovery.recover()  # would send it again, were it not for the other
        clock.move(58)
        flora.world.runs[ours] = unlisted
        for moved in (2, 60, 120):
            clock.move(moved)
            await services.recovery.recover()
        assert await _possible(services) == {other, ours}
        await services.tracker.track(other)
        for _ in range(8):
            clock.move(100)
            await services.recovery.recover()
        assert posts(flora) == 1


async def test_a_clock_that_is_set_lists_no_run(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """The runs that a start may have become are known once the time has really passed."""
    async with make_flora(**LOST) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        began = clock.seconds()
        clock.set(300)

        async def takes_long(_: list[str]) -> None:
            clock.move(19)

        on_history(services, takes_long)
        all_runs = {*flora.world.runs}
        for passed, possible in ((100, None), (200, None), (225, None), (241, all_runs)):
            clock.move(began + passed - clock.seconds())
            await services.recovery.recover()
            clock.set(120)
            assert await _possible(services) == possible


async def test_a_start_that_is_sent_again_may_have_become_other_runs(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """What it may have become of the first request is no word about the second."""
    async with make_flora() as flora:
        services = await open_on(flora)
        run_id, _ = await _in_doubt_beside_a_run(services, flora, clock)
        await _became(services, "key-2", run_id)
        change(flora, **LOST)
        clock.move(120)
        await services.recovery.recover()
        change(flora, lost_starts=0.0)
        assert await _possible(services) is None
        await _recover_for_long(services, clock)
        assert await _possible(services) == {list(flora.world.runs)[-1]}
        assert (len(flora.world.runs), posts(flora)) == (2, 3)


async def test_a_possible_run_that_is_listed_no_more_may_be_the_starts_all_the_same(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """It is not paid again, and a person is told of it."""
    async with make_flora() as flora:
        services = await open_on(flora)
        run_id, _ = await _in_doubt_beside_a_run(services, flora, clock)
        flora.world.delete([run_id])
        await _recover_for_long(services, clock)
        clock.move(2 * HOUR)
        await services.recovery.recover()
        assert (posts(flora), await state_of(services.database)) == (2, "unresolved")
        [row] = await start_log.of_key(services.database, "key-1")
        assert row.error is not None
        assert run_id in row.error["message"]


async def test_the_run_of_a_used_key_is_the_one_that_is_left(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A run that another start is found to have become is not this one's, and one that is listed
    later was started later."""
    async with make_flora(idempotency="conflict", lost_starts=1.0) as flora:
        services = await open_on(flora)
        for key in ("key-1", "key-2"):
            assert await attempt(services, key) is None
        change(flora, lost_starts=0.0)
        ours, others = flora.world.runs
        await _send_again(services)
        clock.move(241)
        await services.recovery.recover()
        flora.start("icon-pack")  # someone else's
        for _ in range(3):
            clock.move(100)
            assert await services.recovery.recover() == 0
        await _became(services, "key-2", others)
        clock.move(120)
        assert await services.recovery.recover() == 1
        assert await attempt(services) == ours
        assert len(flora.world.runs) == 3


@pytest.mark.parametrize("status", ["queued", "on_hold"])
async def test_a_run_id_is_all_that_an_answer_needs(
    make_flora: MakeFlora, open_on: OpenServices, status: str
) -> None:
    """A status that nobody has heard of is no reason to send again."""
    async with make_flora(queued=1.0, queued_name=status) as flora:
        services = await open_on(flora)
        assert await attempt(services) == next(iter(flora.world.runs))
        assert posts(flora) == 1


@pytest.mark.parametrize("code", ["not_found", "forbidden"])
async def test_a_filter_that_is_refused_says_nothing_about_the_workspace(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, code: str
) -> None:
    """The history is read without it, the start comes to its end, and everything else goes on."""
    async with make_flora(**GATEWAY, refuse={"filtered": code}) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        clock.move(200)
        assert await services.recovery.recover() == 1
        [workspace] = services.workspaces
        assert not workspace.require_client().breaker.open
        asked = reads_of(flora)["runs.list"]
        for _ in range(20):
            clock.move(30)
            await services.recovery.recover()
        assert reads_of(flora)["runs.list"] == asked


async def test_open_starts_cost_few_requests(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """One in doubt that cannot be settled is looked for less and less often."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        clock.move(1)
        flora.start("icon-pack")
        change(flora, gateway_starts=0.0)
        for _ in range(4 * 60 * 2):
            clock.move(15)
            await services.recovery.recover()
        assert await state_of(services.database) == "unresolved"
        assert reads_of(flora)["runs.list"] < 100


# Whose key it is


def moved(flora: Simulator, **more: Any) -> dict[str, Any]:
    """The same workspace, under `[[workspaces]]`."""
    options = flora.world.options
    one = {
        "id": options.workspace_id,
        "api_key": options.api_key,
        "webhook_secrets": [options.webhook_secret],
    }
    return {"flora_api_key": None, "flora_webhook_secret": (), "workspaces": (one,)} | more


async def test_a_workspace_that_moves_in_the_settings_keeps_its_keys(
    flora: Simulator, open_on: OpenServices, clock: HandClock
) -> None:
    """From FLORA_API_KEY to `[[workspaces]]`: the same key is the same run, also when FLORA has
    forgotten it."""
    first = await attempt(await open_on(flora))
    assert first is not None
    clock.move(25 * HOUR)
    assert await attempt(await open_on(flora, **moved(flora))) == first
    assert len(flora.world.runs) == 1


OTHER = SimulatedWorkspace(
    workspace_id="ws_other", api_key="sk_test_other", webhook_secret="whsec_other"
)


async def test_another_workspaces_key_in_the_same_place_has_keys_of_its_own(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """It is not given the first one's runs."""
    async with make_flora(more_workspaces=(OTHER,)) as flora:
        first = await attempt(await open_on(flora))
        second = await attempt(await open_on(flora, flora_api_key=OTHER.api_key))
        assert None not in (first, second)
        assert first != second
        assert flora.world.runs[second or ""].workspace.workspace_id == "ws_other"


async def test_a_key_of_another_workspace_than_the_settings_say_starts_nothing(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """It is noticed before the first start, also where the id was known before."""
    async with make_flora(more_workspaces=(OTHER,)) as flora:
        services = await open_on(
            flora, flora_api_key=OTHER.api_key, flora_workspace_id="ws_simulator"
        )
        with pytest.raises(Exception, match="ws_other"):
            await services.starter.start(request())
        assert not flora.world.runs


async def test_of_a_key_that_sees_two_workspaces_one_is_tracked(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Starts, pages of due runs, sweeps, verify, and the search for a start's run: none of them
    meets the runs of the other."""
    async with make_flora(more_workspaces=(OTHER,), shared_key=True) as flora:
        services = await open_on(flora, flora_workspace_id="ws_simulator")
        [workspace] = services.workspaces
        ours = {await attempt(services, f"key-{number}") for number in range(3)}
        for _ in range(150):
            flora.start("icon-pack", workspace=OTHER)
        clock.move(61)
        assert (await services.poller.poll_due()).settled == 3
        report = await services.sweeper.sweep(workspace)
        assert (report.error, report.pages) == (None, 2)  # the first showed the other's runs
        clock.move(HOUR)
        change(flora, **GATEWAY)
        assert await attempt(services, "in doubt") is None
        change(flora, gateway_starts=0.0)
        flora.start("icon-pack", workspace=OTHER)
        clock.move(200)
        assert await services.recovery.recover() == 1
        ours.add(await attempt(services, "in doubt"))
        clock.move(61)
        await services.poller.poll_due()
        verified = await services.verifier.verify(workspace, since=timedelta(days=1))
        assert (verified.error, verified.differences) == (None, [])
        async with services.database.read() as connection:
            assert set(await connection.scalars(select(runs.c.run_id))) == ours


async def test_of_a_key_that_sees_two_workspaces_another_one_may_be_tracked(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """If the settings say so; one that it does not see may not."""
    async with make_flora(more_workspaces=(OTHER,), shared_key=True) as flora:
        services = await open_on(flora, flora_workspace_id="ws_zzz")
        with pytest.raises(SettingsError, match="is of workspace ws_simulator, ws_other"):
            await services.starter.start(request())
        assert not flora.world.runs
        for number, named in enumerate(("ws_simulator", "ws_other", "ws_simulator")):
            services = await open_on(flora, flora_workspace_id=named)
            assert await attempt(services, f"key-{number}") is not None
            assert await start_log.get(services.database, named, f"key-{number}") is not None
        services = await open_on(flora, flora_workspace_id="ws_zzz")
        with pytest.raises(SettingsError, match="is of workspace ws_simulator"):
            await services.starter.start(request())
        assert len(flora.world.runs) == 3


async def test_of_a_key_that_sees_two_workspaces_one_has_to_be_named(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Nothing is started, and a sweep says what to set."""
    async with make_flora(more_workspaces=(OTHER,), shared_key=True) as flora:
        services = await open_on(flora)
        flora.start("icon-pack")
        flora.start("icon-pack", workspace=OTHER)
        with pytest.raises(SettingsError, match="FLORA_WORKSPACE_ID"):
            await services.starter.start(request())
        [workspace] = services.workspaces
        report = await services.sweeper.sweep(workspace)
        assert "shows runs of workspace" in str(report.error)
        assert "FLORA_WORKSPACE_ID" in str(report.error)
        assert len(flora.world.runs) == 2


async def test_without_an_id_nothing_is_started(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Where FLORA does not tell whose key it is, the settings have to."""
    async with make_flora(refuse={"workspaces.list": "not_found"}) as flora:
        services = await open_on(flora)
        with pytest.raises(Exception, match="FLORA_WORKSPACE_ID"):
            await services.starter.start(request())
        assert not flora.world.runs
        named = await open_on(flora, flora_workspace_id="ws_simulator")
        assert await attempt(named) is not None


async def _ask_for(services: Services, workspace_id: str) -> None:
    """Each way to start something, or to track it, in a workspace that is named."""
    with pytest.raises((InvalidRequest, FloraError, SettingsError)) as first:
        await services.starter.start(request(workspace_id=workspace_id))
    sheet = sheet_of_objects([(1, {"prompt": "a"})])
    for asked in (
        services.batches.plan("icon-pack", sheet, name="one", workspace_id=workspace_id),
        services.tracker.track("run_1", workspace_id=workspace_id),
        services.tracker.track_shown("run_1", workspace_id=workspace_id),
    ):
        with pytest.raises(type(first.value)):
            await asked
    raise first.value


async def test_nothing_is_started_in_another_workspace_than_the_one_named(
    make_flora: MakeFlora, open_on: OpenServices, hurry: Hurry
) -> None:
    """FLORA is asked for the id of the key's own once, and only where an id is named; a process
    that starts later knows it from the database."""
    async with make_flora() as flora:
        change(flora, refuse={"workspaces.list": "not_found"})
        with pytest.raises(SettingsError, match="FLORA_WORKSPACE_ID"):
            await _ask_for(await open_on(flora), "ws_zzz")
        change(flora, refuse={})
        flora.world.counts.clear()
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="ws_zzz is not configured here"):
                await _ask_for(await open_on(flora), "ws_zzz")
        assert not flora.world.runs
        assert flora.world.counts == {("workspaces.list", 200): 1}
        assert await attempt(await open_on(flora), workspace_id="ws_simulator") is not None
        unasked = await open_on(flora)
        hurry(unasked, flora)
        unasked.workspaces.rotate("default", api_key="sk_test_another", secrets=())
    with pytest.raises(FloraError, match="no answer"):
        await _ask_for(unasked, "ws_simulator")


async def test_a_restart_knows_whose_key_it_is(flora: Simulator, open_on: OpenServices) -> None:
    """FLORA is asked once for each key."""
    await attempt(await open_on(flora))
    again = await open_on(flora)
    change(flora, refuse={"workspaces.list": "not_found"})
    assert await attempt(again, "key-2") is not None
    asked = [count for (name, _), count in flora.world.counts.items() if name == "workspaces.list"]
    assert asked == [1]


async def test_starts_of_an_older_version_get_the_id(
    flora: Simulator, open_on: OpenServices
) -> None:
    """Their keys are remembered, whatever the place was called."""
    first = await attempt(await open_on(flora))
    services = await open_on(flora)
    old = starts.update().values(workspace_slot="default", workspace_id=None)
    await services.database.write(lambda connection: connection.execute(old).rowcount)
    again = await open_on(flora)
    assert await attempt(again) == first
    row = await start_log.get(again.database, "ws_simulator", "key-1")
    assert row is not None
    assert row.workspace_id == "ws_simulator"


# The fence


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


async def test_a_database_whose_clock_is_set_pays_nothing_twice(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases and windows of starts that FLORA is at work on seem to be over then."""
    options = Options(slow_starts=1.0, slow_seconds=3.0, slow_run="last", keys_known="at_end")
    async with running(options) as flora, AsyncExitStack() as stack:
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
        ahead = func.clock_timestamp() + timedelta(hours=1)
        monkeypatch.setattr(store_clock, "_ASK", select(ahead))
        for services in (two, one):
            assert services.clock.is_servers
            await services.clock.check()
            await services.recovery.recover()
        assert (await starting).record.run.run_id in flora.world.runs
        assert (posts(flora), len(flora.world.runs)) == (1, 1)


async def test_a_sleep_between_the_database_and_the_socket_sends_nothing(
    flora: Simulator, open_on: OpenServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is checked last of all, by a clock that goes on while the machine sleeps."""
    from tracker.starting import sending

    services = await open_on(flora)
    slept = 0.0
    real = sending.boot_seconds
    monkeypatch.setattr(sending, "boot_seconds", lambda: real() + slept)
    mark_sent = start_log.mark_sent

    async def mark_and_sleep(*given: Any, **named: Any) -> Any:
        nonlocal slept
        row = await mark_sent(*given, **named)
        slept = HOUR
        return row

    monkeypatch.setattr(start_log, "mark_sent", mark_and_sleep)
    assert await attempt(services) is None
    assert not flora.world.runs


# Answers


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


# Callbacks to the start's own address


@asynccontextmanager
async def receiving(
    flora: Simulator, database_url: str, **settings: Any
) -> AsyncIterator[Services]:
    """Services that FLORA can call back, in real time, and no worker."""
    port = free_port()
    options = flora.world.options
    given: dict[str, Any] = {
        "flora_base_url": flora.base_url,
        "flora_api_key": options.api_key,
        "flora_webhook_secret": options.webhook_secret,
        "tracker_database_url": database_url,
        "tracker_public_url": f"http://127.0.0.1:{port}",
    }
    async with (
        open_services(Settings(**(given | settings)), background=True) as services,
        serving(build_app(services), port),
    ):
        yield services


@pytest.mark.parametrize("trouble", [{"lost_starts": 1.0}, {"gateway_starts": 1.0}])
async def test_a_callback_resolves_its_start_within_a_second(
    database_url: str, trouble: dict[str, float]
) -> None:
    """Two starts in doubt of one technique: each run is the one of its own address."""
    async with (
        running(Options(failures=0.0, run_seconds=2.0, seed=5, **trouble)) as flora,
        receiving(flora, database_url) as services,
    ):
        keys = [f"key-{number}" for number in range(6)]
        inputs = {key: [{"id": "prompt", "type": "text", "value": key}] for key in keys}
        resolved: dict[str, int] = {}

        async def all_are_resolved() -> bool:
            for key in inputs.keys() - resolved.keys():
                if await state_of(services.database, key) == "started":
                    resolved[key] = int(utc_now().timestamp() * 1000)
            return len(resolved) == len(keys)

        resolving = asyncio.create_task(eventually(all_are_resolved, timeout=30, interval=0.005))
        for key in keys:
            assert await attempt(services, key, inputs=inputs[key]) is None
        await resolving
        await flora.quiet()
        sent: dict[str, int] = {}
        for delivery in flora.world.deliveries:
            run = flora.world.runs[delivery.run_id]
            sent.setdefault(run.inputs[0]["value"], delivery.at_ms)
        took = {key: resolved[key] - sent[key] for key in keys}
        assert all(0 <= one < 1000 for one in took.values()), took
        for key in keys:
            run_id = await attempt(services, key, inputs=inputs[key])
            assert run_id is not None
            assert list(flora.world.runs[run_id].inputs) == inputs[key]
            record = await the_run(services, run_id)
            assert (record.source, record.inputs) == (Source.START, inputs[key])
        assert posts(flora) == len(flora.world.runs) == 6


async def test_each_start_has_an_address_of_its_own(database_url: str) -> None:
    """It is sent again as it was first sent, also under another public URL."""
    async with running(Options(failures=0.0, **GATEWAY)) as flora:
        async with receiving(flora, database_url) as services:
            first = services.settings.callback_url
            assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        async with receiving(flora, database_url, tracker_start_doubt=1) as services:
            assert services.settings.callback_url != first
            await asyncio.sleep(1.2)
            assert await services.recovery.recover() == 1
            assert await attempt(services, "key-2") is not None
            one, two = (run.callback_url or "" for run in flora.world.runs.values())
            assert one.startswith(f"{first}/")
            assert two.startswith(f"{services.settings.callback_url}/")
            assert one.rpartition("/")[2] != two.rpartition("/")[2]
            assert all(len(url.rpartition("/")[2]) >= 32 for url in (one, two))


async def test_an_unknown_address_counts_as_the_bare_one(database_url: str) -> None:
    """The callback is taken, and is evidence of nothing."""
    async with (
        running(Options(failures=0.0, run_seconds=0.2, **GATEWAY)) as flora,
        receiving(flora, database_url) as services,
    ):
        assert await attempt(services) is None
        run = flora.start("icon-pack", callback_url=f"{services.settings.callback_url}/nobody")
        await flora.quiet()

        async def is_known() -> bool:
            return run.run_id in [one.run.run_id for one in (await _listed(services.database))]

        await eventually(is_known)
        assert (await the_run(services, run.run_id)).source is Source.CALLBACK
        assert await state_of(services.database) == "in_doubt"


async def _listed(database: Database) -> Any:
    from tracker.store.queries import runs as read

    return (await read.list_runs(database, limit=100))[0]


async def test_a_secret_of_another_workspace_names_no_run(database_url: str) -> None:
    """Its callback to a start's address is a callback to the bare one."""
    both = Options(failures=0.0, run_seconds=0.2, more_workspaces=(OTHER,), **GATEWAY)
    async with running(both) as flora:
        other = {
            "id": "ws_other",
            "api_key": OTHER.api_key,
            "webhook_secrets": [OTHER.webhook_secret],
        }
        settings = {"flora_workspace_id": "ws_simulator", "workspaces": (other,)}
        async with receiving(flora, database_url, **settings) as services:
            assert await attempt(services, workspace_id="ws_simulator") is None
            row = await start_log.get(services.database, "ws_simulator", "key-1")
            assert row is not None
            run = flora.start("icon-pack", callback_url=row.callback_url, workspace=OTHER)
            await flora.quiet()

            async def is_known() -> bool:
                return any(one.run.run_id == run.run_id for one in await _listed(services.database))

            await eventually(is_known)
            assert (await the_run(services, run.run_id)).inputs is None
            assert await state_of(services.database) == "in_doubt"


async def test_five_missing_callbacks_bring_back_the_bare_address(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy may pass on the exact path alone. An hour later own addresses are tried again. Of
    many runs only the newest count."""
    async with make_flora(drop=1.0) as flora:
        services = await open_on(flora, tracker_public_url="http://127.0.0.1:9")
        bare = "http://127.0.0.1:9/callbacks/flora"
        for number in range(5):
            run_id = await attempt(services, f"key-{number}")
            assert run_id is not None
            assert (flora.world.runs[run_id].callback_url or "").startswith(f"{bare}/")
        clock.move(600)
        await services.poller.poll_due()
        clock.move(600)
        services.starter.sender.addresses._checked_at = float("-inf")
        run_id = await attempt(services, "key-5")
        assert flora.world.runs[run_id or ""].callback_url == bare
        with monkeypatch.context() as patch:
            assert await start_log.own_are_missing(services.database, now=clock())
            patch.setattr(start_log, "AMONG", 1)  # which has the bare address
            assert not await start_log.own_are_missing(services.database, now=clock())
        clock.move(HOUR)
        services.starter.sender.addresses._checked_at = float("-inf")
        run_id = await attempt(services, "key-6")
        assert (flora.world.runs[run_id or ""].callback_url or "").startswith(f"{bare}/")


async def test_a_dead_process_leaves_doubt(
    flora: Simulator, open_on: OpenServices, clock: HandClock
) -> None:
    """What it was sending is in doubt as soon as its lease has run out."""
    services = await open_on(flora)
    [workspace] = services.workspaces
    technique_id = await services.catalogue.technique_id(workspace, "icon-pack")
    db = services.database
    await services.workspaces.id_of(workspace)
    from tracker.starting.start import fingerprint

    await start_log.reserve(
        db,
        workspace_id="ws_simulator",
        idempotency_key="key-1",
        technique_id=technique_id,
        fingerprint=fingerprint(technique_id, PROMPT),
        inputs=PROMPT,
        at=clock(),
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
