"""The stage: a simulated FLORA and a tracker, each served over HTTP on a free loopback port."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Final

import httpx
from pydantic import SecretStr

from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running
from tracker.web.app import build_app
from tracker.web.http.server import Server, listen
from tracker.worker.scheduler import Worker

FLORA: Final = Options(
    seed=31, run_seconds=7, failures=0.2, drop=0.4, duplicate=0.2, reorder=0.2, bad_signature=0.2
)
"""A FLORA at which two callbacks of five get lost, and of the others some come twice, out of
order, or with a forged one before them."""
GRACE: Final = 6.0
INTERVAL: Final = 1.0
INTERVAL_MAX: Final = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the play has. `api` reaches the tracker's HTTP side, `flora` the simulator's root."""

    simulator: Simulator
    services: Services
    api: httpx.AsyncClient
    flora: httpx.AsyncClient


@asynccontextmanager
async def open_stage() -> AsyncIterator[Stage]:
    """Serve both; afterwards nothing of them is left."""
    with TemporaryDirectory(prefix="tracker-demo-") as folder:
        async with running(FLORA) as simulator:
            with listen("127.0.0.1", 0, local_only=True) as sockets:
                address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
                settings = _settings(simulator, address, Path(folder))
                async with (
                    open_services(settings, background=True) as services,
                    _serving(services, sockets),
                    _client(address) as api,
                    _client(simulator.root) as flora,
                ):
                    yield Stage(simulator=simulator, services=services, api=api, flora=flora)


def _settings(simulator: Simulator, address: str, folder: Path) -> Settings:
    """A deployment's settings in small: waits are seconds, so that the demo is short."""
    options = simulator.world.options
    return Settings(
        flora_api_key=SecretStr(options.api_key),
        flora_base_url=simulator.base_url,
        flora_webhook_secret=(SecretStr(options.webhook_secret),),
        tracker_database_url=f"sqlite:///{folder / 'tracker.db'}",
        tracker_public_url=address,
        tracker_callback_grace=GRACE,
        tracker_poll_interval=INTERVAL,
        tracker_poll_interval_max=INTERVAL_MAX,
    )


@asynccontextmanager
async def _serving(services: Services, sockets: list[socket]) -> AsyncIterator[None]:
    """The receiver, the API and the worker, as `tracker serve` runs them."""
    ready = asyncio.Event()
    server = Server(build_app(services), on_ready=ready.set)
    serving = asyncio.create_task(server.serve(sockets=sockets))
    worker = Worker(services)
    try:
        await ready.wait()
        await worker.start()
        yield
    finally:
        server.stop()
        await serving
        await worker.stop()


def _client(root: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=root, trust_env=False, timeout=15)
