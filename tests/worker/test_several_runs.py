"""A start with several values for an input makes several runs; a row of a batch has all of them."""

import asyncio
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.waiting import eventually
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tests.worker.doubt import OTHER, attempt, request, state_of
from tests.worker.test_batch import silent
from tests.worker.test_own_address import receiving
from tracker.core.errors import InvalidRequest
from tracker.delivering.downloads import DownloadOptions, DownloadReport
from tracker.services import Services
from tracker.simulator import Options, running
from tracker.starting.rows import BatchPlan
from tracker.starting.sheet import sheet_of_objects
from tracker.store.queries import starts
from tracker.store.schema import runs

LINK = "https://a.example/{}.png".format


def inputs(*values: str) -> list[dict[str, str]]:
    images = [{"id": "image", "type": "imageUrl", "value": LINK(value)} for value in values]
    return [*images, {"id": "reference", "type": "imageUrl", "value": LINK("r")}]


async def plan(services: Services, *rows: list[str]) -> BatchPlan:
    """A row for each list of values of one input."""
    objects = [{"image": [*map(LINK, one)], "reference": LINK("r"), "sku": one[0]} for one in rows]
    sheet = sheet_of_objects(enumerate(objects, start=1))
    planned, _ = await services.batches.plan(
        "color-transfer", sheet, name="colours", tags={"team": "red"}
    )
    return planned


async def has_its_run(services: Services) -> bool:
    return await state_of(services.database) == "started"


async def test_a_row_has_all_runs_of_its_start(database_url: str, tmp_path: Path) -> None:
    """The command waits for the callbacks of those that FLORA's answer does not name, and then has
    their costs, outputs and tags. What one run made has the names that it always had."""
    options: dict[str, Any] = {"failures": 0.0, "run_seconds": 0.5, "run_per_value": True}
    settings = {"tracker_cost_recheck": 1, "tracker_poll_interval": 1}
    async with (
        running(Options(**options)) as flora,
        receiving(flora, database_url, **settings) as services,
    ):
        planned = await plan(services, ["a", "b", "c"], ["d"])
        outcome = await services.batches.run(planned, concurrency=2, wait=True, on_progress=silent)
        assert outcome.stopped is None
        of = {run.inputs[0]["value"]: run_id for run_id, run in flora.world.runs.items()}
        first, second = outcome.rows
        assert {*first.run_ids} == {of[LINK(value)] for value in "abc"}
        assert first.run_ids[0] == first.result["run_id"]
        assert second.run_ids == [of[LINK("d")]]
        assert [row.status for row in outcome.rows] == ["completed", "completed"]
        assert (outcome.counts.started, outcome.counts.completed) == (2, 2)
        for run_id in of.values():
            assert (await the_run(services, run_id)).tags == {"team": "red"}

        async def is_billed() -> bool:
            await services.poller.recheck_due()
            return (await services.batches.counts(outcome.batch)).cost_final

        await eventually(is_billed, timeout=30)
        rows = await services.batches.rows(outcome.batch)
        price = planned.technique.run_cost or Decimal(0)
        assert [row.cost for row in rows] == [3 * price, price]
        assert (await services.batches.counts(outcome.batch)).cost == 4 * price
        report = DownloadReport()
        source = services.downloader.batch(outcome.batch.batch_id, watch=False)
        await services.downloader.download(
            source, DownloadOptions(to=tmp_path, allow_private=True), report
        )
        assert report.complete
        names = {path.stem for path in tmp_path.glob("00*")}
        (other,) = {name for name in names if name.startswith("002_")}
        made = other.removeprefix("002_")
        of_others = {f"001_{run_id}_{made}" for run_id in first.run_ids[1:]}
        assert names == {f"001_{made}", other, *of_others}


async def test_a_start_in_doubt_gets_all_its_runs(database_url: str) -> None:
    """By the callbacks to its own address, of whichever run the first one is. None of its runs may
    be another start's."""
    options: dict[str, Any] = {"failures": 0.0, "run_seconds": 0.5, "run_per_value": True}
    async with (
        running(Options(lost_starts=1.0, **options)) as flora,
        receiving(flora, database_url) as services,
    ):
        more = {"technique": "color-transfer", "inputs": inputs("a", "b", "c")}
        assert await attempt(services, "key-1", **more) is None

        async def all_are_known() -> bool:
            row = await starts.get(services.database, "ws_simulator", "key-1")
            return row is not None and row.run_count == 3

        await eventually(all_are_known, timeout=30)
        row = await starts.get(services.database, "ws_simulator", "key-1")
        assert row is not None
        assert (row.state, row.missing_runs) == ("started", 0)
        found = (await starts.runs_of(services.database, [row]))["key-1"]
        assert {one.run.run_id for one in found} == {*flora.world.runs}
        assert found[0].run.run_id == row.run_id
        explanation = await services.explainer.explain(found[-1].run.run_id)
        assert explanation is not None
        texts = [sentence.text for sentence in explanation.sentences]
        several = "The start made several runs, this one among them; the first is"
        assert f"{several} {row.run_id}." in texts


