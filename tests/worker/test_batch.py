"""Batches: a run for each row, once, whatever happens between one command and the next."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.clocks import HandClock, PassedTime
from tests.support.waiting import eventually
from tests.worker.conftest import MakeFlora, OpenServices, client_by, reads_of
from tests.worker.test_poll import poll_to_the_end
from tracker.core.errors import (
    DefinitionChanged,
    FloraRefusal,
    FloraUnreadable,
    InvalidRequest,
    KeyRefused,
    MaxCostReached,
    NotFound,
    SettingsError,
    StoreUnavailable,
    TrackerError,
)
from tracker.core.starts import (
    Budget,
    Budgets,
    Input,
    Period,
    RunNumber,
    batch_id,
    digest_of,
    row_digests,
)
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.simulator.options import SimulatedWorkspace
from tracker.starting.batches import BatchOutcome, BatchProgress
from tracker.starting.rows import BatchPlan, Retry, RowState
from tracker.starting.sheet import SheetRefused, read_csv, sheet_of_objects
from tracker.starting.start import Started, StartRequest
from tracker.store import schema as tables
from tracker.store.queries import batches, starts
from tracker.store.queries.batches import BatchEntry, BatchRow
from tracker.store.queries.starts import StartState


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone. The statements have tests on both engines (tests/store/test_batches.py), and so
    has the whole command (tests/e2e/test_batch.py)."""
    return sqlite_url


async def plan(services: Services, *prompts: str, **options: Any) -> BatchPlan:
    """The plan of a sheet with one column."""
    sheet = read_csv("\n".join(["prompt", *prompts]).encode())
    given: dict[str, Any] = {"name": "icons.csv"}
    planned, _ = await services.batches.plan("icon-pack", sheet, **(given | options))
    return planned


def silent(progress: BatchProgress) -> None:
    """Nobody looks on."""


async def start(
    services: Services,
    planned: BatchPlan,
    *,
    concurrency: int = 2,
    tell: Callable[[BatchProgress], None] = silent,
) -> BatchOutcome:
    """Start a plan, and do not wait for its runs."""
    return await services.batches.run(
        planned, concurrency=concurrency, wait=False, on_progress=tell
    )


async def batch(services: Services, *prompts: str, **options: Any) -> BatchOutcome:
    """BatchPlan and start."""
    return await start(services, await plan(services, *prompts, **options))


def begun(flora: Simulator) -> list[str]:
    """What runs were started of, in their order."""
    return [run.inputs[0]["value"] for run in flora.world.runs.values()]


async def doubts(services: Services) -> int:
    """How many starts are in doubt."""
    query = sa.select(sa.func.count()).where(tables.starts.c.state == StartState.IN_DOUBT)
    return int(await services.database.fetchval(query) or 0)


def statuses(outcome: BatchOutcome) -> list[str]:
    return [row.status for row in outcome.rows]


async def test_a_plan_costs_nothing(services: Services, flora: Simulator) -> None:
    """It says what would be started and what that costs, and leaves no trace."""
    planned = await plan(services, "a", "b", "a")
    assert (len(planned.missing), planned.cost) == (3, Decimal("0.75"))
    assert begun(flora) == []
    assert (await batches.list_batches(services.database, limit=10))[0] == []


async def test_a_row_is_a_run_once(services: Services, flora: Simulator) -> None:
    """Repeating the command starts nothing, asks FLORA for no start, and shows the same runs."""
    first = await batch(services, "a", "b", "a")
    assert sorted(begun(flora)) == ["a", "a", "b"]
    asked = reads_of(flora)["runs.start"]
    again = await batch(services, "a", "b", "a")
    assert reads_of(flora)["runs.start"] == asked
    assert [row.start and row.start.run_id for row in again.rows] == [
        row.start and row.start.run_id for row in first.rows
    ]
    assert again.batch == first.batch
    assert len({row.entry.key for row in first.rows}) == 3


