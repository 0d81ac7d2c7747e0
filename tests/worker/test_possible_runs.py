"""Which runs a start in doubt may have become, whatever the history and the clocks show."""

import json

import httpx
import pytest

from tests.support.clocks import HandClock
from tests.support.shares import shared
from tests.worker.conftest import MakeFlora, OpenServices, on_history, reads_of
from tests.worker.doubt import (
    GATEWAY,
    HOUR,
    LOST,
    attempt,
    change,
    posts,
    send_again,
    state_of,
    sweep,
)
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.store.queries import starts as start_log
from tracker.store.schema import starts


async def _recover_for_long(services: Services, clock: HandClock) -> None:
    """For longer than FLORA may be at work; not so long that a person is asked."""
    for _ in range(8):
        clock.move(100)
        await services.recovery.recover()


@pytest.mark.parametrize(
    "known", [*shared([0, 5], of=2), pytest.param(1, marks=pytest.mark.thorough)]
)
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
        await sweep(services)
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
        await sweep(services)
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
        await sweep(services)
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
        await sweep(services)
        clock.move(61)
        change(flora, **LOST)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        await _recover_for_long(services, clock)
        assert (len(flora.world.runs), posts(flora)) == (3, 1)


@pytest.mark.parametrize("behind", shared([0, 10_800], of=2))
async def test_a_run_that_was_known_before_holds_up_nothing(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, behind: float
) -> None:
    """Whatever FLORA's clock says; nor do those from before the runs that were known."""
    async with make_flora(clock_offset=-behind, date_offset=behind) as flora:
        services = await open_on(flora)
        flora.start("icon-pack")
        clock.move(10 * 24 * HOUR)  # the first sweep does not read so far back
        colleagues = [flora.start("icon-pack").run_id for _ in range(5)]
        await sweep(services)
        clock.move(61)
        change(flora, **GATEWAY)
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        await _recover_for_long(services, clock)
        assert await attempt(services) == list(flora.world.runs)[-1]
        assert (len(flora.world.runs), len(colleagues)) == (7, 5)


@pytest.mark.parametrize(
    "technique", ["icon-pack", pytest.param(7, marks=pytest.mark.thorough), None]
)
@pytest.mark.parametrize("known", shared([False, True], of=2))
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

        workspace.require_client().http.event_hooks = {"response": [shown]}
        change(flora, keys_released=not known)
        assert await attempt(services) is None
        change(flora, lost_starts=0.0)
        if known:
            await send_again(services)
        sent = posts(flora)
        await _recover_for_long(services, clock)
        assert (len(flora.world.runs), posts(flora)) == (1, sent)
        clock.move(2 * HOUR)
        await services.recovery.recover()
        assert await state_of(services.database) == "unresolved"


@pytest.mark.parametrize("fields", shared([("status",), ("run_id", "technique_run_id")], of=2))
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
        await sweep(services)
        clock.move(3 * HOUR)
        change(flora, **GATEWAY, bad_runs=(bad.run_id,))
        assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        await _recover_for_long(services, clock)
        assert await attempt(services) == list(flora.world.runs)[-1]
        assert len(flora.world.runs) == 3


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
        await send_again(services)
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


@pytest.mark.parametrize("code", shared(["not_found", "forbidden"], of=2))
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
        for _ in range(2 * 60):
            clock.move(60)
            await services.recovery.recover()
        assert await state_of(services.database) == "unresolved"
        assert reads_of(flora)["runs.list"] < 100
