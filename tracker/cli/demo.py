"""`tracker demo`: the tracker at work against a local FLORA, checked against that FLORA's records.

A simulator and a tracker are served over HTTP on free loopback ports, in one process, so that
nothing is left behind however it ends. Between them there is nothing but HTTP and a SQLite file in
a temporary directory. A dozen runs are started, some callbacks get lost, all runs settle, and what
the tracker stored is compared with what the simulator did.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx
import typer

from tracker.cli.output import note, print_json, print_table, screen
from tracker.cli.runs import RunScreen
from tracker.core.errors import TrackerError
from tracker.core.formatting import money
from tracker.operations.logs import configure_logs
from tracker.polling.follow import More
from tracker.services import Services, open_services
from tracker.settings import load_settings
from tracker.simulator import Options, Simulator, running
from tracker.web.app import build_app
from tracker.web.http.server import Server, listen
from tracker.worker import Worker

ApiRun = Mapping[str, Any]
"""A run as the tracker's API shows it."""
TrueRecord = Mapping[str, Any]
"""A run as the simulator's own list of records shows it."""

_FLORA: Final = Options(
    seed=31, run_seconds=7, failures=0.2, drop=0.4, duplicate=0.2, reorder=0.2, bad_signature=0.2
)
"""Two callbacks of five get lost; of the others some come twice, out of order, or after a forged
one."""
_SETTINGS: Final = {
    "TRACKER_CALLBACK_GRACE": "6",
    "TRACKER_POLL_INTERVAL": "1",
    "TRACKER_POLL_INTERVAL_MAX": "4",
}
"""Shorter waits than in production, so that the demo is short."""
_TECHNIQUES: Final = 2 * (
    *("cctv-cam", "icon-pack", "palette-pull"),
    *("earth-zoom-out", "tarot-pull", "character-lock"),
)
_UNREPORTED_TECHNIQUE: Final = "studio-shot"
"""The technique of a run that is started past the tracker, which only the history shows."""
_SECONDS_BETWEEN_STARTS: Final = 0.3
_TIMEOUT: Final = 55.0
_TIMES: Final = ("created_at", "started_at", "completed_at")


def run(*, as_json: bool) -> int:
    """Run the demo; 0 where tracker and simulator agree, 1 where they do not.

    Raises `TrackerError` where it takes longer than 55 seconds.
    """
    configure_logs(level="error")  # the forged callbacks of the demo would log warnings
    note("A local FLORA loses two callbacks of five; one run is started without the tracker.")
    comparisons = asyncio.run(_run())
    agree = not any(one.differences for one in comparisons)
    if as_json:
        runs = [
            {**one.run, "callback": one.callback, "differences": list(one.differences)}
            for one in comparisons
        ]
        print_json({"agree": agree, "runs": runs})
    else:
        _print_result(comparisons)
    return 0 if agree else 1


async def _run() -> "list[RunComparison]":
    started: list[str] = []

    async def more() -> tuple[list[str], bool]:
        new = started.copy()
        started.clear()
        return new, not starting.done()

    try:
        async with asyncio.timeout(_TIMEOUT), _open_environment() as (simulator, services, api):
            unreported = simulator.start(_UNREPORTED_TECHNIQUE)
            starting = asyncio.create_task(_start_runs(simulator, api, started))
            try:
                await _follow(services, more=more)
                await starting
            finally:
                starting.cancel()
            (workspace,) = services.workspaces
            await services.sweeper.sweep(workspace)  # as `tracker reconcile` does
            await _follow(services, unreported.run_id)
            answer = await api.get("/api/runs", params={"limit": 100})
            runs = answer.raise_for_status().json()["runs"][::-1]
            return compare_runs(runs, simulator.world.records())
    except TimeoutError as error:
        raise TrackerError(f"the demo did not finish within {_TIMEOUT:g} s") from error


@asynccontextmanager
async def _open_environment() -> AsyncIterator[tuple[Simulator, Services, httpx.AsyncClient]]:
    """A simulator, a tracker that uses it, and a client of the tracker's API."""
    with TemporaryDirectory(prefix="tracker-demo-") as folder:
        async with running(_FLORA) as simulator:
            with listen("127.0.0.1", 0, local_only=True) as sockets:
                address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
                own = {
                    "TRACKER_DATABASE_URL": f"sqlite:///{Path(folder) / 'tracker.db'}",
                    "TRACKER_PUBLIC_URL": address,
                }
                settings = load_settings(simulator.environment | _SETTINGS | own)
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


