"""Fixtures: a clock to turn, a simulator without a socket, and a receiver of callbacks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from tests.simulator.receiver import Receiver
from tests.support.clocks import HandClock
from tracker.simulator import Options, build_app, running
from tracker.simulator.world import World


class SlowStarts:
    """Slow starts that last until `release()`; `waiting` counts those in progress."""

    def __init__(self) -> None:
        self.waiting = 0
        self._released = asyncio.Event()

    async def sleep(self, _: float) -> None:
        """Takes the place of the wait for some seconds."""
        self.waiting += 1
        await self._released.wait()
        self.waiting -= 1

    def release(self) -> None:
        """Lets them come to their end."""
        self._released.set()


class Flora(httpx.AsyncClient):
    """A client of a simulator that answers without a socket, with its world beside it."""

    world: World
    quiet: Callable[[], Awaitable[None]]
    """Waits until no callback and no work behind the gateway is left."""

    async def start(self, technique: str = "icon-pack", **body: object) -> httpx.Response:
        """Starts a run; the inputs are the icon pack's where none are given."""
        prompt = [{"id": "prompt", "type": "text", "value": "tools"}]
        content = {"inputs": prompt, "mode": "async"} | body
        return await self.post(f"/techniques/{technique}/runs", json=content)

    async def path(self, path: str, **query: str | int) -> Any:
        """The JSON of a route; one that begins with /simulator is the simulator's own."""
        root = self.world.root if path.startswith("/simulator/") else ""
        return (await self.get(root + path, params=query)).raise_for_status().json()

    async def set(self, after: float = 0, seconds: float = 0, **options: object) -> None:
        """Changes options over HTTP, `after` a number of seconds and for `seconds`."""
        url = f"{self.world.root}/simulator/faults"
        query = {"after": after, "seconds": seconds}
        (await self.post(url, params=query, json=options)).raise_for_status()


MakeFlora = Callable[..., Flora]
ServeFlora = Callable[..., Awaitable[Flora]]


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def slow_starts() -> Iterator[SlowStarts]:
    """Slow starts in the test's hand, for a world that sleeps by it."""
    held = SlowStarts()
    yield held
    held.release()


@pytest.fixture
async def make_flora(clock: HandClock) -> AsyncIterator[MakeFlora]:
    """Builds a simulator from options and gives its client."""
    async with AsyncExitStack() as stack:

        def make(**options: object) -> Flora:
            world = World(Options(**options), clock=clock)  # type: ignore[arg-type]
            app = build_app(world)
            flora = Flora(
                transport=httpx.ASGITransport(app),
                base_url="http://127.0.0.1:8750/api/v1",
                headers={"Authorization": f"Bearer {world.options.api_key}"},
            )
            flora.world = world
            stack.push_async_callback(app.state.sender.close)
            stack.push_async_callback(flora.aclose)
            return flora

        yield make


@pytest.fixture
async def serve_flora(clock: HandClock) -> AsyncIterator[ServeFlora]:
    """Serves a simulator over HTTP, in which no run fails by itself, and gives its client.

    Its clock is turned by hand; what it waits for in real time is divided by `speed`.
    """
    async with AsyncExitStack() as stack:

        async def serve(**options: object) -> Flora:
            chosen = Options(**({"failures": 0} | options))  # type: ignore[arg-type]
            simulator = await stack.enter_async_context(running(chosen, clock=clock))
            headers = {"Authorization": f"Bearer {chosen.api_key}"}
            flora = Flora(base_url=simulator.base_url, headers=headers)
            flora.world, flora.quiet = simulator.world, simulator.sender.idle
            return await stack.enter_async_context(flora)

        yield serve


@pytest.fixture
def flora(make_flora: MakeFlora) -> Flora:
    """A simulator in which nothing goes wrong."""
    return make_flora(failures=0)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A server on loopback that takes callbacks."""
    async with Receiver() as receiver:
        yield receiver
