"""The simulator over real HTTP: inside a test, or alone until it is told to stop."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from tracker.core.clock import Clock, utc_now
from tracker.simulator.app import assemble
from tracker.simulator.callbacks import Courier
from tracker.simulator.faults import Connections
from tracker.simulator.options import Options, Workspace
from tracker.simulator.runs import SimulatedRun
from tracker.simulator.world import World


@dataclass(frozen=True, slots=True)
class Simulator:
    """A simulator that is being served. All of it lives in the loop that serves it."""

    world: World
    courier: Courier

    @property
    def root(self) -> str:
        """Where it is reached, without a path."""
        return self.world.root

    @property
    def base_url(self) -> str:
        """The API's root, as `FLORA_BASE_URL` takes it."""
        return f"{self.root}/api/v1"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a tracker, or FLORA's own SDK, uses this simulator."""
        options = self.world.options
        return {
            "FLORA_BASE_URL": self.base_url,
            "FLORA_API_KEY": options.api_key,
            "FLORA_WORKSPACE_ID": options.workspace_id,
            "FLORA_WEBHOOK_SECRET": options.webhook_secret,
        }

    def start(
        self,
        technique: str = "icon-pack",
        inputs: Sequence[Mapping[str, Any]] | None = None,
        *,
        callback_url: str | None = None,
        workspace: Workspace | None = None,
    ) -> SimulatedRun:
        """Starts a run as somebody else would, past the API and so untouched by its faults.

        Raises `LookupError` for a technique that is not in the catalogue.
        """
        found = self.world.technique(technique)
        if found is None:
            raise LookupError(f"there is no technique {technique}")
        run = self.world.start_technique(
            found,
            found.sample_inputs() if inputs is None else inputs,
            callback_url=callback_url,
            workspace=workspace,
        )
        self.courier.schedule(run)
        return run

    def start_generation(
        self, kind: str = "image", *, callback_url: str | None = None
    ) -> SimulatedRun:
        """Starts a generation run as somebody else would."""
        run = self.world.start_generation(kind, f"{kind}-standard", callback_url=callback_url)
        self.courier.schedule(run)
        return run

    async def quiet(self) -> None:
        """Waits until all runs have ended and every callback was taken or given up."""
        ends = [run.completed_ms for run in self.world.runs.values()]
        await asyncio.sleep(max(0, max(ends, default=0) - self.world.now_ms()) / 1000)
        await self.courier.idle()


@contextlib.asynccontextmanager
async def running(
    options: Options | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    clock: Clock = utc_now,
) -> AsyncIterator[Simulator]:
    """Serves a simulator over HTTP in this loop; port 0 takes a free one.

    Raises `OSError` where the address cannot be bound.
    """
    listener = socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
    )
    # asyncio does this only for sockets that it makes itself; without it each answer, which leaves
    # as head and body, waits 40 ms for the client's acknowledgement. Connections inherit it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    world = World(options or Options(), clock=clock, root=_root(host, listener.getsockname()[1]))
    courier, connections = Courier(world), Connections()
    server = _Server(
        uvicorn.Config(
            assemble(world, courier, connections),
            http=connections.protocol(),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        ready = asyncio.create_task(server.ready.wait())
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if serving.done():
            await serving
        yield Simulator(world, courier)
    finally:
        server.stop()
        await serving
        listener.close()


def serve(
    options: Options | None = None,
    host: str = "127.0.0.1",
    port: int = 8750,
    *,
    on_ready: Callable[[Simulator], None] | None = None,
) -> None:
    """Serves a simulator until SIGINT or SIGTERM. `on_ready` is called once it answers.

    Raises `OSError` where the address cannot be bound.
    """

    async def until_told() -> None:
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told.set)
        async with running(options, host=host, port=port) as simulator:
            if on_ready is not None:
                on_ready(simulator)
            await told.wait()

    asyncio.run(until_told())


def _root(host: str, port: int) -> str:
    reached = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


class _Server(uvicorn.Server):
    """A server that says when it is ready, stops when told, and leaves signals to its owner."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        # Not ten times a second, as a server that has to look for signals does.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 1)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
