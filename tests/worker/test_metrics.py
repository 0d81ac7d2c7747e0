"""What a worker does is counted, and what it says in the log names what it is about."""

import contextlib
import logging
from dataclasses import replace
from datetime import timedelta

from tests.store.making import NOW
from tests.support.clocks import HandClock
from tests.support.logs import capture_logs
from tests.support.scraping import Scrape, read_scrape
from tests.support.waiting import eventually
from tests.worker.conftest import MakeFlora, OpenServices
from tests.worker.test_scheduler import simulator, swept, working
from tracker.polling.sweep import SweepReport
from tracker.services import Services
from tracker.simulator import Options, Simulator, running
from tracker.store.queries import sweeps
from tracker.store.queries.sweeps import Interval

__all__ = ["simulator"]

GAP = Interval(from_at=NOW, to_at=NOW, read_at=NOW, error="it is broken", failures=1)


async def scrape(services: Services) -> Scrape:
    """What `/metrics` of this process says now."""
    return read_scrape((await services.metrics.exposition())[0].decode())


async def test_a_worker_is_seen_at_work(database_url: str) -> None:
    """Its sweeps, pages and rounds are counted; that it runs is told while it does."""
    async with (
        running(Options(run_seconds=1e6, failures=0)) as simulator,
        contextlib.AsyncExitStack() as stack,
    ):
        run = simulator.start()
        _, services = await stack.enter_async_context(working(database_url, simulator))
        await eventually(lambda: swept(services))
        # It ends once the sweep has found it, so that its end is the poller's.
        now = simulator.world.now_ms()
        ended = replace(run, started_ms=run.created_ms, completed_ms=now, outputs_ms=now)
        simulator.world.runs[run.run_id] = ended

        async def counted() -> Scrape | None:
            found = await scrape(services)
            done = found.value("tracker_sweeps_total", result="complete")
            return found if done and found.value("tracker_poll_settled_total") else None

        found = await eventually(counted)
        assert found is not None
        assert found.value("tracker_worker_running") == 1
        assert (found.value("tracker_worker_last_round_timestamp_seconds") or 0) > 1e9
        assert found.value("tracker_sweep_discovered_total") == 1
        assert found.value("tracker_sweep_pages_total") == 2  # of techniques and of generations
        four_years = timedelta(days=4 * 365 + 1)  # between two times of `NO_SWEEPS`
        assert found.value("tracker_sweep_interval_seconds") == four_years.total_seconds()
        reads = [found.value(f"tracker_poll_{what}_total") or 0 for what in ("reads", "pages")]
        assert sum(reads) >= 1
        asked = "GET /technique-runs"
        pages = found.value("tracker_flora_requests_total", endpoint=asked, status=200)
        assert (pages or 0) >= 1
        assert found.value("tracker_run_ends_total") == 1
        await stack.aclose()
        assert (await scrape_again(services)).value("tracker_worker_running") == 0


async def scrape_again(services: Services) -> Scrape:
    """What is told of a worker that has stopped, its database closed."""
    services.metrics._state = None
    return await scrape(services)


async def test_a_sweep_that_fails_is_counted_and_shown(
    open_on: OpenServices, make_flora: MakeFlora, clock: HandClock
) -> None:
    """By the process that tried, and in the state that every process reports."""
    async with make_flora(api_key="sk_test_of_another") as flora:
        services: Services = await open_on(
            flora, flora_api_key="sk_test_wrong", flora_workspace_id="ws_1"
        )
        (workspace,) = services.workspaces
        never = await scrape(services)
        report = await services.sweeper.sweep(workspace)
        assert report.error
        services.metrics.swept(report)
        services.metrics._gauges.keep_seconds = 0  # type: ignore[union-attr]
        services.metrics._gauges._fresh_until = 0  # type: ignore[union-attr]
        found = await scrape(services)
    last_complete = "tracker_sweep_last_complete_timestamp_seconds"
    assert never.value(last_complete, workspace_id="ws_1") == 0
    assert never.value("tracker_sweep_failed") is None
    assert found.value("tracker_sweeps_total", workspace_id="ws_1", result="failed") == 1
    assert found.value("tracker_sweep_failed", workspace_id="ws_1") == 1
    assert found.value(last_complete, workspace_id="ws_1") == 0
    assert found.value("tracker_flora_breaker_open", workspace_id="ws_1") == 1


