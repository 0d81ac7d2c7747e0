"""`/api/batches`: a program starts rows, sees what became of them, and pays each once."""

import asyncio
import csv
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.clocks import PassedTime
from tests.support.waiting import eventually
from tests.web.conftest import Serve, Site
from tests.web.flora import with_flora
from tests.worker.conftest import client_by
from tests.worker.test_batch import rotate_after_one
from tracker.core.errors import InvalidRequest, StoreUnavailable
from tracker.core.starts import Budget, Budgets, Period
from tracker.simulator import Simulator
from tracker.starting.batches import BatchLaunch
from tracker.starting.rows import Order, RowState
from tracker.starting.sheet import read_csv
from tracker.starting.start import Started, StartRequest
from tracker.store import schema
from tracker.store.queries import audit, batches
from tracker.store.queries.batches import BatchRow
from tracker.worker import Worker

ROWS = [{"prompt": f"icon {number}", "sku": number} for number in range(1, 6)]


SLOW: dict[str, Any] = {"slow_starts": 1.0, "slow_seconds": 2.0}
"""A start takes 0.2 s, as `working` runs ten times as fast: there is time to break a launch off."""


@asynccontextmanager
async def working(
    serve: Serve, database_url: str, *, worker: bool = True, **options: Any
) -> AsyncIterator[tuple[Site, Simulator]]:
    """A site with a worker in its process."""
    given: dict[str, Any] = {"run_seconds": 0.2, "speed": 10.0} | options
    async with with_flora(serve, database_url, **given) as (site, flora):
        works = Worker(site.services)
        if worker:
            await works.start()
        try:
            yield site, flora
        finally:
            if worker:
                await works.stop()