async def test_a_start_is_shown_as_the_same_run_each_time(database_url: str) -> None:
    """The first that is known, also where that is not the one which FLORA's answer names, because
    the callback of another one came before the answer."""
    options: dict[str, Any] = {"failures": 0.0, "run_seconds": 2.0, "run_per_value": True}
    async with (
        running(Options(early=0.5, seed=2, **options)) as flora,
        receiving(flora, database_url) as services,
    ):
        more = {"technique": "color-transfer", "inputs": inputs("a", "b", "c")}

        async def is_applied(response: httpx.Response) -> None:
            if response.request.method == "POST":
                await eventually(lambda: has_its_run(services))

        [workspace] = services.workspaces
        workspace.require_client().http.event_hooks = {"response": [is_applied]}
        started = await services.starter.start(request("key-1", **more))
        assert not started.replayed
        ended_first = [run.run_id for run in flora.world.runs.values() if "early" in run.faults]
        assert ended_first
        assert next(iter(flora.world.runs)) not in ended_first
        again = await services.starter.start(request("key-1", **more))
        assert again.replayed
        assert started.record.run.run_id == again.record.run.run_id
        assert again.record.run.run_id in ended_first


async def test_the_same_key_in_two_workspaces_is_two_starts(database_url: str) -> None:
    """Each has runs of its own, the further ones, too. Where no workspace is named, the error
    names those that have used the key."""
    options: dict[str, Any] = {"failures": 0.0, "run_seconds": 0.5, "run_per_value": True}
    async with running(Options(more_workspaces=(OTHER,), **options)) as flora:
        workspaces = [
            {
                "id": one.workspace_id,
                "api_key": one.api_key,
                "webhook_secrets": [one.webhook_secret],
            }
            for one in flora.world.options.workspaces
        ]
        settings = {"flora_api_key": None, "flora_webhook_secret": (), "workspaces": workspaces}
        async with receiving(flora, database_url, **settings) as services:
            more = {"technique": "color-transfer", "inputs": inputs("a", "b", "c")}
            for one in workspaces:
                assert await attempt(services, "key-1", workspace_id=one["id"], **more)

            async def all_are_known() -> bool:
                rows = await starts.of_key(services.database, "key-1")
                return [row.run_count for row in rows] == [3, 3]

            await eventually(all_are_known, timeout=30)
            for row in await starts.of_key(services.database, "key-1"):
                own = {
                    run_id
                    for run_id, run in flora.world.runs.items()
                    if run.workspace.workspace_id == row.workspace_id
                }
                found = (await starts.runs_of(services.database, [row]))["key-1"]
                assert {one.run.run_id for one in found} == own
                for run_id in own:
                    assert await starts.of_run(services.database, run_id) == row
                named = await services.resolver.find("key-1", workspace_id=row.workspace_id)
                assert named == row
            with pytest.raises(InvalidRequest, match=r"name one of them: ws_\w+, ws_\w+"):
                await services.resolver.find("key-1")


async def test_without_callbacks_only_the_first_run_is_known(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Nothing tells the others from those of colleagues. The command does not wait for them, and
    calls the cost a minimum."""
    async with make_flora(run_per_value=True) as flora:
        services = await open_on(flora)
        planned = await plan(services, ["a", "b"])
        outcome = await asyncio.wait_for(
            services.batches.run(planned, concurrency=1, wait=False, on_progress=silent), 60
        )
        (row,) = outcome.rows
        assert (len(row.run_ids), row.missing_runs) == (1, 1)
        assert len(flora.world.runs) == 2
        assert not outcome.counts.cost_final


async def test_a_start_lacks_a_further_run_that_was_forgotten(database_url: str) -> None:
    """The history shows it again, and not that it is the start's. One that FLORA denies it does
    not lack."""
    options: dict[str, Any] = {"failures": 0.0, "run_seconds": 0.5, "run_per_value": True}
    async with (
        running(Options(**options)) as flora,
        receiving(flora, database_url) as services,
    ):
        more = {"technique": "color-transfer", "inputs": inputs("a", "b", "c")}
        first = await attempt(services, "key-1", **more)

        async def counted() -> tuple[int | None, int]:
            row = await starts.get(services.database, "ws_simulator", "key-1")
            assert row is not None
            return row.run_count, row.missing_runs

        async def all_are_known() -> bool:
            return await counted() == (3, 0)

        await eventually(all_are_known, timeout=30)
        further = next(run_id for run_id in flora.world.runs if run_id != first)
        await services.tracker.forget(further, force=True)
        assert await counted() == (2, 1)
        for workspace in services.workspaces:
            await services.sweeper.sweep(workspace, since=timedelta(hours=1))
        assert (await the_run(services, further)).idempotency_key is None
        assert await counted() == (2, 1)
        await services.tracker.forget(first or "", force=True)
        assert await counted() == (2, 1)
        third = next(run_id for run_id in flora.world.runs if run_id not in (first, further))
        lost = runs.update().where(runs.c.run_id == third).values(tracking="lost", settled_at=None)
        await services.database.execute(lost)
        await services.tracker.forget(third)
        assert await counted() == (1, 1)
