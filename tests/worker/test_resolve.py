"""A person's word on what came of a start."""

from datetime import timedelta

import pytest

from tests.support.clocks import HandClock
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tests.worker.doubt import GATEWAY, OTHER, PROMPT, attempt, change, posts, state_of, sweep
from tracker.core.errors import InvalidRequest, NotTracked, StartPending, StoreUnavailable
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.services import Services
from tracker.starting.resolve import UnknownStart
from tracker.store.queries import starts as start_log


async def leave_to_a_person(services: Services, clock: HandClock) -> None:
    """A start whose outcome stays unknown."""
    assert await attempt(services) is None
    clock.move(2 * 3600)
    await services.recovery.recover()
    assert await state_of(services.database) == "unresolved"


async def test_it_became_a_run(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """The run is ours from then on, with the inputs of the start."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        await leave_to_a_person(services, clock)
        run = flora.start("icon-pack")
        row = await services.resolver.find("key-1")
        with pytest.raises(NotTracked, match="FLORA has no run"):
            await services.resolver.is_run(row, "run_nobody")
        await services.resolver.is_run(row, run.run_id)
        record = await the_run(services, run.run_id)
        assert (record.source, record.inputs) == (Source.START, PROMPT)
        assert record.run.created_at is not None
        assert await attempt(services) == run.run_id
        with pytest.raises(InvalidRequest, match="is known"):
            await services.resolver.is_nothing(await services.resolver.find("key-1"))


async def test_nothing_was_started(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """The key may be used again, and starts a run."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        await leave_to_a_person(services, clock)
        await services.resolver.is_nothing(await services.resolver.find("key-1"))
        assert await state_of(services.database) == "refused"
        change(flora, gateway_starts=0.0)
        assert await attempt(services) == next(iter(flora.world.runs))


async def test_someone_elses_run_is_struck_off_all_starts(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """One in doubt is sent again, and the key of an unresolved one may be used again; one that may
    have become another run waits on."""
    async with make_flora(**GATEWAY, run_seconds=60.0) as flora:
        services = await open_on(flora)
        assert await attempt(services, "unresolved") is None
        colleagues = flora.start("icon-pack").run_id
        for _ in range(11):  # no callback shows any more whose it is
            clock.move(100)
            await services.recovery.recover()
        assert await state_of(services.database, "unresolved") == "unresolved"
        for key in ("doubt", "two"):
            assert await attempt(services, key) is None
        others = flora.start("icon-pack").run_id
        clock.move(250)
        await services.recovery.recover()
        for key in ("doubt", "two"):
            row = await services.resolver.find(key)
            assert row.possible_runs == {colleagues, others}
        await services.resolver.is_run(await services.resolver.find("two"), others)
        change(flora, gateway_starts=0.0)
        changed = await services.resolver.exclude(colleagues)
        assert {row.idempotency_key: row.state.value for row in changed} == {
            "unresolved": "refused",
            "doubt": "in_doubt",
        }
        with pytest.raises(InvalidRequest, match="no start without a known outcome"):
            await services.resolver.exclude(colleagues)
        clock.move(120)
        assert await services.recovery.recover() == 1
        assert len(flora.world.runs) == 3
        assert await attempt(services, "unresolved") == list(flora.world.runs)[-1]
        assert len(flora.world.runs) == 4


async def test_one_run_less_is_named(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A start that is left to a person may still have become the others."""
    async with make_flora(**GATEWAY, run_seconds=60.0) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        colleagues, others = (flora.start("icon-pack").run_id for _ in range(2))
        for _ in range(11):
            clock.move(100)
            await services.recovery.recover()
        [row] = await services.resolver.exclude(colleagues)
        assert (row.state.value, row.possible_runs) == ("unresolved", {others})
        assert row.error is not None
        assert row.error["message"].endswith(f"; it may have become {others}")


async def test_a_run_stays_struck_off_when_the_start_is_sent_again(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """What a person says holds for every request of the start."""
    async with make_flora(**GATEWAY, run_seconds=60.0) as flora:
        services = await open_on(flora)
        assert await attempt(services) is None
        colleagues = flora.start("icon-pack").run_id
        clock.move(250)
        await services.recovery.recover()
        [row] = await services.resolver.exclude(colleagues)
        assert row.state.value == "in_doubt"
        clock.move(120)
        await services.recovery.recover()  # sent again, and in doubt again
        assert posts(flora) == 2
        change(flora, gateway_starts=0.0)
        for _ in range(5):
            clock.move(100)
            await services.recovery.recover()
        assert await attempt(services) == list(flora.world.runs)[-1]
        assert len(flora.world.runs) == 2


async def test_a_decision_that_was_not_stored_is_an_error(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody is told that it was done; repeating it does it."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        await leave_to_a_person(services, clock)
        row = await services.resolver.find("key-1")

        async def fails(*_: object, **__: object) -> None:
            raise StoreUnavailable("the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(start_log, "mark", fails)
            with pytest.raises(StoreUnavailable, match="repeat it"):
                await services.resolver.is_nothing(row)
        assert await state_of(services.database) == "unresolved"
        await services.resolver.is_nothing(row)
        assert await state_of(services.database) == "refused"


async def test_nobody_decides_about_a_start_that_is_being_sent(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Its key would be free while a request with it is on its way."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        await leave_to_a_person(services, clock)
        row = await services.resolver.find("key-1")
        start = (row.workspace_id, "key-1", "sender")
        lease = timedelta(seconds=30)
        assert await start_log.take(services.database, *start, services.clock(), lease)
        with pytest.raises(StartPending):
            await services.resolver.is_nothing(row)
        assert await state_of(services.database) == "unresolved"


async def test_one_run_is_one_starts(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Another start's run is not given away, and a key that is not known has no start."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        await leave_to_a_person(services, clock)
        change(flora, gateway_starts=0.0)
        other = await attempt(services, "key-2")
        row = await services.resolver.find("key-1")
        with pytest.raises(InvalidRequest, match="key-2"):
            await services.resolver.is_run(row, other or "")
        with pytest.raises(UnknownStart):
            await services.resolver.find("key-3")


async def test_a_run_of_another_workspace_is_not_the_starts(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Also where no key reads it any more, and where both workspaces have used the same key; but a
    callback that claims a run decides nothing."""
    async with make_flora(**GATEWAY, more_workspaces=(OTHER,)) as flora:
        await leave_to_a_person(await open_on(flora), clock)
        change(flora, gateway_starts=0.0)
        services = await open_on(flora, flora_api_key=OTHER.api_key)
        started = await attempt(services)
        listed = flora.start("icon-pack", workspace=OTHER).run_id
        clock.move(5)
        await sweep(services)
        row = await services.resolver.find("key-1", workspace_id="ws_simulator")
        with pytest.raises(InvalidRequest, match="belongs to the start 'key-1' of workspace ws_o"):
            await services.resolver.is_run(row, started or "")
        with pytest.raises(InvalidRequest, match="is of workspace ws_other"):
            await services.resolver.is_run(row, listed)
        assert await state_of(services.database) == "unresolved"
        claim = Observation(
            run_id="run_x", source=Source.CALLBACK, at=clock(), workspace_id=OTHER.workspace_id
        )
        await services.writer.submit(Observed(observation=claim))
        assert (await services.resolver.is_run(row, "run_x")).run.run_id == "run_x"