def body(rows: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    return {"technique": "icon-pack", "rows": ROWS if rows is None else rows, **more}


async def create(site: Site, status: int, **more: Any) -> dict[str, Any]:
    """The answer to a POST, which has that status."""
    answer = await site.client.post("/api/batches", json=body(**more))
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def shown(site: Site, batch_id: str) -> dict[str, Any]:
    answer = await site.client.get(f"/api/batches/{batch_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def stored(site: Site, batch_id: str) -> BatchRow:
    found = await batches.get(site.services.database, batch_id)
    assert found is not None
    return found


async def rows_of(site: Site, batch_id: str, **query: Any) -> list[dict[str, Any]]:
    answer = await site.client.get(f"/api/batches/{batch_id}/rows", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["rows"]
    return found


async def launched(site: Site, batch_id: str) -> dict[str, Any]:
    """The batch, once no worker starts rows of it any more."""
    found: list[dict[str, Any]] = []

    async def done() -> bool:
        found.append(await shown(site, batch_id))
        return not found[-1]["launching"]

    await eventually(done, timeout=30)
    return found[-1]


def begun(flora: Simulator) -> list[str]:
    return sorted(run.inputs[0]["value"] for run in flora.world.runs.values())


async def test_a_program_gets_from_rows_to_results(serve: Serve, database_url: str) -> None:
    """Rows are stored before the answer and started by the worker; carried fields, tags, costs and
    outputs come back with each row, as JSON and as CSV; the same rows again pay nothing."""
    async with working(serve, database_url) as (site, flora):
        site.services.batch_worker.finish_every = site.services.batch_worker.check_every = 0.2
        more = {"name": "Spring", "tags": {"client": "acme"}, "tag_columns": {"sku": "sku"}}
        made = await create(site, 201, **more)
        assert (made["name"], made["source"], made["rows"]) == ("Spring", "api", 5)
        batch_id = made["batch_id"]

        async def ended() -> bool:
            return (await shown(site, batch_id))["completed"] == 5

        await eventually(ended, timeout=30)
        assert begun(flora) == [f"icon {number}" for number in range(1, 6)]
        again = await site.client.post("/api/batches", json=body(**more))
        assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
        assert again.json()["batch_id"] == batch_id
        assert len(flora.world.runs) == 5
        (first, *_) = await rows_of(site, batch_id, limit=2)
        shown_rows, cursor = [], ""
        while cursor is not None:
            query = {"limit": 2, "cursor": cursor}
            answer = await site.client.get(f"/api/batches/{batch_id}/rows", params=query)
            shown_rows.append([row["row"] for row in answer.json()["rows"]])
            cursor = answer.json()["meta"]["next_cursor"]
        assert shown_rows == [[1, 2], [3, 4], [5]]
        assert first["carried"] == {"sku": "1"}
        assert first["tags"] == {"client": "acme", "sku": "1"}
        assert (first["status"], first["cost"]) == ("completed", 0.25)
        assert first["outputs"][0]["url"].startswith("http")
        answer = await site.client.get(f"/api/batches/{batch_id}/results.csv")
        results = list(csv.DictReader(io.StringIO(answer.text)))
        assert [(row["sku"], row["input.prompt"], row["status"]) for row in results] == [
            (f"{number}", f"icon {number}", "completed") for number in range(1, 6)
        ]
        run = flora.world.runs[first["run_id"]]
        assert run.inputs[0]["value"] == "icon 1"
        await eventually(lambda: is_finished(site, batch_id), timeout=40)
        entries, _ = await audit.list_audit(site.services.database, action="launch", limit=5)
        assert [entry.detail["rows"] for entry in entries] == [5]
        listed = (await site.client.get("/api/batches")).json()["batches"]
        assert [one["batch_id"] for one in listed] == [batch_id]


async def is_finished(site: Site, batch_id: str) -> bool:
    return (await shown(site, batch_id))["finished_at"] is not None


async def test_wrong_rows_are_reported_once_for_each_cause(serve: Serve, sqlite_url: str) -> None:
    """A cause names all of its rows; nothing is stored, started or priced."""
    rows = [{"prompt": ""}, {"prompt": "fine"}, {"prompt": None}, {"prompt": {"a": 1}}, {}]
    async with working(serve, sqlite_url, worker=False) as (site, flora):
        error = (await create(site, 422, rows=rows))["error"]
        assert error["code"] == "invalid_rows"
        assert error["message"] == "4 rows cannot be started, so nothing was started"
        causes = {tuple(cause["rows"]): cause["message"] for cause in error["fields"]}
        assert {one["field"] for one in error["fields"]} == {"prompt"}
        assert set(causes) == {(1, 3, 5), (4,)}
        assert causes[4,] == "must be text, not an object"
        missing = (await create(site, 422, rows=[{"promt": "typo"}]))["error"]
        assert [one["rows"] for one in missing["fields"]] == [[]]
        assert missing["fields"][0]["message"] == (
            "there is no column for the input 'prompt' (text); name a field like the input, or map "
            "one in `columns`"
        )
        nothing = (await create(site, 422, rows=[{}]))["error"]["fields"][0]["message"]
        assert nothing == (
            "no column is an input of the technique; name a field like the input, or map one in "
            "`columns`"
        )
        deep = '{"technique": "icon-pack", "rows": [{"prompt": ' + "[" * 500 + "]" * 500 + "}]}"
        assert (await site.client.post("/api/batches", content=deep)).status_code == 422
        mapped = {"rows": [{"promt": "typo"}], "columns": {"prompt": "promt"}, "dry_run": True}
        assert (await create(site, 200, **mapped))["to_start"] == 1
        many = await site.client.post("/api/batches", json=body([{"prompt": "x"}] * 10_001))
        assert many.status_code == 400
        assert "at most 10000 items" in many.json()["error"]["fields"][0]["message"]
        large = [{"prompt": "x", "note": "x" * 2_000_000}]  # more than other bodies may have
        assert (await create(site, 200, rows=large, dry_run=True))["to_start"] == 1
        assert (await site.client.get("/api/batches")).json()["batches"] == []
        assert flora.world.runs == {}


async def test_a_dry_run_tells_the_price_alone(serve: Serve, sqlite_url: str) -> None:
    """It stores nothing, and says so where the request would be refused."""
    async with working(serve, sqlite_url, worker=False) as (site, flora):
        priced = await create(site, 200, dry_run=True, max_cost=1)
        assert (priced["rows"], priced["to_start"], priced["cost"]) == (5, 5, 1.25)
        assert "could cost $1.25, more than the maximum cost of $1.00" in priced["refusal"]
        assert (await create(site, 200, dry_run=True))["refusal"] is None
        assert (await site.client.get("/api/batches")).json()["batches"] == []
        assert flora.world.runs == {}


async def test_nothing_is_started_beyond_the_maximum_or_a_budget(
    serve: Serve, sqlite_url: str
) -> None:
    """402 before anything is stored; a budget is compared with the rows that it covers."""
    budget = Budget(usd=Decimal("0.6"), period=Period.DAY, tag=("client", "acme"))
    async with working(serve, sqlite_url) as (site, flora):
        refused = await create(site, 402, max_cost=1.24)
        assert refused["error"]["code"] == "max_cost_exceeded"
        for one in (site.services.batch_orders, site.services.starter):
            one.budgets = Budgets(others=(budget,))
        tagged = [{"prompt": f"icon {n}", "client": "acme" if n < 3 else "other"} for n in range(5)]
        refused = await create(site, 402, rows=tagged, tag_columns={"client": "client"})
        assert refused["error"]["code"] == "budget_exceeded"
        assert refused["error"]["left"] == 0.6
        assert "this batch could cost $0.75" in refused["error"]["message"]
        assert (await site.client.get("/api/batches")).json()["batches"] == []
        made = await create(site, 201, rows=tagged[1:], tag_columns={"client": "client"})
        assert (await launched(site, made["batch_id"]))["started"] == 4
        assert len(flora.world.runs) == 4


async def test_a_batch_waits_for_a_budget_if_asked(serve: Serve, sqlite_url: str) -> None:
    """It starts what fits, says what it waits for, and goes on when there is room."""
    async with working(serve, sqlite_url) as (site, flora):
        site.services.batch_worker.renew_after = 0.05
        site.services.batches.budget_every = timedelta(seconds=0.2)
        budget = Budget(usd=Decimal("0.6"), period=Period.DAY)
        site.services.starter.budgets = Budgets(others=(budget,))
        site.services.batch_orders.budgets = Budgets(others=(budget,))
        await create(site, 402)
        made = await create(site, 201, wait_for_budget=True)

        async def waits() -> bool:
            found = await shown(site, made["batch_id"])
            why = str(found["stopped"])
            return found["launching"] and "the budget day has $0.10 of $0.60 left" in why

        await eventually(waits, timeout=30)
        assert len(flora.world.runs) == 2
        site.services.starter.budgets = Budgets()
        done = await launched(site, made["batch_id"])
        assert (done["started"], done["stopped"]) == (5, None)


async def test_a_batch_that_waits_keeps_no_other_from_being_launched(
    serve: Serve, sqlite_url: str
) -> None:
    """One that waits for a budget, perhaps for weeks, gives way to another, and then goes on."""
    async with working(serve, sqlite_url) as (site, flora):
        works = site.services.batch_worker
        works.check_every, works.go_on_after = 0.1, timedelta(seconds=0.5)
        works.most_launches = 1
        budget = Budget(usd=Decimal("0.6"), period=Period.MONTH, tag=("client", "acme"))
        site.services.starter.budgets = Budgets(others=(budget,))
        waiting = await create(site, 201, wait_for_budget=True, tags={"client": "acme"})
        await eventually(lambda: len(flora.world.runs) == 2, timeout=30)
        other = await create(site, 201, rows=[{"prompt": "of another client"}])
        assert (await launched(site, other["batch_id"]))["started"] == 1
        found = await shown(site, waiting["batch_id"])
        assert (found["started"], found["launching"]) == (2, True)
        site.services.starter.budgets = Budgets()
        assert (await launched(site, waiting["batch_id"]))["started"] == 5


@pytest.mark.both_databases
async def test_one_of_equal_orders_at_one_moment_counts(serve: Serve, database_url: str) -> None:
    """One is placed and noted in the audit log; the others find it."""
    async with working(serve, database_url, worker=False) as (site, _):
        services = site.services
        plan, _ = await services.batches.plan("icon-pack", read_csv(b"prompt\na\n"), name="a.csv")
        order = Order(started_by="shop", ordered_at=services.clock())
        place = services.batch_orders.place
        placed = await asyncio.gather(*(place(plan, order) for _ in range(4)))
        assert sorted((one.known, one.ordered) for one in placed) == [
            (False, True),
            *[(True, False)] * 3,
        ]
        entries, _ = await audit.list_audit(services.database, action="launch", limit=5)
        assert len(entries) == 1


async def test_a_maximum_of_nothing_starts_nothing(serve: Serve, sqlite_url: str) -> None:
    """What may cost nothing is refused if it has a price, and accepted if nothing is to start."""
    async with working(serve, sqlite_url, worker=False) as (site, flora):
        await create(site, 402, max_cost=0)
        services = site.services
        plan, _ = await services.batches.plan("icon-pack", read_csv(b"prompt\na\n"), name="a.csv")
        await services.batches.run(plan, concurrency=1, wait=False, on_progress=lambda _: None)
        order = {"which": "unstarted", "max_cost": 0}
        answer = await site.client.post(f"/api/batches/{plan.batch.batch_id}/retry", json=order)
        assert answer.status_code == 200, answer.text
        assert len(flora.world.runs) == 1


async def test_a_price_that_rises_stops_the_launch(serve: Serve, sqlite_url: str) -> None:
    """Bills count towards the maximum, those of the launch before too; the batch says why it
    stopped, and goes on when that is ordered."""
    async with working(serve, sqlite_url, worker=False) as (site, flora):
        services = site.services
        made = await create(site, 201, max_cost=1.25)
        batch_id = made["batch_id"]
        flora.world.options = replace(flora.world.options, price_factor=2)
        services.batch_worker.concurrency = 1
        await services.batch_worker.launch_due()
        stopped = await launched(site, batch_id)
        assert (stopped["started"], stopped["finished_at"]) == (2, None)
        assert "another row could exceed the maximum cost of $1.25" in stopped["stopped"]
        answer = await site.client.post(f"/api/batches/{batch_id}/retry", json={"which": "failed"})
        assert answer.json()["launching"]
        await services.batch_worker.launch_due()
        assert (await launched(site, batch_id))["started"] == 5


async def test_the_maximum_holds_across_processes(serve: Serve, sqlite_url: str) -> None:
    """What a process that died had started counts for the one that takes over."""
    async with working(serve, sqlite_url, worker=False) as (site, flora):
        services = site.services
        made = await create(site, 201, max_cost=1.25)
        batch = await batches.get(services.database, made["batch_id"])
        assert batch is not None
        plan = await services.batches.stored_plan(batch)
        some = replace(plan, rows=plan.rows[:3])
        workspace = await services.batches.workspace_of(batch)
        launch = BatchLaunch(services.batches, workspace, some, Order.of(batch), concurrency=1)
        await launch.run()
        flora.world.options = replace(flora.world.options, price_factor=2)
        await services.batch_worker.launch_due()
        stopped = await launched(site, made["batch_id"])
        assert (stopped["started"], len(flora.world.runs)) == (4, 4)
        assert "the maximum cost of $1.25" in stopped["stopped"]


async def test_a_launch_goes_on_when_the_key_is_right_again(serve: Serve, sqlite_url: str) -> None:
    """What passes ends no batch: it says why it waits, and goes on by itself."""
    passed = PassedTime()
    async with (
        working(serve, sqlite_url, worker=False) as (site, flora),
        client_by(passed, flora) as client,
    ):
        (workspace,) = site.services.workspaces
        works, key = site.services.batch_worker, flora.world.options.api_key
        works.go_on_after = timedelta(seconds=0.2)
        made = await create(site, 201)
        workspace.client = client
        flora.world.options = replace(flora.world.options, api_key="sk_test_another")

        async def waits() -> bool:
            await works.launch_due()
            found = await shown(site, made["batch_id"])
            return found["launching"] and found["stopped"] is not None

        await eventually(waits, timeout=30)
        flora.world.options = replace(flora.world.options, api_key=key)
        await passed.sleep(600)  # longer than a refused key is held back

        async def goes_on() -> bool:
            await works.launch_due()
            return not (await shown(site, made["batch_id"]))["launching"]

        await eventually(goes_on, timeout=30)
        done = await shown(site, made["batch_id"])
        assert (done["started"], done["stopped"], len(flora.world.runs)) == (5, None, 5)


@pytest.mark.both_databases
async def test_rows_that_met_a_refused_key_are_started_too(serve: Serve, database_url: str) -> None:
    """The key is replaced while rows are started: with the new one all of them are."""
    passed = PassedTime()
    async with (
        working(serve, database_url, worker=False) as (site, flora),
        client_by(passed, flora) as client,
    ):
        (workspace,) = site.services.workspaces
        works, begin = site.services.batch_worker, site.services.starter.start
        works.go_on_after, works.concurrency = timedelta(seconds=0.2), 1
        made = await create(site, 201)
        workspace.client = client

        async def begin_and_replace(*order: Any, **more: Any) -> Started:
            started = await begin(*order, **more)
            flora.world.options = replace(flora.world.options, api_key="sk_test_new")
            return started

        site.services.starter.start = begin_and_replace  # type: ignore[method-assign]

        async def waits() -> bool:
            await works.launch_due()
            return "401" in str((await shown(site, made["batch_id"]))["stopped"])

        await eventually(waits, timeout=30)
        site.services.starter.start = begin  # type: ignore[method-assign]
        assert [one["status"] for one in await rows_of(site, made["batch_id"])][1] == "refused"
        client.rotate_key("sk_test_new")

        async def goes_on() -> bool:
            await works.launch_due()
            return not (await shown(site, made["batch_id"]))["launching"]

        await eventually(goes_on, timeout=30)
        done = await shown(site, made["batch_id"])
        assert (done["started"], done["stopped"], len(flora.world.runs)) == (5, None, 5)


async def test_a_forbidden_technique_ends_a_launch(serve: Serve, sqlite_url: str) -> None:
    """FLORA says of a 403 that it is not to be repeated: the batch ends, and says why."""
    async with working(serve, sqlite_url, worker=False) as (site, flora):
        works = site.services.batch_worker
        works.go_on_after = timedelta(0)
        made = await create(site, 201)
        flora.world.options = replace(flora.world.options, refuse={"runs.start": "forbidden"})
        for _ in range(5):
            await works.launch_due()

        async def has_ended() -> bool:
            await works.launch_due()
            return not (await shown(site, made["batch_id"]))["launching"]

        await eventually(has_ended, timeout=30)
        assert "403" in (await shown(site, made["batch_id"]))["stopped"]
        assert flora.world.counts[("runs.start", 403)] <= works.concurrency


async def test_a_launch_waits_for_a_key_of_its_workspace(serve: Serve, sqlite_url: str) -> None:
    """A key that is rotated while rows are started ends no batch either."""
    async with working(serve, sqlite_url, worker=False) as (site, flora):
        works = site.services.batch_worker
        works.concurrency = 1
        rotate_after_one(site.services, flora)
        made = await create(site, 201)

        async def waits() -> dict[str, Any] | None:
            await works.launch_due()
            found = await shown(site, made["batch_id"])
            return found if found["stopped"] is not None else None

        waiting = await eventually(waits)
        assert "is of workspace ws_other" in waiting["stopped"]
        assert (waiting["launching"], len(flora.world.runs)) == (True, 1)


async def test_what_failed_is_started_again_on_request(serve: Serve, database_url: str) -> None:
    """Error groups say what a retry starts; its price is asked for first, and it pays for failed
    rows alone, also for the rows of a command."""
    async with working(serve, database_url, failures=1.0) as (site, flora):
        services = site.services
        sheet = read_csv("\n".join(["prompt", *(f"icon {n}" for n in range(12))]).encode())
        plan, _ = await services.batches.plan("icon-pack", sheet, name="icons.csv")
        outcome = await services.batches.run(
            plan, concurrency=4, wait=True, on_progress=lambda _: None
        )
        batch_id = outcome.batch.batch_id
        flora.world.options = replace(flora.world.options, failures=0.0)
        failed = await shown(site, batch_id)
        assert (failed["failed"], failed["source"]) == (12, "cli")
        retryable = sum(group["retryable"] for group in failed["errors"])
        assert sum(group["count"] for group in failed["errors"]) == 12
        assert 0 < retryable < 12
        (group, *_) = failed["errors"]
        of_group = await rows_of(site, batch_id, code=group["code"])
        assert len(of_group) == group["count"]
        address = f"/api/batches/{batch_id}/retry"
        priced = await site.client.post(address, json={"which": "failed", "dry_run": True})
        assert (priced.json()["to_start"], priced.json()["cost"]) == (retryable, retryable * 0.25)
        assert len(flora.world.runs) == 12
        for _ in range(2):
            answer = await site.client.post(address, json={"which": "all", "max_cost": 3})
            assert answer.status_code == 200, answer.text

        async def completed() -> bool:
            return (await shown(site, batch_id))["completed"] == 12

        await eventually(completed, timeout=60)
        assert len(flora.world.runs) == 24
        assert await rows_of(site, batch_id, outcome="failed") == []


@pytest.mark.both_databases
async def test_a_command_ends_an_order_whose_rows_it_tried(serve: Serve, database_url: str) -> None:
    """Nothing is left to a worker that comes later, and nobody waits for one."""
    async with working(serve, database_url, worker=False) as (site, flora):
        services = site.services
        batch_id = (await create(site, 201))["batch_id"]
        sheet = read_csv("\n".join(["prompt", *(row["prompt"] for row in ROWS)]).encode())
        plan, _ = await services.batches.plan("icon-pack", sheet, name="icons.csv")
        assert plan.batch.batch_id == batch_id
        await services.batches.run(plan, concurrency=4, wait=False, on_progress=lambda _: None)
        assert len(flora.world.runs) == 5
        ended = await stored(site, batch_id)
        assert ended.finished_at is not None
        assert ended.launch_at is None


async def test_a_command_leaves_the_order_of_a_row_in_doubt(
    serve: Serve, database_url: str
) -> None:
    """It does not wait for what came of its start; a worker does, and may send it again."""
    faults = {"gateway_starts": 1.0, "gateway_works": 0.0}
    async with working(serve, database_url, worker=False, **faults) as (site, _):
        services = site.services
        batch_id = (await create(site, 201, rows=ROWS[:1]))["batch_id"]
        ordered = await stored(site, batch_id)
        sheet = read_csv(b"prompt\nicon 1\n")
        plan, _ = await services.batches.plan("icon-pack", sheet, name=ordered.name)
        await services.batches.run(plan, concurrency=1, wait=False, on_progress=lambda _: None)
        assert (await shown(site, batch_id))["in_doubt"] == 1
        left = await stored(site, batch_id)
        assert (left.launch_at, left.finished_at) == (ordered.launch_at, None)


@pytest.mark.both_databases
async def test_what_is_ordered_while_a_command_works_is_launched(
    serve: Serve, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the command does not end the order, and the row that it could not start is tried
    again."""
    async with working(serve, database_url, worker=False) as (site, flora):
        services, goes_on = site.services, asyncio.Event()
        sheet = read_csv(b"prompt\nrefused\nlate\n")
        plan, _ = await services.batches.plan("icon-pack", sheet, name="icons.csv")
        batch_id, start = plan.batch.batch_id, services.starter.start

        async def first_is_refused(request: StartRequest, **more: Any) -> Started:
            if request.inputs[0]["value"] == "refused":
                raise InvalidRequest("not now")
            await goes_on.wait()
            return await start(request, **more)

        monkeypatch.setattr(services.starter, "start", first_is_refused)
        running = asyncio.create_task(
            services.batches.run(plan, concurrency=1, wait=False, on_progress=lambda _: None)
        )
        await eventually(lambda: batches.get(services.database, batch_id))
        address = f"/api/batches/{batch_id}/retry"
        answer = await site.client.post(address, json={"which": "unstarted"})
        assert answer.json()["launching"], answer.text
        goes_on.set()
        outcome = await running
        assert (outcome.counts.started, outcome.stopped) == (1, None)
        ordered = await stored(site, batch_id)
        assert ordered.finished_at is None
        assert ordered.launch_at is not None
        monkeypatch.setattr(services.starter, "start", start)
        await services.batch_worker.launch_due()
        assert (await launched(site, batch_id))["started"] == 2
        assert begun(flora) == ["late", "refused"]


async def test_rows_without_a_run_are_left_out(serve: Serve, database_url: str) -> None:
    """A retry of only failed rows starts no other, and the batch is not finished by it; the next
    one starts the rest."""
    options = {"failures": 1.0, "failure_codes": ("model_timeout",)}
    async with working(serve, database_url, worker=False, **options) as (site, flora):
        services, works = site.services, site.services.batch_worker
        batch_id = (await create(site, 201))["batch_id"]
        batch = await batches.get(services.database, batch_id)
        assert batch is not None
        plan = await services.batches.stored_plan(batch)
        some = replace(plan, rows=plan.rows[:2])
        await services.batches.run(some, concurrency=1, wait=True, on_progress=lambda _: None)
        await site.client.post(f"/api/batches/{batch_id}/stop")
        flora.world.options = replace(flora.world.options, failures=0.0)
        address = f"/api/batches/{batch_id}/retry"
        only = {"which": "failed", "only_failed": True}
        priced = await site.client.post(address, json=only | {"dry_run": True})
        assert (priced.json()["to_start"], priced.json()["cost"]) == (2, 0.5)
        refused = await site.client.post(address, json=only | {"which": "unstarted"})
        assert refused.status_code == 400
        assert refused.json()["error"]["fields"][0]["field"] == "only_failed"
        answer = await site.client.post(address, json=only)
        assert answer.json()["launching"], answer.text
        await works.launch_due()
        stopped = await launched(site, batch_id)
        assert stopped["stopped"] == "only failed rows were to be started"
        assert (stopped["started"], len(flora.world.runs)) == (2, 4)
        await eventually(lambda: not works._tasks, timeout=30)
        works.finish_every = 0.0

        async def completed() -> bool:
            await services.poller.poll_due()
            return (await shown(site, batch_id))["completed"] == 2

        await eventually(completed, timeout=30)
        await works.launch_due()
        assert (await shown(site, batch_id))["finished_at"] is None
        answer = await site.client.post(address, json=only | {"only_failed": False})
        await works.launch_due()
        assert (await launched(site, batch_id))["started"] == 5
        assert len(flora.world.runs) == 7


async def test_a_batch_is_stopped_and_resumed(serve: Serve, sqlite_url: str) -> None:
    """Stopped, no further row begins; the batch says by whom, and goes on when that is ordered."""
    rows = [{"prompt": f"icon {number}"} for number in range(30)]
    async with working(serve, sqlite_url, **SLOW) as (site, flora):
        site.services.batch_worker.renew_after = 0.05
        made = await create(site, 201, rows=rows)
        batch_id = made["batch_id"]
        await eventually(lambda: len(flora.world.runs) > 3, timeout=30)
        answer = await site.client.post(f"/api/batches/{batch_id}/stop")
        assert (answer.json()["launching"], answer.json()["stopped"]) == (False, "stopped by local")
        await eventually(lambda: not site.services.batch_worker._tasks, timeout=30)
        count = len(flora.world.runs)
        assert count < 30
        assert (await shown(site, batch_id))["started"] == count
        flora.world.change({"slow_starts": 0.0})
        resumed = await site.client.post("/api/batches", json=body(rows))
        assert resumed.status_code == 200
        assert (await launched(site, batch_id))["started"] == len(flora.world.runs) == 30
        again = await site.client.post(f"/api/batches/{batch_id}/stop")
        assert (again.status_code, again.json()["stopped"]) == (200, None)


async def test_a_launch_that_ended_early_waits_for_no_start_in_doubt(
    serve: Serve, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database failed at the last row: that goes on when the database is back, although the
    outcome of another row is not known."""
    faults = {"gateway_starts": 1.0, "gateway_works": 0.0}
    async with working(serve, database_url, worker=False, **faults) as (site, flora):
        works = site.services.batch_worker
        works.go_on_after = timedelta(0)
        waiting = await create(site, 201, rows=[{"prompt": "in doubt"}])
        await works.launch_due()

        async def is_in_doubt() -> bool:
            return (await shown(site, waiting["batch_id"]))["in_doubt"] == 1

        await eventually(is_in_doubt, timeout=30)
        flora.world.change({"gateway_starts": 0.0})
        failed = asyncio.Event()

        async def fails_once(launch: BatchLaunch, row: RowState) -> bool:
            monkeypatch.undo()
            failed.set()
            raise StoreUnavailable("the database is gone")

        monkeypatch.setattr(BatchLaunch, "_fits", fails_once)
        made = await create(site, 201, rows=[{"prompt": "in doubt"}, {"prompt": "the last"}])
        await works.launch_due()
        await asyncio.wait_for(failed.wait(), 30)
        await eventually(lambda: {*works._tasks} == {waiting["batch_id"]}, timeout=10)
        await works.launch_due()

        async def is_started() -> bool:
            return (await shown(site, made["batch_id"]))["started"] == 1

        await eventually(is_started, timeout=30)
        assert begun(flora) == ["the last"]
        assert (await shown(site, made["batch_id"]))["in_doubt"] == 1
        await works.stop()


async def test_a_launch_that_breaks_off_says_so_and_goes_on(
    serve: Serve, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in it is in the log, and the batch is launched again."""
    async with working(serve, database_url, worker=False) as (site, flora):
        works = site.services.batch_worker
        works.go_on_after = timedelta(0)

        async def breaks(launch: BatchLaunch) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(BatchLaunch, "run", breaks)
        made = await create(site, 201)
        await works.launch_due()
        await eventually(lambda: not works._tasks, timeout=30)
        broken = await shown(site, made["batch_id"])
        assert broken["launching"]
        assert broken["stopped"] == "an unexpected error, see the log: ZeroDivisionError"
        assert begun(flora) == []
        monkeypatch.undo()
        await works.launch_due()
        done = await launched(site, made["batch_id"])
        assert (done["started"], done["stopped"]) == (len(ROWS), None)


async def test_a_launch_whose_lease_is_lost_is_taken_up_again(
    serve: Serve, sqlite_url: str
) -> None:
    """A process that cannot renew it breaks off; the batch stays due, and goes on to its end."""
    rows = [{"prompt": f"icon {number}"} for number in range(30)]
    async with working(serve, sqlite_url, worker=False, **SLOW) as (site, flora):
        works = site.services.batch_worker
        works.renew_after = 0.05
        made = await create(site, 201, rows=rows)
        await works.launch_due()
        await held_by(site, "another")
        await eventually(lambda: not works._tasks, timeout=30)
        broken_off = await shown(site, made["batch_id"])
        assert broken_off["launching"]
        assert broken_off["started"] == len(flora.world.runs) < 30
        await held_by(site, None)
        flora.world.change({"slow_starts": 0.0})
        await works.launch_due()
        done = await launched(site, made["batch_id"])
        assert done["started"] == len(flora.world.runs) == 30


async def held_by(site: Site, holder: str | None) -> None:
    """Give the lease of all batches to another process, or to nobody."""
    held = sa.update(schema.batches).values(lease_holder=holder)
    if holder is None:
        held = held.values(lease_until=None)
    await site.services.database.write(lambda connection: connection.execute(held).rowcount)


async def test_only_a_token_that_may_start_orders(serve: Serve, sqlite_url: str) -> None:
    """A token with the scope `read` sees batches and can neither order nor stop one."""
    read = {"name": "viewer", "token": "a-token-that-reads", "scopes": ["read"]}
    async with serve(
        sqlite_url, tracker_api_token="a-token-for-tests", tokens=[read], flora_api_key="sk_test"
    ) as site:
        site.client.headers["Authorization"] = f"Bearer {read['token']}"
        assert (await site.client.get("/api/batches")).status_code == 200
        for path in ("", "/bat_1/retry", "/bat_1/stop"):
            assert (await site.client.post(f"/api/batches{path}", json={})).status_code == 403
        assert (await site.client.get("/api/batches/bat_1")).status_code == 404
