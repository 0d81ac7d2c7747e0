"""What FLORA says is judged where it is said: no fault of a gateway, a setting, an endpoint or a
newer FLORA costs a run, or stops what can still be read."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.support.clocks import HandClock
from tests.support.logs import capture_logs
from tests.support.shares import shared
from tests.web.serving import serving
from tests.worker.conftest import MakeFlora, OpenServices, reads_of, the_run
from tests.worker.test_poll import poll_to_the_end, start
from tracker.core.run import Tracking
from tracker.flora.client import FloraClient
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.simulator.options import SimulatedWorkspace
from tracker.store.queries import runs as read


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone. What FLORA says is judged before anything is stored."""
    return sqlite_url


ANOTHER = SimulatedWorkspace(
    workspace_id="ws_other", api_key="sk_test_other", webhook_secret="whsec_other"
)

READS = ("runs.list", "runs.get", "runs.get_any", "generations.list", "workspaces.list")

GoOnWith = Any
"""Takes another base URL or key; `elsewhere` is where something answers that is not FLORA."""
Judged = tuple[Services, Simulator, GoOnWith]


@pytest.fixture
async def judged(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
) -> AsyncIterator[Judged]:
    """A tracker, its FLORA (in which there is another workspace), and a way to go on with another
    base URL or key. Nothing is waited for: all time is the test's clock. A request is tried four
    times."""
    async with AsyncExitStack() as stack:
        flora = await stack.enter_async_context(make_flora(more_workspaces=(ANOTHER,)))
        services = await open_on(flora, flora_workspace_id=flora.world.options.workspace_id)
        [workspace] = services.workspaces

        def go_on_with(base_url: str = flora.base_url, api_key: str = "sk_test_simulator") -> None:
            workspace.client = FloraClient(
                base_url=base_url,
                api_key=api_key,
                clock=clock,
                monotonic=lambda: clock().timestamp(),
                sleep=_no_wait,
                backoff=lambda attempt: 0.5 if attempt < 4 else math.inf,
            )
            stack.push_async_callback(workspace.client.aclose)

        go_on_with.elsewhere = await stack.enter_async_context(serving(Starlette()))  # type: ignore[attr-defined]
        go_on_with()
        yield services, flora, go_on_with


async def _no_wait(_: float) -> None:
    await asyncio.sleep(0)


def start_elsewhere(flora: Simulator) -> None:
    """Someone starts a run in the other workspace."""
    flora.start(workspace=ANOTHER)


FAULTS: dict[str, Callable[[Simulator, GoOnWith], None]] = {
    "404 pages of a gateway": lambda flora, _: flora.world.change(
        {"gateway": 1, "gateway_answers": "404", "gateway_works": 0}
    ),
    "denials of everything": lambda flora, _: flora.world.change(
        {"refuse": ",".join(f"{route}:not_found" for route in READS)}
    ),
    "a wrong base URL": lambda _, go_on_with: go_on_with(go_on_with.elsewhere),
    "another workspace's key": lambda _, go_on_with: go_on_with(api_key=ANOTHER.api_key),
}


