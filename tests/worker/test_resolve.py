"""A person's word on what came of a start."""

import pytest

from tests.support.clocks import HandClock
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tests.worker.test_doubt import GATEWAY, PROMPT, attempt, change, state_of
from tracker.core.errors import InvalidRequest
from tracker.core.observation import Source
from tracker.services import Services
from tracker.starting.resolve import UnknownStart


async def leave_to_a_person(services: Services, clock: HandClock) -> None:
    """A start whose outcome nothing tells."""
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
        with pytest.raises(InvalidRequest, match="FLORA has no run"):
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