async def test_a_batch_whose_rows_are_started_needs_no_technique(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """FLORA has removed it: repeating the command still shows the runs. A row that would have to be
    sent is refused before anyone is asked to confirm it."""
    first = await batch(services, "a", "b")
    flora.world.technique = lambda reference: None  # type: ignore[method-assign]
    clock.move(7200)
    again = await batch(services, "b", "a", name="sorted.csv")
    assert sorted(row.records[0].run.run_id for row in again.rows) == sorted(flora.world.runs)
    stored = await services.batches.stored_plan(first.batch, retry=Retry.ALL)
    assert (stored.batch, stored.missing) == (first.batch, [])
    for refused in (plan(services, "a", "b", "c"), plan(services, "a", again=True)):
        with pytest.raises(NotFound, match="there is no technique 'icon-pack'"):
            await refused
    with pytest.raises(NotFound, match="nonesuch"):
        await services.batches.plan("nonesuch", read_csv(b"prompt\na"), name="icons.csv")


async def test_a_sheet_may_grow_and_be_sorted(services: Services, flora: Simulator) -> None:
    """Only rows that were not there before are started, wherever they stand now."""
    await batch(services, "b", "a", "b")
    planned = await plan(services, "c", "b", "a", "b", "b")
    assert [row.inputs[0]["value"] for row in planned.missing] == ["c", "b"]
    await start(services, planned)
    assert sorted(begun(flora)) == ["a", "b", "b", "b", "c"]
    await batch(services, "a", "b", "b", "b", "c", name="sorted.csv")
    assert len(flora.world.runs) == 5
    assert len((await batches.list_batches(services.database, limit=10))[0]) == 3


async def test_a_rerun_is_deliberate(services: Services, flora: Simulator) -> None:
    """`again` runs every row once more; the plain command then stays with the newest runs."""
    first = await batch(services, "a", "b")
    second = await batch(services, "a", "b", again=True)
    assert sorted(begun(flora)) == ["a", "a", "b", "b"]
    assert second.batch.batch_id != first.batch.batch_id
    third = await batch(services, "a", "b")
    assert third.batch == second.batch
    await batch(services, "a", "b", again=True)
    assert len(flora.world.runs) == 6


async def test_a_rerun_that_was_interrupted_is_gone_on_with(
    services: Services, flora: Simulator
) -> None:
    """Until a command has seen it to its end, `again` begins no other, and neither does a sheet
    that was edited meanwhile."""
    await batch(services, "a", "b")
    planned = await plan(services, "a", "b", again=True)
    await batches.keep(services.database, planned.batch, [row.entry for row in planned.rows])
    outcome = await batch(services, "new", "b", "a", again=True)
    assert sorted(begun(flora)) == ["a", "a", "b", "b", "new"]
    assert {row.entry.run_number.generation for row in outcome.rows} == {0, 1}
    await batch(services, "a", "b", again=True)
    assert len(flora.world.runs) == 7


async def test_what_failed_by_bad_luck_is_tried_again(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """`Retry.FAILED` starts rows anew whose runs failed for a reason that may pass, and no others;
    once each time it is asked for."""
    async with make_flora(failures=1.0) as flora:
        services = await open_on(flora)
        prompts = [f"icon {number}" for number in range(12)]
        await batch(services, *prompts)
        await poll_to_the_end(services, clock, within=600)
        codes = {run.inputs[0]["value"]: run.error_code for run in flora.world.runs.values()}
        worth = {"model_timeout", "internal_error", "provider_error"}
        assert set(codes.values()) & worth
        assert set(codes.values()) - worth
        assert (await plan(services, *prompts)).missing == []

        flora.world.options = replace(flora.world.options, failures=0.0)
        planned = await plan(services, *prompts, retry=Retry.FAILED)
        lucky = {row.inputs[0]["value"] for row in planned.missing}
        assert lucky == {prompt for prompt, code in codes.items() if code in worth}
        outcome = await start(services, planned)
        await poll_to_the_end(services, clock, within=600)
        assert len(flora.world.runs) == 12 + len(lucky)
        assert (await plan(services, *prompts, retry=Retry.FAILED)).missing == []
        rows = await services.batches.rows(outcome.batch)
        done = {row.inputs[0]["value"] for row in rows if row.done and row.inputs}
        assert done == lucky


async def test_no_credits_end_a_batch(make_flora: MakeFlora, open_on: OpenServices) -> None:
    """After a 402 no further row is sent; once there are credits, the rest is started."""
    async with make_flora(credits=0.5) as flora:
        services = await open_on(flora)
        prompts = [f"icon {number}" for number in range(20)]
        planned = await plan(services, *prompts)
        outcome = await start(services, planned, concurrency=1)
        assert isinstance(outcome.stopped, FloraRefusal)
        assert outcome.stopped.code == "insufficient_credits"
        assert (outcome.counts.started, outcome.counts.unstarted) == (2, 18)
        assert reads_of(flora)["runs.start"] == 3
        assert statuses(outcome)[:4] == ["pending", "pending", "refused", "not_started"]
        kept = await batches.get(services.database, outcome.batch.batch_id)
        assert kept is not None
        assert kept.finished_at is None

        flora.world.options = replace(flora.world.options, credits=100.0)
        outcome = await batch(services, *prompts)
        assert outcome.stopped is None
        assert sorted(begun(flora)) == sorted(prompts)


async def test_a_refused_key_ends_a_batch(services: Services, flora: Simulator) -> None:
    """No further row is sent, and what is started already stays as it is."""
    planned = await plan(services, *"abcdef")
    flora.world.options = replace(flora.world.options, api_key="sk_test_another")
    outcome = await start(services, planned)
    assert isinstance(outcome.stopped, KeyRefused)
    assert outcome.counts.unstarted == 6
    assert begun(flora) == []


def rotate_after_one(
    services: Services, flora: Simulator, configured_id: str | None = "ws_simulator"
) -> None:
    """As soon as one start is answered the key is that of another workspace."""
    begin, (workspace,) = services.starter.start, services.workspaces
    other = SimulatedWorkspace(workspace_id="ws_other", api_key="sk_test_other", webhook_secret="w")
    flora.world.options = replace(flora.world.options, more_workspaces=(other,))
    workspace.configured_id = configured_id

    async def begin_and_rotate(*order: Any, **more: Any) -> Started:
        started = await begin(*order, **more)
        services.workspaces.rotate("default", api_key="sk_test_other", secrets=())
        return started

    services.starter.start = begin_and_rotate  # type: ignore[method-assign]


@pytest.mark.parametrize("configured_id", ["ws_simulator", None])
async def test_a_key_of_another_workspace_ends_a_batch(
    services: Services, flora: Simulator, configured_id: str | None
) -> None:
    """Rotated while rows are started: no further one is, and it says why, whether the settings name
    the workspace or not."""
    rotate_after_one(services, flora, configured_id)
    outcome = await start(services, await plan(services, *"abc"), concurrency=1)
    assert isinstance(outcome.stopped, SettingsError)
    assert "is of workspace ws_other" in str(outcome.stopped)
    assert outcome.counts.unstarted == 2
    assert begun(flora) == ["a"]


async def test_a_row_that_flora_refuses_does_not_stop_the_others(
    services: Services, flora: Simulator
) -> None:
    """Its refusal is told with the fields that FLORA names; all others are started."""
    sheet = read_csv(b"face\nhttps://a.example/1.png\nan-element\nhttps://a.example/2.png\n")
    planned, _ = await services.batches.plan("cctv-cam", sheet, name="faces.csv")
    outcome = await start(services, planned)
    assert statuses(outcome) == ["pending", "refused", "pending"]
    (why,) = [row.why for row in outcome.rows if row.why]
    assert "input_validation_error" in why
    assert "must be an http or https link" in why
    assert outcome.stopped is None


async def test_a_wrong_sheet_starts_nothing(services: Services, flora: Simulator) -> None:
    """All that is wrong is named; on request the other rows are started, with their numbers."""
    sheet = read_csv(b"face\nftp://a.example\nhttps://a.example/1.png\n,\nhttp://b.example/2.png\n")
    with pytest.raises(SheetRefused) as refused:
        await services.batches.plan("cctv-cam", sheet, name="faces.csv")
    assert [problem.line for problem in refused.value.problems] == [2, 5]
    planned, skipped = await services.batches.plan(
        "cctv-cam", sheet, name="faces.csv", skip_bad_rows=True
    )
    assert [problem.line for problem in skipped] == [2, 5]
    assert [(row.entry.position, row.entry.line) for row in planned.rows] == [(2, 3)]
    with pytest.raises(SheetRefused):
        await services.batches.plan(
            "cctv-cam", read_csv(b"nose\nx\n"), name="noses.csv", skip_bad_rows=True
        )
    with pytest.raises(InvalidRequest, match=r"manuscript \(documentUrl\)"):
        await services.batches.plan("book-drop", sheet, name="faces.csv")
    assert begun(flora) == []


async def test_a_429_holds_the_batch_but_does_not_end_it(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Where FLORA refuses many requests as too many, all rows are started all the same."""
    passed = PassedTime()
    async with (
        make_flora(rate_limit=0.3) as flora,
        client_by(passed, flora, concurrency=4) as client,
    ):
        services = await open_on(flora)
        planned = await plan(services, *(f"icon {number}" for number in range(30)))
        (workspace,) = services.workspaces
        workspace.client = client
        services.batches.sleep = passed.sleep
        outcome = await start(services, planned, concurrency=4)
        assert outcome.stopped is None
        assert client.request_limit.state().limited > 0
        assert outcome.counts.started == len(flora.world.runs) == 30


async def test_no_row_begins_while_flora_wants_a_pause(
    services: Services, flora: Simulator
) -> None:
    """As long as the pause lasts nothing is sent, and whoever looks on sees how long that is."""
    planned = await plan(services, "a", "b")
    (workspace,) = services.workspaces
    passed = PassedTime()
    asked: list[float] = []

    async def ask_again(seconds: float) -> None:
        asked.append(seconds)
        await asyncio.sleep(0.01)

    services.batches.sleep = ask_again
    async with client_by(passed, flora) as workspace.client:
        workspace.client.request_limit.pause(1.0)
        seen: list[BatchProgress] = []
        working = asyncio.create_task(start(services, planned, tell=seen.append))
        await eventually(lambda: len(asked) > 10 and seen and 0 < seen[-1].paused <= 1)
        assert begun(flora) == []
        await passed.sleep(1.0)
        await working
        assert len(begun(flora)) == 2


HELD = timedelta(seconds=90)


async def test_a_row_that_another_process_is_sending_waits_its_turn(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Its key is not touched before the other's lease is over; the other rows are started."""
    (row, _) = (await plan(services, "a", "b")).rows
    await starts.reserve(
        services.database,
        starts.StartRow(
            workspace_id="ws_simulator",
            idempotency_key=row.entry.key,
            technique_id="tech_icon-pack",
            fingerprint=digest_of(["tech_icon-pack", row.inputs]),
            inputs=row.inputs,
            created_at=clock(),
        ),
    )
    key = row.entry.key
    assert await starts.take(services.database, "ws_simulator", key, "other", clock(), HELD)
    services.starter.deadline = 1.0
    seen: list[BatchProgress] = []
    planned = await plan(services, "a", "b")
    working = asyncio.create_task(
        services.batches.run(planned, concurrency=2, wait=True, on_progress=seen.append)
    )
    await eventually(lambda: seen and seen[-1].doubt > 0 and begun(flora))
    assert begun(flora) == ["b"]
    clock.move(HELD.total_seconds() + 1)
    await eventually(lambda: begun(flora) == ["b", "a"])
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working


@pytest.mark.parametrize(
    "idempotency", ["replay", pytest.param("conflict", marks=pytest.mark.thorough)]
)
async def test_a_start_in_doubt_holds_nothing_up(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, idempotency: str
) -> None:
    """The other rows are started at once. What reached nobody is started when that is safe; the
    command waits for it and says so."""
    async with make_flora(
        idempotency=idempotency, seed=3, gateway_starts=0.3, gateway_works=0.0
    ) as flora:
        services = await open_on(flora)
        prompts = [f"icon {number}" for number in range(20)]
        planned = await plan(services, *prompts)
        seen: list[BatchProgress] = []
        working = asyncio.create_task(
            services.batches.run(planned, concurrency=3, wait=True, on_progress=seen.append)
        )
        await eventually(lambda: seen and seen[-1].left == 0)
        doubt = seen[-1].doubt
        assert 0 < doubt < 20
        assert len(flora.world.runs) == 20 - doubt
        flora.world.options = replace(flora.world.options, gateway_starts=0.0)
        clock.move(200)
        await eventually(lambda: len(flora.world.runs) == 20)
        await poll_to_the_end(services, clock, within=600)
        outcome = await working
        assert outcome.stopped is None
        assert outcome.counts.completed == len(flora.world.runs) == 20
        assert sorted(begun(flora)) == sorted(prompts)


async def test_few_starts_are_in_doubt_while_flora_is_down(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Each that stays so is left to a person. One row at a time shows whether FLORA is back."""
    async with make_flora(gateway_starts=1.0, gateway_works=0.0) as flora:
        services = await open_on(flora)
        services.batches.doubt_pauses = (0.4, 60.0)
        planned = await plan(services, *(f"icon {number}" for number in range(30)))
        pausing = asyncio.Event()  # reports of the progress come late on a busy machine

        async def sleep(seconds: float) -> None:
            if seconds > 0.4:
                pausing.set()
            await asyncio.sleep(seconds)

        services.batches.sleep = sleep
        working = asyncio.create_task(start(services, planned))
        async with asyncio.timeout(30):
            await pausing.wait()
        assert 3 <= await doubts(services) < 8
        flora.world.options = replace(flora.world.options, gateway_starts=0.0)
        outcome = await working
        assert outcome.stopped is None
        assert len(flora.world.runs) == 30 - outcome.counts.doubt > 20


@pytest.mark.parametrize(("failing", "times"), [("b", 2), ("b", 99), ("abcde", 99)])
async def test_a_row_without_a_usable_answer_is_tried_again(
    services: Services, flora: Simulator, failing: str, times: int
) -> None:
    """Three times, and it holds up no other; where several in succession have none, the batch
    ends."""
    begin, tries = services.starter.start, Counter[str]()

    async def begin_or_fail(request: StartRequest, **more: Any) -> Started:
        prompt = str(request.inputs[0]["value"])
        tries[prompt] += 1
        if prompt in failing and tries[prompt] <= times:
            raise FloraUnreadable("no technique")
        return await begin(request, **more)

    services.starter.start = begin_or_fail  # type: ignore[method-assign, assignment]
    outcome = await start(services, await plan(services, *"abcde"))
    if failing == "abcde":
        assert isinstance(outcome.stopped, FloraUnreadable)
        assert (outcome.counts.unstarted, max(tries.values())) == (5, 1)
        return
    assert (outcome.stopped, tries["b"]) == (None, 3)
    started = {"a", "c", "d", "e"} | ({"b"} if times == 2 else set())
    assert set(begun(flora)) == started
    assert [row.why for row in outcome.rows if row.why] == ["no technique"] * (5 - len(started))


async def test_the_price_is_read_freshly(services: Services, flora: Simulator) -> None:
    """One that has risen since the definition was read counts."""
    assert (await plan(services, "a", "b")).cost == Decimal("0.5")
    flora.world.options = replace(flora.world.options, prices={"icon-pack": 10.0})
    assert (await plan(services, "a", "b")).cost == Decimal("20.0")


async def test_without_a_price_nothing_is_started(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """An old price is none: what is started costs what FLORA asks now."""
    await plan(services, "a")
    clock.move(30 * 24 * 3600)
    services.catalogue._asking.clear()
    flora.world.options = replace(flora.world.options, gateway_reads=1.0, gateway_works=0.0)
    (workspace,) = services.workspaces
    workspace.require_client().deadline = 1.0
    planned = await plan(services, "a")
    assert planned.price_error is not None
    with pytest.raises(TrackerError, match="price could not be read"):
        await start(services, planned)
    assert begun(flora) == []


async def test_a_maximum_cost_needs_a_price(services: Services, flora: Simulator) -> None:
    """Neither a plan nor a launch takes a technique without a price for one that costs nothing."""
    planned = await plan(services, "a", "b")
    planned = replace(planned, technique=replace(planned.technique, run_cost=None))
    assert planned.cost is None
    with pytest.raises(MaxCostReached, match="shows no price"):
        planned.check_cost(Decimal(100), name="--max-cost")
    outcome = await services.batches.run(
        planned, concurrency=2, wait=False, on_progress=silent, max_cost=Decimal(100)
    )
    assert isinstance(outcome.stopped, MaxCostReached)
    assert begun(flora) == []


@pytest.mark.parametrize("quote", [1.0, 4.0])
async def test_a_batch_stops_where_quotes_reach_the_most_it_may_cost(
    services: Services, flora: Simulator, quote: float
) -> None:
    """Prices that rise while it runs show in FLORA's quotes."""
    planned = await plan(services, *(f"icon {number}" for number in range(10)))
    flora.world.options = replace(flora.world.options, quotes=1.0, quote_factor=quote)
    outcome = await services.batches.run(
        planned, concurrency=1, wait=False, on_progress=silent, max_cost=Decimal("2.1")
    )
    assert isinstance(outcome.stopped, MaxCostReached)
    assert len(begun(flora)) == (8 if quote == 1.0 else 2)


async def test_a_start_that_was_in_doubt_counts_towards_the_most_it_may_cost(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Once it is a run, and if nobody knows what it became."""
    async with make_flora(gateway_starts=1.0, gateway_works=0.0, keys_released=True) as flora:
        services = await open_on(flora)
        services.batches.budget_every = timedelta(seconds=0.1)
        budgets, fits = Budgets(others=(Budget(usd=Decimal("0.5"), period=Period.DAY),)), Budgets()
        services.starter.budgets = budgets
        planned = await plan(services, *(f"icon {number}" for number in range(5)))
        seen: list[BatchProgress] = []
        working = asyncio.create_task(
            services.batches.run(
                planned,
                concurrency=1,
                wait=True,
                on_progress=seen.append,
                max_cost=Decimal("2.0"),
                wait_for_budget=True,
            )
        )
        # Two starts are in doubt, and the others wait for the budget.
        await eventually(lambda: seen and (seen[-1].doubt, seen[-1].left) == (2, 3))
        flora.world.options = replace(
            flora.world.options, gateway_starts=0.0, quotes=1.0, quote_factor=4.0
        )
        clock.move(200)
        await eventually(lambda: seen[-1].doubt == 0 and seen[-1].counts.started == 2)
        services.starter.budgets = fits
        clock.move(1)
        await poll_to_the_end(services, clock, within=600)
        outcome = await working
        assert isinstance(outcome.stopped, MaxCostReached)
        assert len(flora.world.runs) == 2


async def test_a_start_that_stays_unresolved_ends_its_row_alone(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """It is not sent again, and says so; it may have been paid, so that it counts towards the most
    that the batch may cost."""
    async with make_flora(gateway_starts=1.0, gateway_works=0.0) as flora:
        services = await open_on(flora)
        await batch(services, "in doubt")
        flora.world.options = replace(flora.world.options, gateway_starts=0.0)
        planned = await plan(services, "in doubt", "first", "later")
        later = replace(planned.rows[2], not_before=services.clock() + timedelta(hours=2))
        planned = replace(planned, rows=[*planned.rows[:2], later])
        seen: list[BatchProgress] = []
        working = asyncio.create_task(
            services.batches.run(
                planned, concurrency=1, wait=True, on_progress=seen.append, max_cost=Decimal("0.6")
            )
        )
        await eventually(lambda: seen and (seen[-1].doubt, seen[-1].left) == (1, 1))
        clock.move(2 * 3600 + 1)
        outcome = await asyncio.wait_for(working, 30)
        assert isinstance(outcome.stopped, MaxCostReached)
        (unresolved, _, left) = outcome.rows
        assert (unresolved.status, left.status) == ("unresolved", "not_started")
        assert unresolved.why == "it is not known whether it was started"
        assert begun(flora) == ["first"]
        assert reads_of(flora)["runs.start"] == 2


@pytest.mark.parametrize("doing", ["starts a row", "checks starts in doubt"])
async def test_an_error_of_the_database_ends_a_launch(
    make_flora: MakeFlora, open_on: OpenServices, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    """Repeating the command starts what is left, once."""
    async with make_flora() as flora:
        services = await open_on(flora)
        begin = services.starter.start

        async def fails(*order: Any, **more: Any) -> Started:
            if flora.world.runs:
                raise StoreUnavailable("the database is gone")
            return await begin(*order, **more)

        if doing == "starts a row":
            monkeypatch.setattr(services.starter, "start", fails)
        else:
            change = {"gateway_starts": 1.0, "gateway_works": 0.0}
            flora.world.options = replace(flora.world.options, **change)
            await batch(services, "b")
            flora.world.options = replace(flora.world.options, gateway_starts=0.0)
            monkeypatch.setattr(services.recovery, "recover", fails)
        planned = await plan(services, "a", "b")
        outcome = await services.batches.run(planned, concurrency=1, wait=True, on_progress=silent)
        assert isinstance(outcome.stopped, StoreUnavailable)
        assert outcome.batch.stopped == "the database is gone"
        assert begun(flora) == ["a"]
        monkeypatch.undo()
        assert (await batch(services, "a", "b")).stopped is None
        assert begun(flora) == (["a", "b"] if doing == "starts a row" else ["a"])


async def test_each_run_of_a_start_counts_towards_the_most_it_may_cost(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """FLORA's answer names the first alone, with its quote."""
    async with make_flora(run_per_value=True, quotes=1.0, quote_factor=2.0) as flora:
        services = await open_on(flora)
        link = "https://a.example/{}.png".format
        rows = [{"image": [link(n), link("b"), link("c")], "reference": link(0)} for n in range(4)]
        sheet = sheet_of_objects(enumerate(rows, start=1))
        planned, _ = await services.batches.plan("color-transfer", sheet, name="colours")
        assert planned.cost == Decimal("1.2")
        outcome = await services.batches.run(
            planned, concurrency=1, wait=False, on_progress=silent, max_cost=Decimal("1.3")
        )
        assert isinstance(outcome.stopped, MaxCostReached)
        assert (outcome.counts.started, len(flora.world.runs)) == (2, 6)


async def test_an_input_of_several_values_is_several_runs(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """The cost counts one run for each value; an empty text is none, and is not sent."""
    async with make_flora() as flora:
        services = await open_on(flora)
        techniques = {one.slug: one for one in flora.world.techniques()}
        several = [
            (one, port) for one in techniques.values() for port in one.inputs if port.several
        ]
        assert several
        technique, port = several[0]
        values = ["a", "b", "c", ""]
        inputs = [{"id": port.id, "type": "text", "value": value} for value in values]
        definition = await services.catalogue.definition(
            next(iter(services.workspaces)), technique.slug
        )
        entry = BatchEntry(position=1, line=2, digest="0" * 24, inputs=inputs)
        batch_row = BatchRow(
            batch_id="bat_1",
            workspace_id="ws_simulator",
            technique_id=definition.technique_id,
            name="sheet.csv",
            created_at=services.clock(),
        )
        row = RowState(entry=entry)
        planned = BatchPlan(batch=batch_row, technique=definition, rows=[row])
        assert planned.cost == definition.run_cost * 3  # type: ignore[operator]


async def columns(services: Services, text: str, **options: Any) -> BatchPlan:
    """The plan of a sheet of icons with several columns."""
    sheet = read_csv(text.encode())
    planned, _ = await services.batches.plan("icon-pack", sheet, name="icons.csv", **options)
    return planned


async def test_a_new_input_starts_no_finished_sheet_anew(
    services: Services, flora: Simulator
) -> None:
    """It has the name of a column that was not used so far. What would start anew is shown, and
    starts only where that is accepted."""
    sheet = "prompt,style\na,flat\nb,flat\nc,bold\n"
    await start(services, await columns(services, sheet))
    assert len(begun(flora)) == 3
    flora.world.options = replace(flora.world.options, new_inputs={"icon-pack": "style:text?"})
    with pytest.raises(DefinitionChanged, match="column 'style'") as changed:
        await columns(services, sheet)
    assert changed.value.lines == (2, 3, 4)
    assert len(begun(flora)) == 3
    planned = await columns(services, sheet, accept_changes=True)
    assert len(planned.missing) == 3
    await start(services, planned)
    assert len(begun(flora)) == 6
    assert (await columns(services, sheet)).missing == []


async def test_a_changed_type_hides_no_finished_sheet(services: Services, flora: Simulator) -> None:
    """Repeating the command shows the runs, and that a type has changed. Nothing starts before
    that is accepted: neither a further row, nor all once more."""

    def have(kind: str) -> None:
        flora.world.options = replace(flora.world.options, new_inputs={"icon-pack": kind})

    sheet = "prompt,style,sku\na,https://a.example/1,x\nb,https://a.example/2,y\n"
    have("style:imageUrl?")
    first = await start(services, await columns(services, sheet))
    have("style:videoUrl?")
    again = await columns(services, sheet)
    assert again.missing == []
    assert (again.batch.batch_id, again.batch.columns) == (first.batch.batch_id, ["sku"])
    assert "'style' was the input 'style' (imageUrl)" in str(again.changed)
    assert [row.run_ids for row in again.rows] == [row.run_ids for row in first.rows]
    for text, options in (
        (sheet + "c,https://a.example/3,z\n", {}),
        (sheet, {"again": True}),
    ):
        with pytest.raises(DefinitionChanged, match="2 rows that were started would start again"):
            await columns(services, text, **options)
    await start(services, await columns(services, sheet, accept_changes=True))
    assert len(begun(flora)) == 4
    accepted = await columns(services, sheet)
    assert (accepted.missing, accepted.changed) == ([], None)


async def write_as_before_mappings(services: Services, rows: list[list[Input]]) -> None:
    """A batch with these rows' inputs, started, as versions before migration 0009 kept it."""
    technique_id, at = "tech_icon-pack", services.clock()
    digests = row_digests(technique_id, rows)
    named = [(position, digest, RunNumber()) for position, digest in enumerate(digests, 1)]
    batch_name = batch_id("default", technique_id, named)
    of_batch = {
        "batch_id": batch_name,
        "workspace_slot": "default",
        "technique_id": technique_id,
        "name": "icons.csv",
        "created_at": at,
        "finished_at": at,
    }

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(tables.batches).values(**of_batch))
        for (position, digest, _), inputs in zip(named, rows, strict=True):
            row = {"batch_id": batch_name, "position": position, "line": position + 1}
            row |= {"row_digest": digest, "generation": 0, "attempt": 0}
            connection.execute(
                sa.insert(tables.batch_rows).values(**row, idempotency_key=f"row-{digest}")
            )
            start = {"workspace_slot": "default", "idempotency_key": f"row-{digest}"}
            start |= {"technique_id": technique_id, "inputs": inputs, "state": "started"}
            start |= {"fingerprint": "", "run_id": f"run_old{position}"}
            connection.execute(sa.insert(tables.starts).values(**start, created_at=at, sent_at=at))

    await services.database.write(work)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("prompt", "text"), "'style' is now the input 'style' (text)"),
        (("words", "text"), "'prompt' was the input 'words' (text)"),
        (("prompt", "imageUrl"), "'prompt' was the input 'prompt' (imageUrl)"),
    ],
)
async def test_a_batch_kept_without_its_mapping_is_not_started_anew(
    flora: Simulator, open_on: OpenServices, old: tuple[str, str], new: str
) -> None:
    """Older versions did not keep which column was which input; what they started shows it.

    A sheet that shares no row with theirs is started as ever, and what was accepted is asked once.
    """
    services = await open_on(flora)
    inputs = [[{"id": old[0], "type": old[1], "value": value}] for value in "abc"]
    await write_as_before_mappings(services, inputs)
    flora.world.options = replace(flora.world.options, new_inputs={"icon-pack": "style:text?"})
    sheet = "style,prompt\nbold,d\nflat,c\nflat,a\nflat,b\n"  # edited since
    with pytest.raises(DefinitionChanged, match=re.escape(new)) as changed:
        await columns(services, sheet)
    assert changed.value.lines == (3, 4, 5)
    assert len((await columns(services, "prompt,style\nx,flat\n")).missing) == 1
    await start(services, await columns(services, sheet, accept_changes=True))
    assert len(begun(flora)) == 4
    assert (await columns(services, sheet)).missing == []


async def test_a_batch_kept_without_its_mapping_goes_on_where_nothing_changed(
    flora: Simulator, open_on: OpenServices
) -> None:
    """Its rows are known; a new row of the same values is a new row, and no change."""
    services = await open_on(flora)
    inputs = [[{"id": "prompt", "type": "text", "value": value}] for value in "ab"]
    await write_as_before_mappings(services, inputs)
    planned = await columns(services, "prompt,style\na,flat\na,flat\nb,flat\nc,flat\n")
    assert [row.entry.line for row in planned.missing] == [3, 5]


async def test_a_new_input_of_no_column_changes_nothing(
    services: Services, flora: Simulator
) -> None:
    """A sheet that has nothing for it is read as before."""
    await start(services, await columns(services, "prompt\na\n"))
    flora.world.options = replace(flora.world.options, new_inputs={"icon-pack": "style:text?"})
    assert (await columns(services, "prompt\na\n")).missing == []


async def test_a_skipped_row_starts_nothing_anew(services: Services, flora: Simulator) -> None:
    """A row that a new input spoils is not started, so that its earlier run refuses no plan."""
    sheet = "prompt,style\na,\nb,flat\n"
    await start(services, await columns(services, sheet))
    flora.world.options = replace(flora.world.options, new_inputs={"icon-pack": "style:imageUrl?"})
    planned = await columns(services, sheet, skip_bad_rows=True)
    assert [row.entry.line for row in planned.rows] == [2]
    assert planned.missing == []


async def test_comparing_earlier_mappings_leaves_the_loop_free(
    services: Services, flora: Simulator
) -> None:
    """Rows are read, and digested for each earlier mapping, in a thread: callbacks go on."""
    sheet = "prompt,style\n" + "".join(f"{n:04} {'icon ' * 100},flat\n" for n in range(2000))
    planned = await columns(services, "prompt\na\n")
    earlier = [
        {
            "batch_id": f"bat_{number}",
            "workspace_slot": planned.batch.workspace_id,
            "technique_id": planned.technique.technique_id,
            "name": "icons.csv",
            "created_at": services.clock(),
            "mapping": [[f"input_{number}", "prompt", "text"]],
        }
        for number in range(20)
    ]

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(tables.batches), earlier)

    await services.database.write(work)
    in_loop, in_all = time.thread_time(), time.process_time()
    planned = await columns(services, sheet)
    in_loop, in_all = time.thread_time() - in_loop, time.process_time() - in_all
    assert len(planned.missing) == 2000
    assert in_loop < in_all * 2 / 3  # 0.9 if the loop does it, 0.2 if not


async def test_an_interrupted_batch_finishes_what_it_was_sending(
    services: Services, flora: Simulator
) -> None:
    """No row is left in doubt by Ctrl-C; the next command starts the rest."""
    prompts = [f"icon {number}" for number in range(60)]
    working = asyncio.create_task(batch(services, *prompts))
    await eventually(lambda: len(flora.world.runs) >= 5)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    planned = await plan(services, *prompts)
    assert 0 < len(planned.missing) < 60
    assert all(
        row.start is None or row.start.state in (StartState.STARTED, StartState.STORED)
        for row in planned.rows
    )
    outcome = await start(services, planned, concurrency=8)
    assert outcome.counts.started == len(flora.world.runs) == 60


async def failed_batch(
    services: Services, flora: Simulator, clock: HandClock, *codes: str
) -> list[str]:
    """A batch of which each row fails with one of the codes; its prompts."""
    prompts = []
    for number, code in enumerate(codes):
        flora.world.options = replace(flora.world.options, failures=1.0, failure_codes=(code,))
        prompts.append(f"icon {number}")
        await batch(services, *prompts)
    await poll_to_the_end(services, clock, within=600)
    flora.world.options = replace(flora.world.options, failures=0.0)
    return prompts


async def test_retries_follow_flora_s_codes(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A temporary fault is retried once and at once, an overload after a wait; where the input has
    to change or nothing helps, only `ALL` starts a run."""
    async with make_flora() as flora:
        services = await open_on(flora)
        prompts = await failed_batch(
            *(services, flora, clock),
            *("GENERATION_PROVIDER_TIMEOUT", "GENERATION_QUEUE_TOO_LARGE"),
            *("GENERATION_PROMPT_MODERATED", "BILLING_LIMIT", "something_new"),
        )
        planned = await plan(services, *prompts, retry=Retry.FAILED)
        assert [row.inputs[0]["value"] for row in planned.missing] == prompts[:2]
        now, later = planned.missing
        assert now.not_before is None
        assert later.not_before is not None
        assert later.not_before > clock()
        (changed,) = planned.to_change
        assert changed.why is not None
        assert changed.why.startswith("GENERATION_PROMPT_MODERATED")
        everything = await plan(services, *prompts, retry=Retry.ALL)
        assert [row.inputs[0]["value"] for row in everything.missing] == prompts
        assert all(row.not_before is None for row in everything.missing)


async def test_a_temporary_fault_is_retried_once(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A retry that fails in the same way is left to a person."""
    async with make_flora() as flora:
        services = await open_on(flora)
        prompts = await failed_batch(services, flora, clock, "model_timeout")
        flora.world.options = replace(
            flora.world.options, failures=1.0, failure_codes=("model_timeout",)
        )
        await batch(services, *prompts, retry=Retry.FAILED)
        await poll_to_the_end(services, clock, within=600)
        assert len(flora.world.runs) == 2
        assert (await plan(services, *prompts, retry=Retry.FAILED)).missing == []


async def test_a_retry_for_later_waits(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A row whose provider is overloaded is started when its wait is over, not before."""
    async with make_flora() as flora:
        services = await open_on(flora)

        async def pass_on(seconds: float) -> None:
            clock.move(seconds)
            await asyncio.sleep(0)

        services.batches.sleep = pass_on
        prompts = await failed_batch(services, flora, clock, "GENERATION_QUEUE_TOO_LARGE")
        planned = await plan(services, *prompts, retry=Retry.FAILED)
        (row,) = planned.missing
        outcome = await start(services, planned)
        assert outcome.counts.started == 1
        assert row.not_before is not None
        retried_ms = list(flora.world.runs.values())[-1].created_ms
        assert retried_ms >= int(row.not_before.timestamp() * 1000)


@pytest.mark.parametrize("repeated", [None, Retry.FAILED])
async def test_a_retry_for_later_waits_its_rest_after_an_interruption(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, repeated: Retry | None
) -> None:
    """The command that is repeated, with the option or without, starts the row no earlier than the
    first one would have; a retry of all rows never waits."""
    async with make_flora() as flora:
        services = await open_on(flora)
        prompts = await failed_batch(services, flora, clock, "GENERATION_QUEUE_TOO_LARGE")
        planned = await plan(services, *prompts, retry=Retry.FAILED)
        working = asyncio.create_task(start(services, planned))
        await eventually(lambda: batch_rows_of_attempt(services, 1))
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        clock.move(5)
        (row,) = (await plan(services, *prompts, retry=repeated)).missing
        assert row.not_before == planned.missing[0].not_before
        assert row.not_before is not None
        assert row.not_before > clock()
        assert len(flora.world.runs) == 1
        (row,) = (await plan(services, *prompts, retry=Retry.ALL)).missing
        assert row.not_before is None


async def batch_rows_of_attempt(services: Services, attempt: int) -> bool:
    """Whether a batch has kept a row for that attempt."""
    query = sa.select(sa.func.count()).where(tables.batch_rows.c.attempt == attempt)
    async with services.database.read() as connection:
        return bool(await connection.scalar(query))


async def test_a_total_is_at_least_until_every_bill_is_final(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """While bills may still come a batch's cost is a floor, with the open quotes beside it."""
    async with make_flora(quotes=1.0, quote_factor=1.0, late_bills=1.0) as flora:
        services = await open_on(flora)
        outcome = await batch(services, "a", "b")
        await poll_to_the_end(services, clock, within=600)
        counts = await services.batches.counts(outcome.batch)
        assert (counts.cost, counts.quoted, counts.cost_final) == (0, Decimal("0.5"), False)
        clock.move(200)
        await services.poller.recheck_due()
        counts = await services.batches.counts(outcome.batch)
        assert (counts.cost, counts.quoted, counts.cost_final) == (Decimal("0.5"), 0, True)
