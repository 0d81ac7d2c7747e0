"""A local FLORA that needs no key: `tracker simulate` serves it, `tracker demo` shows the tracker
with it.

In the demo a simulator and a tracker are served over HTTP on free loopback ports, in one process,
so that nothing is left behind however it ends. Between them there is nothing but HTTP and a SQLite
file in a temporary directory. A dozen runs are started, some callbacks get lost, all runs settle,
and what the tracker stored is compared with what the simulator did.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.command import AS_JSON, checked, flag, option, repeatable, temporary_folder
from tracker.cli.output import note, print_json, print_table, screen
from tracker.cli.runs import RunScreen
from tracker.core.errors import TrackerError
from tracker.core.formatting import money

if TYPE_CHECKING:
    from socket import socket

    import httpx

    from tracker.polling.follow import More
    from tracker.services import Services
    from tracker.simulator import Simulator

ApiRun = Mapping[str, Any]
"""A run as the tracker's API shows it."""
TrueRecord = Mapping[str, Any]
"""A run as the simulator's own list of records shows it."""

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


def _parse_share(text: str | float) -> float:
    from tracker.simulator import parse_rate

    return checked(parse_rate, str(text))


def _share(help: str, default: float = 0.0) -> Any:
    return option(help, metavar="SHARE", parser=_parse_share, default=default)


def simulate(
    port: int = option("Port on 127.0.0.1.", default=8090, min=0, max=65535),
    seed: int = option("The same seed repeats the same runs.", default=0),
    speed: float = option("Factor by which time passes faster.", default=1.0),
    run_seconds: float = option("Typical duration of a run.", default=20.0),
    failures: float = _share("Runs that fail.", 0.15),
    drop: float = _share("Callbacks that are lost."),
    duplicate: float = _share("Callbacks that are sent twice."),
    early: float = _share("Callbacks sent before the answer to the start."),
    late: float = _share("Callbacks sent long after the end."),
    reorder: float = _share("Callbacks sent after later ones."),
    bad_signature: float = _share("Callbacks preceded by a forged one."),
    rate_limit: float = _share("Requests answered 429."),
    errors: float = _share("Requests answered 500 or 503."),
    cut: float = _share("Requests whose connection is cut."),
    no_history_outputs: bool = flag("--no-history-outputs", "Omit outputs and cost from lists."),
    settings: list[str] = repeatable("--set", "NAME=VALUE", "Any other fault or setting."),
    changes: list[str] = option(
        "As --set, after some time.", "--at", metavar="SECONDS:NAME=VALUE", default=[]
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Serve a local FLORA that needs no key and costs nothing.

    A SHARE is 0.4 or 40%. docs/cli.md lists the names for --set and --at.
    """
    from tracker.simulator import Options, fault_of, serve

    try:
        options = Options(
            seed=seed,
            speed=speed,
            run_seconds=run_seconds,
            failures=failures,
            drop=drop,
            duplicate=duplicate,
            early=early,
            late=late,
            reorder=reorder,
            bad_signature=bad_signature,
            rate_limit=rate_limit,
            errors=errors,
            cut=cut,
            history_outputs=not no_history_outputs,
        ).with_changes(dict(map(_assignment, settings)))
        planned = list(map(_timed, changes))
        for _, change in planned:
            options.with_changes(change)
    except ValueError as error:
        raise typer.BadParameter(fault_of(error)) from error

    def begin(simulator: "Simulator") -> None:
        for after, change in planned:
            simulator.world.change(change, after=after)
        if as_json:
            shown = {"url": simulator.root, "environment": simulator.environment}
            print_json(shown, indent=None)  # for `readline`: the command goes on
            return
        typer.echo(f"A local FLORA is at {simulator.root}. To use it:\n")
        for name, value in simulator.environment.items():
            typer.echo(f"export {name}={value}")

    try:
        serve(options, port=port, on_ready=begin)
    except OSError as error:
        raise TrackerError(
            f"cannot serve on 127.0.0.1 port {port}: {error.strerror}; "
            "choose another one with --port"
        ) from error


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not NAME=VALUE")
    return name.strip().replace("-", "_"), value


def _timed(text: str) -> tuple[float, dict[str, str]]:
    seconds, _, assignment = text.partition(":")
    try:
        after = float(seconds)
    except ValueError:
        raise ValueError(f"{text!r} is not SECONDS:NAME=VALUE") from None
    return after, dict([_assignment(assignment)])


def demo(as_json: bool = AS_JSON) -> int:
    """Show the tracker at work with a local FLORA.

    It uses a temporary SQLite file.
    """
    from tracker.operations.telemetry import configure_logs

    configure_logs(level="error")  # the forged callbacks of the demo would log warnings
    note("A local FLORA loses two callbacks of five; one run is started without the tracker.")
    comparisons = asyncio.run(_demonstrate())
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


async def _demonstrate() -> "list[RunComparison]":
    """A comparison of every run. Raises `TrackerError` after `_TIMEOUT` seconds."""
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
async def _open_environment() -> "AsyncIterator[tuple[Simulator, Services, httpx.AsyncClient]]":
    """A simulator, a tracker that uses it, and a client of the tracker's API."""
    import httpx

    from tracker.services import open_services
    from tracker.settings import load_settings
    from tracker.simulator import Options, running
    from tracker.web.http.server import listen

    with temporary_folder("tracker-demo-") as folder:
        # Two callbacks of five get lost; of the others some come twice, out of order, or after a
        # forged one.
        faults = {"drop": 0.4, "duplicate": 0.2, "reorder": 0.2, "bad_signature": 0.2}
        options = Options(seed=31, run_seconds=7, failures=0.2).with_changes(faults)
        async with running(options) as simulator:
            with listen("127.0.0.1", 0, local_only=True) as sockets:
                address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
                own = {
                    "TRACKER_DATABASE_URL": f"sqlite:///{folder}/tracker.db",
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
async def _serving(services: "Services", sockets: "list[socket]") -> AsyncIterator[None]:
    """The receiver, the API and the worker, as `tracker serve` runs them."""
    from tracker.web.app import build_app
    from tracker.web.http.server import Server
    from tracker.worker import Worker

    ready = asyncio.Event()
    app = build_app(services)
    server = Server(app, on_ready=ready.set, on_stop=app.stop, take=app.take)
    serving = asyncio.create_task(server.serve(sockets=sockets))
    try:
        await ready.wait()
        async with Worker(services).running(asyncio.Event()):
            yield
    finally:
        server.stop()
        await serving


async def _start_runs(simulator: "Simulator", api: "httpx.AsyncClient", started: list[str]) -> None:
    """Start a dozen runs through the tracker's API."""
    for slug in _TECHNIQUES:
        body = {"technique": slug, "inputs": simulator.world.sample_request(slug).inputs}
        answer = await api.post("/api/runs", json=body)
        if answer.status_code != 201:
            raise TrackerError(f"a start was answered {answer.status_code}: {answer.text}")
        started.append(answer.json()["run_id"])
        await asyncio.sleep(_SECONDS_BETWEEN_STARTS)


async def _follow(services: "Services", *run_ids: str, more: "More | None" = None) -> None:
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
