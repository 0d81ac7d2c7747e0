"""A wait that FLORA asks of one process, and the others on its database."""

import pytest

from tests.worker.conftest import HandClock, OpenServices
from tracker.core.errors import RateLimited
from tracker.flora.client import FloraClient
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running


def client_of(services: Services) -> FloraClient:
    [workspace] = services.workspaces
    return workspace.require_client()


async def test_a_wait_that_flora_asks_for_holds_for_all_processes(database_url: str) -> None:
    """FLORA tells a server to wait for a second. A command that runs beside it sends nothing
    before that is over, and one that cannot wait so long gives up without asking."""
    async with running(Options(rate_limit=1.0, seed=SAYS_A_SECOND)) as flora:
        settings = Settings(
            flora_base_url=flora.base_url,
            flora_api_key=flora.world.options.api_key,
            tracker_database_url=database_url,
        )
        async with (
            open_services(settings, background=True) as server,
            open_services(settings) as command,
        ):
            with pytest.raises(RateLimited) as refusal:
                await client_of(server).history(deadline=0.3)
            assert refusal.value.retry_after == 1
            flora.world.options = flora.world.options.with_changes({"rate_limit": 0})
            with pytest.raises(RateLimited):
                await client_of(command).history(deadline=0.2)
            assert len(flora.world.request_log) == 1
            await client_of(command).history()
        told, asked = flora.world.request_log
        assert asked.at_ms - told.at_ms >= 990


SAYS_A_SECOND = 0
"""A seed whose first refusal names a second."""


async def test_a_wait_kept_under_another_clock_stops_nobody(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """A wait that seems to last longer than FLORA's longest is none: a clock was set back."""
    services = await open_on(flora)
    await client_of(services).request_limit.pause_others(60)
    clock.move(-3600)
    await client_of(services).history(deadline=5)
