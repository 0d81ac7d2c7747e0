"""Fixtures: a clock to turn, a simulated FLORA that goes by it, and the tracker's services."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import httpx
import pytest

from tests.support.clocks import HandClock, PassedTime
from tests.support.waiting import NO_SWEEPS
from tracker.core.record import Record
from tracker.flora.client import FloraClient
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running
from tracker.store.queries import runs as read

PUBLIC_URL = "https://tracker.example"


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(autouse=True)
def _patient(patient: None) -> None:
    """Another process may pause, also where this one has little time for the database."""


MakeFlora = Callable[..., AbstractAsyncContextManager[Simulator]]


@pytest.fixture
def make_flora(clock: HandClock) -> MakeFlora:
    """Serves a simulator whose time is the test's clock."""
    return lambda **options: running(Options(**({"failures": 0.0} | options)), clock=clock)


@pytest.fixture
async def flora(make_flora: MakeFlora) -> AsyncIterator[Simulator]:
    """A FLORA in which nothing goes wrong."""
    async with make_flora() as simulator:
        yield simulator


OpenServices = Callable[..., Any]


@pytest.fixture
async def open_on(clock: HandClock, database_url: str) -> AsyncIterator[OpenServices]:
    """Opens services that track a simulator's runs, in the test's database."""
    async with AsyncExitStack() as stack:

        async def open_one(simulator: Simulator, **more: Any) -> Services:
            options = simulator.world.options
            given: dict[str, Any] = {
                "flora_base_url": simulator.base_url,
                "flora_api_key": options.api_key,
                "flora_webhook_secret": options.webhook_secret,
                "tracker_database_url": database_url,
                "tracker_reconcile_cron": NO_SWEEPS,
            }
            settings = Settings(**(given | more))
            return await stack.enter_async_context(
                open_services(settings, wall=clock, seconds=clock.seconds)
            )

        yield open_one


@pytest.fixture
async def services(open_on: OpenServices, flora: Simulator) -> Services:
    """The services of a tracker without a public URL: everything has to be polled."""
    opened: Services = await open_on(flora)
    return opened


def client_by(passed: PassedTime, flora: Simulator, **options: Any) -> FloraClient:
    """A client to which no time passes but its waits."""
    return FloraClient(
        base_url=flora.base_url,
        api_key=flora.world.options.api_key,
        monotonic=passed,
        sleep=passed.sleep,
        **options,
    )


Hurry = Callable[..., None]


@pytest.fixture
async def hurry() -> AsyncIterator[Hurry]:
    """Lets waits between attempts pass at once, the client's too."""
    async with AsyncExitStack() as stack:

        async def no_wait(seconds: float) -> None:
            await asyncio.sleep(0)

        def hurry_up(services: Services, flora: Simulator, **options: Any) -> None:
            services.starter.sleep = no_wait
            for workspace in services.workspaces:
                workspace.client = client_by(PassedTime(), flora, clock=services.clock, **options)
                stack.push_async_callback(workspace.client.aclose)

        yield hurry_up


def on_history(services: Services, hook: Callable[[list[str]], Awaitable[None]]) -> None:
    """Call `hook` with the run ids of each page of technique runs, before the tracker reads it."""

    async def answered(response: httpx.Response) -> None:
        if response.is_success and response.url.path.endswith("/technique-runs"):
            await response.aread()
            await hook([one["run_id"] for one in response.json()["technique_runs"]])

    for workspace in services.workspaces:
        workspace.require_client().http.event_hooks = {"response": [answered]}


async def the_run(services: Services, run_id: str) -> Record:
    """The record of a run that has to be there."""
    record = await read.get_run(services.database, run_id)
    assert record is not None, f"{run_id} is not in the database"
    return record


def reads_of(simulator: Simulator) -> dict[str, int]:
    """How often each route of the API was asked, however it answered; but for whose key it is,
    which is asked once."""
    totals: dict[str, int] = {}
    for (route, _), count in simulator.world.counts.items():
        if route == "workspaces.list":
            continue
        totals[route] = totals.get(route, 0) + count
    return totals


def assert_true_to(record: Record, simulator: Simulator) -> None:
    """The record has the simulator's own status, outputs, cost and times."""
    truth = simulator.world.runs[record.run.run_id]
    run = record.run
    assert run.status == truth.end
    assert [(o.output_id, o.type, o.url) for o in run.outputs or ()] == [
        (o.output_id, o.type, o.url) for o in truth.outputs
    ]
    assert float(run.charged_cost or 0) == pytest.approx(truth.cost)
    assert (run.error.code if run.error else None) == truth.error_code
    for ours, theirs in (
        (run.created_at, truth.created_ms),
        (run.started_at, truth.started_ms),
        (run.completed_at, truth.completed_ms),
    ):
        assert (round(ours.timestamp() * 1000) if ours else None) == theirs
