"""The demo: the whole tracker at work against a local FLORA, checked against that FLORA's records.

A simulator and a tracker are served over HTTP on free loopback ports, in one process, so that
nothing is left behind however it ends. Between them there is nothing but HTTP and a SQLite file in
a temporary directory. A dozen runs are started, some callbacks get lost, all runs settle, and
`report.py` compares what the tracker stored with what the simulator did.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx

from tracker.core.errors import TrackerError
from tracker.demo.report import DemoDisplay, RunComparison, compare_runs
from tracker.operations.logs import configure_logs
from tracker.services import Services, open_services
from tracker.settings import load_settings
from tracker.simulator import Options, Simulator, running
from tracker.web.app import build_app
from tracker.web.http.server import Server, listen
from tracker.worker.scheduler import Worker

_FLORA: Final = Options(
    seed=31, run_seconds=7, failures=0.2, drop=0.4, duplicate=0.2, reorder=0.2, bad_signature=0.2
)
"""Two callbacks of five get lost; of the others some come twice, out of order, or after a forged
one."""

_TECHNIQUES: Final = 2 * (
    "cctv-cam",
    "icon-pack",
    "palette-pull",
    "earth-zoom-out",
    "tarot-pull",
    "character-lock",
)
_UNREPORTED_TECHNIQUE: Final = "studio-shot"
"""The technique of a run that is started past the tracker, which only the history shows."""

_SECONDS_BETWEEN_STARTS: Final = 0.3
_REFRESH_SECONDS: Final = 0.25
_TIMEOUT: Final = 55.0


def run(*, as_json: bool = False) -> int:
    """Run the demo; 0 where tracker and simulator agree, 1 where they do not.

    Raises `TrackerError` where it takes longer than 55 seconds.
    """
    configure_logs(level="error")  # the forged callbacks of the demo would log warnings
    display = DemoDisplay(sys.stderr if as_json else sys.stdout)
    comparisons = asyncio.run(_run(display))
    if as_json:
        display.show_json(comparisons)
    else:
        display.show_result(comparisons)
    return 1 if any(one.differences for one in comparisons) else 0


@asynccontextmanager
async def _open_environment() -> AsyncIterator[tuple[Simulator, Services, httpx.AsyncClient]]:
    """A simulator, a tracker that uses it, and a client of the tracker's API."""
    with TemporaryDirectory(prefix="tracker-demo-") as folder:
        async with running(_FLORA) as simulator:
            with listen("127.0.0.1", 0, local_only=True) as sockets:
                address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
                settings = load_settings(
                    simulator.environment
                    | {
                        "TRACKER_DATABASE_URL": f"sqlite:///{Path(folder) / 'tracker.db'}",
                        "TRACKER_PUBLIC_URL": address,
                        # Shorter waits than in production, so that the demo is short.
                        "TRACKER_CALLBACK_GRACE": "6",
                        "TRACKER_POLL_INTERVAL": "1",
                        "TRACKER_POLL_INTERVAL_MAX": "4",
                    }
                )
                async with (
                    open_services(settings, background=True) as services,
                    _serving(services, sockets),
                    httpx.AsyncClient(base_url=address, trust_env=False, timeout=15) as api,
                ):
                    yield simulator, services, api


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


async def _run(display: DemoDisplay) -> list[RunComparison]:
    try:
        async with asyncio.timeout(_TIMEOUT), _open_environment() as (simulator, services, api):
            with display.live():
                starting = asyncio.create_task(_start_runs(simulator, api))
                try:
                    runs = await _wait_until_settled(services, api, display, starting)
                finally:
                    starting.cancel()
            return compare_runs(runs, simulator.world.records())
    except TimeoutError as error:
        raise TrackerError(f"the demo did not finish within {_TIMEOUT:g} s") from error


async def _start_runs(simulator: Simulator, api: httpx.AsyncClient) -> None:
    """Start a dozen runs through the tracker's API, and one that it is not told about."""
    simulator.start(_UNREPORTED_TECHNIQUE)
    for slug in _TECHNIQUES:
        body = {"technique": slug, "inputs": simulator.world.sample_request(slug).inputs}
        answer = await api.post("/api/runs", json=body)
        if answer.status_code != 201:
            raise TrackerError(f"a start was answered {answer.status_code}: {answer.text}")
        await asyncio.sleep(_SECONDS_BETWEEN_STARTS)


async def _wait_until_settled(
    services: Services, api: httpx.AsyncClient, display: DemoDisplay, starting: "asyncio.Task[None]"
) -> list[Mapping[str, Any]]:
    """Read the tracker's list until all runs are there and settled; return the last one read."""
    swept = False
    while True:
        answer = await api.get("/api/runs", params={"limit": 100})
        runs: list[Mapping[str, Any]] = answer.raise_for_status().json()["runs"][::-1]
        display.update(runs)
        if starting.done():
            starting.result()
            settled = all(one["tracking"] == "settled" for one in runs)
            if settled and len(runs) > len(_TECHNIQUES):
                return runs
            if settled and not swept:
                # As `tracker reconcile` does; it finds the run that the tracker was not told about.
                (workspace,) = services.workspaces
                await services.sweeper.sweep(workspace)
                swept = True
        await asyncio.sleep(_REFRESH_SECONDS)
