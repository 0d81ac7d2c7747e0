"""The scheduled jobs, by the real clock: what becomes due is polled when it is due."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from logging import INFO
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from apscheduler.jobstores.base import JobLookupError

from tests.support.logs import capture_logs
from tests.support.shares import shared
from tests.support.waiting import NO_SWEEPS, eventually
from tests.worker.conftest import assert_true_to, reads_of, the_run
from tracker.core.clock import utc_now
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.settings.model import EndpointSettings
from tracker.simulator import Options, Simulator, running
from tracker.starting.start import StartRequest
from tracker.store.queries import sweeps
from tracker.worker import Worker, WorkerTimes

PROMPT = [{"id": "prompt", "type": "text", "value": "tools"}]


@asynccontextmanager
async def working(
    database_url: str,
    simulator: Simulator,
    *,
    endpoints: tuple[EndpointSettings, ...] = (),
    prepare: Callable[[Services], None] = lambda _: None,
    **times: float,
) -> AsyncIterator[tuple[Worker, Services]]:
    """A process's worth of services with its worker running, and short waits. `prepare` is called
    with the services before the worker starts."""
    settings = Settings(
        flora_base_url=simulator.base_url,
        flora_api_key=simulator.world.options.api_key,
        tracker_database_url=database_url,
        tracker_poll_interval=0.3,
        tracker_poll_interval_max=1,
        tracker_reconcile_cron=NO_SWEEPS,
        endpoints=endpoints,
    )
    async with open_services(settings, background=True) as services:
        prepare(services)
        worker = Worker(services, times=WorkerTimes(**times))
        await worker.start()
        try:
            yield worker, services
        finally:
            await worker.stop()


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """A FLORA whose runs take about a second."""
    async with running(Options(run_seconds=1, failures=0)) as one:
        yield one


async def swept(services: Services) -> bool:
    """Whether the sweep that a worker makes when it starts is done."""
    return any(row.finished_at for row in await sweeps.list_sweeps(services.database))


async def test_an_idle_worker_polls_a_new_run_in_time(
    database_url: str, simulator: Simulator
) -> None:
    """A run that is started while the worker has nothing to do is polled when its time comes."""
    # Only a signal wakes the worker in time.
    async with working(database_url, simulator, tick=3600.0) as (_, services):
        await eventually(lambda: swept(services))
        before = sum(reads_of(simulator).values())
        request = StartRequest(technique="icon-pack", inputs=PROMPT)
        run_id = (await services.starter.start(request)).record.run.run_id

        async def settled() -> bool:
            return (await the_run(services, run_id)).run.settled

        await eventually(settled)
        assert_true_to(await the_run(services, run_id), simulator)
        assert sum(reads_of(simulator).values()) <= before + 10


async def test_work_of_another_process_is_heard_of(postgres_url: str, simulator: Simulator) -> None:
    """A run that another process tracks is read at once by the one that works."""
    run = simulator.start()
    async with (
        # Only a notification wakes the worker in time.
        working(postgres_url, simulator, tick=3600.0) as (_, services),
        open_services(services.settings) as other,
    ):
        await eventually(lambda: swept(services))
        late = simulator.start()
        await other.tracker.track(late.run_id)

        async def read() -> bool:
            # Alone, or by a page together with the other run, which is due soon.
            return (await the_run(services, late.run_id)).run.created_at is not None

        await eventually(read)
    assert run.run_id != late.run_id


def hang(services: Services) -> None:
    """Withhold FLORA's answers, from now on."""

    async def late(_: httpx.Response) -> None:
        await asyncio.Event().wait()

    for workspace in services.workspaces:
        workspace.require_client().http.event_hooks = {"response": [late]}


async def test_a_worker_that_stops_gives_its_claims_back(
    database_url: str, simulator: Simulator
) -> None:
    """Told to stop in the middle of a read, a worker breaks it off and leaves the run to others."""
    async with working(database_url, simulator) as (_, services):
        await eventually(lambda: swept(services))
        hang(services)
        await services.tracker.track("run_slow")

        async def claimed() -> bool:
            return (await the_run(services, "run_slow")).lease_holder is not None

        await eventually(claimed)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    async with open_services(services.settings) as after:
        record = await the_run(after, "run_slow")
    assert record.lease_holder is None
    assert record.next_check_at is not None


async def test_to_stop_is_no_error(
    database_url: str, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Told to stop in the middle of a sweep, a worker breaks it off and logs nothing of it."""
    async with working(database_url, simulator, prepare=hang):
        await eventually(lambda: simulator.world.requests > 0)
    assert [record.getMessage() for record in caplog.records if record.levelno > INFO] == []


@pytest.mark.parametrize("turns", shared(range(6), of=2))
async def test_to_stop_before_a_job_has_begun_is_no_error(
    sqlite_url: str, simulator: Simulator, caplog: pytest.LogCaptureFixture, turns: int
) -> None:
    """A job whose time comes while the worker stops, at whichever turn of the loop, is no fault."""

    async def come_due() -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        with suppress(JobLookupError):
            worker._scheduler.modify_job("recover", next_run_time=utc_now())

    async with working(sqlite_url, simulator) as (worker, services):
        await eventually(lambda: swept(services))
        coming = asyncio.create_task(come_due())
    await coming
    assert [record.getMessage() for record in caplog.records if record.levelno > INFO] == []


async def test_a_job_that_the_database_stops_is_said_seldom(
    postgres_url: str, simulator: Simulator
) -> None:
    """Where it takes no writes the jobs fail again and again, and go on when it does."""
    administrator = await asyncpg.connect(
        postgres_url, server_settings={"default_transaction_read_only": "off"}
    )
    name = urlsplit(postgres_url).path[1:]
    setting = f'ALTER DATABASE "{name}" SET default_transaction_read_only ='
    async with open_services(Settings(tracker_database_url=postgres_url)) as services:
        await services.tracker.track("run_1")
    await administrator.execute(f"{setting} on")
    with capture_logs() as lines:
        async with working(postgres_url, simulator, round_every=0.05) as (_, services):
            failures = partial(
                services.metrics.registry.get_sample_value,
                "tracker_worker_job_failures_total",
                {"task": "poll"},
            )
            await eventually(lambda: (failures() or 0) >= 3)
            await administrator.execute(f"{setting} off")

            async def checked() -> bool:
                return (await the_run(services, "run_1")).checks > 0

            await eventually(checked)
    said = [line for line in lines if line["event"] == "worker.job_failed"]
    assert [line["count"] for line in said if line["job"] == "poll"] == [1]
    await administrator.close()