async def _start_runs(simulator: Simulator, api: httpx.AsyncClient, started: list[str]) -> None:
    """Start a dozen runs through the tracker's API."""
    for slug in _TECHNIQUES:
        body = {"technique": slug, "inputs": simulator.world.sample_request(slug).inputs}
        answer = await api.post("/api/runs", json=body)
        if answer.status_code != 201:
            raise TrackerError(f"a start was answered {answer.status_code}: {answer.text}")
        started.append(answer.json()["run_id"])
        await asyncio.sleep(_SECONDS_BETWEEN_STARTS)


async def _follow(services: Services, *run_ids: str, more: More | None = None) -> None:
    """Show the progress of runs until all are settled."""
    with screen(transient=False) as shown:
        runs = RunScreen(shown, services.clock)
        async with aclosing(services.follower.follow(run_ids, more=more)) as changes:
            async for observed in changes:
                runs.show(observed)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """One run: the tracker's, the simulator's, and the fields in which they differ."""

    run: ApiRun
    record: TrueRecord
    differences: tuple[str, ...]

    @property
    def callback(self) -> str:
        """Whether a callback was requested, and whether it came."""
        if self.record["callback_url"] is None:
            return "none"
        return "lost" if "drop" in self.record["faults"] else "came"


def compare_runs(runs: Iterable[ApiRun], records: Iterable[TrueRecord]) -> list[RunComparison]:
    """A comparison for each run that either side knows, oldest first."""
    tracked = {run["run_id"]: run for run in runs}
    true = {record["run_id"]: record for record in records}
    unknown: TrueRecord = {"callback_url": None, "faults": []}
    return [_compare(tracked.get(run_id, {}), record) for run_id, record in true.items()] + [
        RunComparison(run=run, record=unknown, differences=("unknown to FLORA",))
        for run_id, run in tracked.items()
        if run_id not in true
    ]


def _compare(run: ApiRun, record: TrueRecord) -> RunComparison:
    end = record["end"]
    expected = {
        "run_id": record["run_id"],
        "technique_id": record["technique"]["technique_id"],
        "workspace_id": record["workspace_id"],
        "tracking": "settled",
        "status": end["status"],
        "charged_cost": end["charged_cost"],
        "error_code": end.get("error_code"),
        "error_message": end.get("error_message"),
        "outputs": [{"position": n, **one} for n, one in enumerate(end.get("outputs", ()))],
        **{name: end.get(name) for name in _TIMES},
    }
    shown = ("position", "output_id", "type", "url")
    found = {
        **run,
        "outputs": [{name: one[name] for name in shown} for one in run.get("outputs", ())],
        **{name: _milliseconds(run.get(name)) for name in _TIMES},
    }
    return RunComparison(
        run=run or {"run_id": record["run_id"]},
        record=record,
        differences=tuple(name for name, value in expected.items() if found.get(name) != value),
    )


def _milliseconds(time: str | None) -> int | None:
    return None if time is None else round(datetime.fromisoformat(time).timestamp() * 1000)


def _print_result(comparisons: list[RunComparison]) -> None:
    """Print every run, how its end became known, and whether it agrees with the records."""
    print_table(
        ("run", "technique", "callback", "end by", "status", "cost", "outputs", "agrees"),
        [
            (
                one.run["run_id"][:12],
                str(one.run.get("technique_id")).removeprefix("tech_"),
                *(one.callback, one.run.get("ended_via"), one.run.get("status")),
                money(one.run.get("charged_cost") or 0),
                len(one.run.get("outputs", ())),
                f"no: {', '.join(one.differences)}" if one.differences else "yes",
            )
            for one in comparisons
        ],
    )
    sources = Counter(str(one.run.get("ended_via")) for one in comparisons)
    by_source = ", ".join(f"{count} by {source}" for source, count in sources.most_common())
    lost = sum(one.callback == "lost" for one in comparisons)
    typer.echo(f"\n{len(comparisons)} runs, {lost} callbacks lost; ends known: {by_source}.")
    if wrong := sum(bool(one.differences) for one in comparisons):
        typer.echo(f"{wrong} of them differ from the simulator's records.")
    else:
        typer.echo(
            "Status, outputs, cost and times of every run are those of the simulator's records."
        )