@pytest.mark.parametrize("runs_there", [True, pytest.param(False, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("fault", shared([*FAULTS], of=2))
async def test_only_floras_own_word_counts_against_a_run(
    fault: str, runs_there: bool, judged: Judged, clock: HandClock
) -> None:
    """Two hours of it make no run lost, whether the other workspace has runs or not, and take
    nothing over; once it is over every run is read at once."""
    services, flora, go_on_with = judged
    run_ids = await start(services, 2)
    if runs_there:
        start_elsewhere(flora)
    FAULTS[fault](flora, go_on_with)
    for _ in range(8):
        clock.move(900)
        await services.poller.poll_due()
        for run_id in run_ids:
            await services.poller.read_now(await the_run(services, run_id))
        await services.sweeper.sweep(next(iter(services.workspaces)))
    found = [await the_run(services, run_id) for run_id in run_ids]
    assert [(one.tracking, one.missing) for one in found] == [(Tracking.ACTIVE, 0)] * 2
    known, _ = await read.list_runs(services.database)
    assert {one.run.run_id for one in known} == set(run_ids)
    flora.world.change({"gateway": 0, "refuse": ""})
    go_on_with()
    clock.move(300)
    await services.poller.poll_due()
    for run_id in run_ids:
        assert (await the_run(services, run_id)).run.settled


async def test_a_lost_run_is_read_once_a_day_and_comes_back(
    judged: Judged, clock: HandClock
) -> None:
    """FLORA's own denials, while it can be read, make a run lost; it is read on, once a day, and
    active again as soon as FLORA knows it."""
    services, flora, _ = judged
    [run_id] = await start(services)
    flora.world.delete({run_id})
    await poll_until_lost(services, clock, run_id)
    before = reads_of(flora)["runs.get_any"]
    for _ in range(2 * 24):
        clock.move(3600)
        await services.poller.poll_due()
    assert reads_of(flora)["runs.get_any"] - before == 2
    assert (await the_run(services, run_id)).tracking is Tracking.LOST
    flora.world.deleted.clear()
    clock.move(24 * 3600)
    await services.poller.poll_due()
    record = await the_run(services, run_id)
    assert (record.tracking, record.missing) == (Tracking.SETTLED, 0)


async def poll_until_lost(services: Services, clock: HandClock, run_id: str) -> None:
    for _ in range(60):
        clock.move(300)
        await services.poller.poll_due()
        if (await the_run(services, run_id)).tracking is Tracking.LOST:
            return
    raise AssertionError("FLORA's denials do not count")


@pytest.mark.parametrize(
    "refused",
    shared(
        [
            {"refuse": "runs.list:forbidden"},
            {"refuse": "generations.list:forbidden"},
            {"gateway_pages": 1, "gateway_answers": "404", "gateway_works": 0},
        ],
        of=3,
    ),
    ids=str,
)
async def test_lists_that_are_refused_stop_nothing_else(
    refused: dict[str, Any], judged: Judged, clock: HandClock
) -> None:
    """Single reads and starts go on, at once and as often as before."""
    services, flora, _ = judged
    [workspace] = services.workspaces
    run_ids = await start(services, 3)
    flora.world.change(refused)
    clock.move(60)
    await services.sweeper.sweep(workspace)
    await services.poller.poll_due()
    assert not workspace.require_client().breaker.open
    for run_id in run_ids:
        assert (await the_run(services, run_id)).run.settled
    assert await start(services)
    # A page that could not be read is not asked for with every round.
    pages = reads_of(flora).get("runs.list", 0)
    for _ in range(6):
        await start(services, 2)
        clock.move(5)
        await services.poller.poll_due()
    if "generations" not in str(refused):
        assert reads_of(flora).get("runs.list", 0) - pages <= 4


async def test_single_reads_that_are_refused_stop_no_page(judged: Judged, clock: HandClock) -> None:
    """Runs that a page shows whole settle, and the key is not called refused."""
    services, flora, _ = judged
    run_ids = await start(services, 3)
    flora.world.change({"refuse": "runs.get:forbidden,runs.get_any:forbidden"})
    clock.move(60)
    await services.poller.poll_due()
    for run_id in run_ids:
        assert (await the_run(services, run_id)).run.settled


async def test_an_end_of_an_unknown_kind_is_settled_when_it_was_read(
    judged: Judged, clock: HandClock
) -> None:
    """It is shown as FLORA calls it, and costs a few reads for its bill, not hundreds a day."""
    services, flora, _ = judged
    flora.world.change({"cancelled": 1, "queued": 1})
    [run_id] = await start(services)
    assert (await the_run(services, run_id)).run.status == "queued"
    await poll_to_the_end(services, clock, within=300)
    record = await the_run(services, run_id)
    assert (record.run.status, record.tracking) == ("cancelled", Tracking.SETTLED)
    before = sum(reads_of(flora).values())
    for _ in range(2 * 24):
        clock.move(3600)
        await services.poller.poll_due()
        await services.poller.recheck_due()
    assert sum(reads_of(flora).values()) - before <= 15
    events = await read.events(services.database, run_id)
    assert [str(event.status) for event in events][-1] == "cancelled"
    listed, _ = await read.list_runs(services.database, status="cancelled")
    assert [one.run.run_id for one in listed] == [run_id]


async def test_a_newer_floras_codes_and_types_are_kept(judged: Judged, clock: HandClock) -> None:
    """An error code that is not known is stored as it is, and is for a person to decide about."""
    services, flora, _ = judged
    flora.world.change({"failures": 1, "failure_codes": "GENERATION_OF_TOMORROW"})
    [run_id] = await start(services)
    await poll_to_the_end(services, clock, within=300)
    run = (await the_run(services, run_id)).run
    assert run.error is not None
    assert (run.error.code, str(run.retry_advice)) == ("GENERATION_OF_TOMORROW", "not_retryable")


@pytest.mark.parametrize(
    ("fault", "trouble"),
    [
        ("denials of everything", "lists refused"),
        ("a wrong base URL", "not FLORA's API"),
        ("another workspace's key", "key of another workspace"),
    ],
)
async def test_what_does_not_fit_is_reported_within_a_minute(
    fault: str, trouble: str, judged: Judged, clock: HandClock
) -> None:
    """By the log, once; and that it is over is known soon, although nothing is due."""
    services, flora, go_on_with = judged
    [workspace] = services.workspaces
    start_elsewhere(flora)
    await start(services)
    FAULTS[fault](flora, go_on_with)
    with capture_logs() as lines:
        await services.sweeper.sweep(workspace)
        for _ in range(3):
            clock.move(15)
            await services.poller.poll_due()
            await services.contacts.probe()
        found = workspace.require_client().contact.found
        flora.world.change({"gateway": 0, "refuse": ""})
        if "key" in fault or "URL" in fault:
            go_on_with()
        clock.move(15)
        await services.contacts.probe()
    told = [line for line in lines if line["event"] == "flora.trouble"]
    assert [(line["trouble"], line["log_level"]) for line in told] == [(trouble, "error")]
    assert found is not None
    assert workspace.require_client().contact.found is None
