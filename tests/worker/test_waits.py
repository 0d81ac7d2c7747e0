"""A wait that FLORA asks of one process, and the others on its database."""

import pytest

from tests.support.clocks import HandClock
from tests.worker.conftest import MakeFlora, OpenServices
from tracker.core.errors import KeyRefused, RateLimited
from tracker.flora.client import FloraClient
from tracker.services import Services
from tracker.simulator import Simulator


def client_of(services: Services) -> FloraClient:
    [workspace] = services.workspaces
    return workspace.require_client()


def go_by(clock: HandClock, services: Services) -> None:
    """Let the client go by the test's clock, which its waits advance."""

    async def sleep(seconds: float) -> None:
        clock.move(seconds)

    caller = client_of(services)
    for one in (caller, caller.request_limit):
        one.monotonic, one.sleep = lambda: clock().timestamp(), sleep


async def test_a_wait_that_flora_asks_for_holds_for_all_processes(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """FLORA asks a server to wait for a minute. A command that runs beside it sends nothing
    before that is over, and one that cannot wait so long gives up without asking."""
    async with make_flora(rate_limit=1.0, retry_after=60, seed=SAYS_HOW_LONG) as flora:
        server, command = await open_on(flora), await open_on(flora)
        for one in (server, command):
            go_by(clock, one)
        with pytest.raises(RateLimited) as refusal:
            await client_of(server).history(deadline=30)
        assert refusal.value.retry_after == 60
        flora.world.options = flora.world.options.with_changes({"rate_limit": 0})
        with pytest.raises(RateLimited):
            await client_of(command).history(deadline=20)
        assert len(flora.world.request_log) == 1
        await client_of(command).history(deadline=90)
        told, asked = flora.world.request_log
        assert asked.at_ms - told.at_ms >= 60_000


SAYS_HOW_LONG = 0
"""A seed whose first refusal names the wait."""


async def test_a_wait_kept_under_another_clock_stops_nobody(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """A wait that seems to last longer than FLORA's longest is none: a clock was set back."""
    services = await open_on(flora)
    await client_of(services).request_limit.shared.share(60)
    clock.move(-3600)
    await client_of(services).history(deadline=5)


async def test_a_refused_key_stops_no_other_key(
    open_on: OpenServices, flora: Simulator, clock: HandClock
) -> None:
    """A process whose key FLORA refuses asks no other process to wait: one with the key that FLORA
    takes goes on, and so does the first at once when it has that key."""
    late, early = await open_on(flora), await open_on(flora, flora_api_key="sk_test_new")
    for one in (late, early):
        go_by(clock, one)
    flora.world.change({"api_key": "sk_test_new"})
    for _ in range(3):  # the first is refused by FLORA, the others by the breaker
        with pytest.raises(KeyRefused):
            await client_of(late).history(deadline=5)
    began = clock()
    await client_of(early).history(deadline=5)
    client_of(late).rotate_key("sk_test_new")
    await client_of(late).history(deadline=5)
    assert clock() == began