async def test_a_complete_sweep_says_through_when(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """When it ended, and through which moment the history is here."""
    flora.start()
    (workspace,) = services.workspaces
    clock.move(60)
    assert (await services.sweeper.sweep(workspace)).error is None
    found = await scrape(services)
    ended = found.value("tracker_sweep_last_complete_timestamp_seconds")
    assert ended == clock().timestamp()
    assert found.value("tracker_history_verified_timestamp_seconds") == ended - 120
    assert found.value("tracker_sweep_failed") == 0
    for kind in ("technique", "generation"):
        assert found.value("tracker_history_gaps", run_type=kind) == 0


async def test_work_before_the_id_is_known_is_counted_for_the_workspace(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """One workspace has one label: what was counted as `unknown` moves to it with the id."""
    async with make_flora(refuse={"workspaces.list": "not_found"}) as flora:
        services = await open_on(flora)
        services.metrics._gauges.keep_seconds = 0  # type: ignore[union-attr]
        [workspace] = services.workspaces
        await services.sweeper.sweep(workspace)
        services.metrics.swept(SweepReport(workspace_id=workspace.name))
        asked = (await scrape(services)).value("tracker_flora_requests_total")
        assert _workspaces(await scrape(services)) == {"unknown"}
        flora.start()
        services.metrics.swept(await services.sweeper.sweep(workspace))
        services.metrics.swept(SweepReport(workspace_id="unknown"))  # had begun before
    found = await scrape(services)
    assert _workspaces(found) == {flora.world.options.workspace_id}
    assert found.value("tracker_sweeps_total", result="complete") == 3
    assert (found.value("tracker_flora_requests_total") or 0) > (asked or 0)


async def test_a_workspace_that_was_removed_is_not_late(services: Services) -> None:
    """Its last sweep stays in the log of sweeps, and no alert goes by that any more."""
    number = await sweeps.begin(services.database, "ws_removed", services.clock())
    await sweeps.finish(services.database, number, at=services.clock())
    await sweeps.add(services.database, "ws_removed", "technique", GAP)
    assert "ws_removed" not in _workspaces(await scrape(services))


def _workspaces(found: Scrape) -> set[str]:
    return {value for _, labels in found for name, value in labels if name == "workspace_id"}


async def test_a_gap_in_the_history_is_reported(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A run that FLORA cannot list, and a list of generations that it refuses, are a gap each."""
    spoilt, _ = flora.start(), flora.start_generation()
    (workspace,) = services.workspaces
    await services.sweeper.sweep(workspace)
    for _ in range(6):
        clock.move(300)
        flora.start()
    flora.world.change({"bad_runs": [spoilt.run_id], "refuse": {"generations.list": "not_found"}})
    await services.sweeper.sweep(workspace)
    found = await scrape(services)
    assert found.value("tracker_history_gaps", run_type="technique") == 1
    assert found.value("tracker_history_gaps", run_type="generation") == 1


async def test_what_is_said_while_a_run_is_read_names_the_run(
    services: Services, flora: Simulator
) -> None:
    """Each request to FLORA stands in the log with the run and the workspace that it is for."""
    run = flora.start()
    await services.tracker.track(run.run_id)
    with capture_logs(logging.DEBUG) as lines:
        await services.poller.poll_due()
    requests = [line for line in lines if line["event"] == "flora.request"]
    assert requests
    for line in requests:
        assert line["run_id"] == run.run_id
        assert line["workspace_id"]
        assert line["flora_request_id"].startswith("req_")


async def test_a_refused_key_is_said_once(open_on: OpenServices, flora: Simulator) -> None:
    """When the breaker opens; not at each half-open probe."""
    services: Services = await open_on(flora, flora_api_key="sk_test_wrong")
    (workspace,) = services.workspaces
    with capture_logs() as lines:
        for _ in range(3):
            assert (await services.sweeper.sweep(workspace)).error
    said = [line for line in lines if line["event"] == "flora.key_refused"]
    assert [line["status"] for line in said] == [401]
