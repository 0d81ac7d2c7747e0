"""A start may have several runs, one for each value of an input: all of them belong to it."""

import itertools
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from tests.store.making import NOW, TestWriter, seen
from tests.store.test_batches import BATCH, counts_of, entries
from tests.store.test_spending import DAY, became, reserve
from tests.support.started import of_start
from tracker.core.observation import Source
from tracker.core.record import Observed
from tracker.core.run import Output, RunError, RunStatus
from tracker.operations.retention import Ages, Pruner
from tracker.starting.rows import RowState, csv_lines, kept_rows
from tracker.store import migrate
from tracker.store import schema as tables
from tracker.store.engine import Database
from tracker.store.queries import batches, sheet_rows, starts
from tracker.store.queries.batches import BatchEntry
from tracker.store.queries.runs import get_run
from tracker.store.queries.sheet_rows import RowOutcome
from tracker.store.schema import runs

OF_BATCH = replace(BATCH, workspace_id="ws_1")
STATES = ("running", "completed", "failed", "lost")


async def start_row(
    db: Database, writer: TestWriter, entry: BatchEntry, *run_ids: str, values: int = 0
) -> None:
    """Start a row that becomes these runs; `values` if it has more values than runs are known."""
    row = await reserve(db, entry.key, runs=values or len(run_ids), budgets=[])
    for number, run_id in enumerate(run_ids):
        at = NOW + timedelta(seconds=number)
        entry_of = became(run_id, row)
        observation = replace(entry_of.observation, at=at, created_at=at)
        await writer.submit(replace(entry_of, observation=observation))


def ended(run_id: str, state: str, **facts: Any) -> Observed:
    """What a read long after the end of a run shows."""
    status = RunStatus.COMPLETED if state == "completed" else RunStatus.FAILED
    at = NOW + timedelta(hours=3)
    given: dict[str, Any] = {"completed_at": NOW}
    given |= {"charged_cost": Decimal("0.25")} if state == "completed" else {}
    if state == "failed":
        given["error"] = RunError("model_timeout", f"of {run_id}")
    return seen(run_id, status, at=at, facts=given | facts)


async def bring(db: Database, writer: TestWriter, run_id: str, state: str) -> None:
    if state == "lost":
        values = {"tracking": "lost"}
        await db.execute(sa.update(runs).where(runs.c.run_id == run_id).values(**values))
    elif state != "running":
        await writer.submit(ended(run_id, state))


async def only_row(db: Database) -> RowState:
    (row,) = await kept_rows(db, OF_BATCH)
    return row


@pytest.mark.one_database("sqlite")
async def test_a_row_is_what_all_its_runs_are(db: Database, writer: TestWriter) -> None:
    """It is running while one of them is, completed once all are, and failed otherwise, by the
    error of the first that failed; in Python and in SQL alike, for all states of three runs."""
    product = [*itertools.product(STATES, repeat=3)]
    rows = entries(*(f"{number:024}" for number in range(len(product))))
    await batches.keep(db, OF_BATCH, rows)
    for number, (entry, states) in enumerate(zip(rows, product, strict=True)):
        ids = [f"run_{number}_{which}" for which in "abc"]
        await start_row(db, writer, entry, *ids)
        for run_id, state in zip(ids, states, strict=True):
            await bring(db, writer, run_id, state)
    expected = {
        "running": [number for number, states in enumerate(product) if "running" in states],
        "completed": [n for n, states in enumerate(product) if {*states} == {"completed"}],
    }
    others = {*range(len(product))} - {*expected["running"], *expected["completed"]}
    found = await kept_rows(db, OF_BATCH)
    for number, row in enumerate(found):
        assert row.run_ids == [f"run_{number}_{which}" for which in "abc"]
        first = next((s for s in product[number] if s != "completed"), "completed")
        if number in others:
            assert row.status == first
            which = "abc"[product[number].index(first)]
            if first == "failed":
                assert row.why == f"model_timeout: of run_{number}_{which}"
        else:
            assert row.done == (number in expected["completed"])
            assert (row.status == "completed") == row.done
    counts = await counts_of(db)
    assert counts.active == len(expected["running"])
    assert counts.completed == len(expected["completed"]) == 1
    assert counts.failed + counts.lost == len(others)
    assert (counts.rows, counts.started) == (64, 64)
    costs = [row.cost for row in found if row.cost is not None]
    assert len(costs) == sum({"completed"} <= {*s} <= {"completed", "failed"} for s in product)
    completed = sum(states.count("completed") for states in product)
    assert counts.cost == completed * Decimal("0.25")
    for outcome, which in (
        (RowOutcome.RUNNING, {*expected["running"]}),
        (RowOutcome.COMPLETED, {*expected["completed"]}),
        (RowOutcome.FAILED, others),
    ):
        of = await batches.entries(db, "bat_1", outcome=outcome)
        assert {one.position - 1 for one in of} == which
        pages = await sheet_rows.page_starts(db, "bat_1", outcome=outcome, limit=1000)
        assert len(pages) == 1
    groups = {one.code: one.count for one in await sheet_rows.error_groups(db, "bat_1")}
    by_first = [next(s for s in product[number] if s != "completed") for number in others]
    assert groups == {"lost": by_first.count("lost"), "model_timeout": by_first.count("failed")}


async def test_an_end_counts_before_its_details_are_read(db: Database, writer: TestWriter) -> None:
    """A callback has ended one run, which is read later: the row has neither completed while
    another one is running, nor once that has failed."""
    (entry,) = entries("a" * 24)
    await batches.keep(db, OF_BATCH, [entry])
    await start_row(db, writer, entry, "run_1", "run_2")
    by_callback = seen("run_1", RunStatus.COMPLETED, source=Source.CALLBACK)
    await writer.submit(by_callback)
    row, counts = await only_row(db), await counts_of(db)
    assert (row.status, row.done, row.why, counts.active) == ("pending", False, None, 1)
    await writer.submit(ended("run_2", "failed"))
    row, counts = await only_row(db), await counts_of(db)
    assert (row.status, row.why) == ("failed", "model_timeout: of run_2")
    assert (row.done, row.retryable, counts.active) == (False, False, 1)


async def test_a_row_has_the_costs_and_outputs_of_all_its_runs(
    db: Database, writer: TestWriter
) -> None:
    """A cost is not shown before each is known; a failed run without one is known to have none."""
    (entry,) = entries("a" * 24)
    await batches.keep(db, OF_BATCH, [entry])
    await start_row(db, writer, entry, "run_2", "run_1", "run_3")
    made = {n: (Output(f"o{n}", "imageUrl", f"https://media.example/{n}"),) for n in range(1, 4)}
    for run_id, quote in (("run_1", Decimal("0.4")), ("run_3", Decimal("0.1"))):
        await writer.submit(seen(run_id, RunStatus.PENDING, facts={"charged_cost": quote}))
    assert (await counts_of(db)).quoted == Decimal("0.5")
    await writer.submit(ended("run_2", "completed", outputs=made[2]))
    assert (await only_row(db)).cost is None
    last = {"charged_cost": Decimal("0.5"), "completed_at": NOW + timedelta(minutes=1)}
    await writer.submit(ended("run_1", "completed", outputs=made[1], **last))
    row = await only_row(db)
    assert (row.cost, row.cost_final, row.status) == (None, False, "pending")
    await writer.submit(ended("run_3", "failed"))
    row = await only_row(db)
    assert (row.cost, row.cost_final, row.status) == (Decimal("0.75"), True, "failed")
    assert row.run_ids == ["run_2", "run_1", "run_3"]
    assert [output.output_id for output in row.outputs] == ["o2", "o1"]
    counts = await counts_of(db)
    assert (counts.cost, counts.cost_final, counts.several) == (Decimal("0.75"), True, 1)
    assert (counts.quoted, counts.last_end_at) == (0, NOW + timedelta(minutes=1))
    header, line = (text.strip().split(",") for text in csv_lines([row]))
    shown = dict(zip(header, line, strict=True))
    assert (shown["run_id"], shown["run_id.2"], shown["run_id.3"]) == ("run_2", "run_1", "run_3")
    assert (shown["cost"], shown["output.2"]) == ("0.75", "https://media.example/1")
    ids = await db.fetchcol(sheet_rows.run_ids_of(["bat_1"]))
    assert {*ids} == {"run_1", "run_2", "run_3"}


async def test_a_row_whose_runs_are_not_all_known_has_no_final_cost(
    db: Database, writer: TestWriter
) -> None:
    """FLORA's answer names the first alone."""
    (entry,) = entries("a" * 24)
    await batches.keep(db, OF_BATCH, [entry])
    await start_row(db, writer, entry, "run_1", values=3)
    await writer.submit(ended("run_1", "completed"))
    row, counts = await only_row(db), await counts_of(db)
    assert (row.cost, row.cost_final, row.missing_runs) == (Decimal("0.25"), False, 2)
    assert (counts.cost_final, counts.missing, counts.completed) == (False, 2, 1)
    assert not counts.awaits_runs(NOW + timedelta(hours=3))  # it is not called back


async def test_a_batch_awaits_callbacks_until_two_minutes_after_the_last_end(
    db: Database, writer: TestWriter
) -> None:
    """Of whichever run of the row that is, and however the clock was set since."""
    (entry,) = entries("a" * 24)
    await batches.keep(db, OF_BATCH, [entry])
    await start_row(db, writer, entry, "run_1", "run_2", values=3)
    url = {"callback_token": "own", "callback_url": "https://tracker.example/callbacks/flora/own"}
    await db.execute(sa.update(tables.starts).values(**url))
    await writer.submit(ended("run_1", "failed"))
    late = timedelta(minutes=10)
    assert (await counts_of(db)).awaits_runs(NOW + timedelta(days=1))  # a run is in progress
    last = ended("run_2", "completed")
    at = last.observation.at + late
    await writer.submit(replace(last, observation=replace(last.observation, at=at)))
    counts = await counts_of(db)
    assert (counts.active, counts.missing, counts.called_back) == (0, 1, 1)
    waits = {minutes: counts.awaits_runs(at + timedelta(minutes=minutes)) for minutes in (1, 3)}
    assert waits == {1: True, 3: False}
    assert not counts.awaits_runs(at - timedelta(days=1))
    await db.execute(sa.update(tables.batches).values(launch={}))
    assert await batches.finish_ended(db, at + timedelta(minutes=1)) == 0
    assert await batches.finish_ended(db, at + timedelta(minutes=3)) == 1


async def test_each_run_leads_to_its_start(db: Database, writer: TestWriter) -> None:
    """Whichever of its runs it is, it is no possible run of another start. Another workspace may
    use the same key."""
    for workspace in ("ws_1", "ws_2"):
        row = await reserve(db, "key", runs=2, workspace_id=workspace)
        for number in (1, 2):
            run_id = f"{workspace}_{number}"
            entry = became(run_id, row)
            observation = replace(entry.observation, workspace_id=workspace)
            await writer.submit(
                of_start(replace(entry, observation=observation), workspace_id=workspace)
            )
    other = await reserve(db, "other")
    for workspace, run_id in (("ws_1", "ws_1_1"), ("ws_1", "ws_1_2"), ("ws_2", "ws_2_2")):
        found = await starts.of_run(db, run_id)
        assert found is not None
        assert (found.workspace_id, found.run_id) == (workspace, f"{workspace}_1")
        assert (found.run_count, found.missing_runs) == (2, 0)
        records = (await starts.runs_of(db, [found]))["key"]
        assert [one.run.run_id for one in records] == [f"{workspace}_1", f"{workspace}_2"]
        assert await starts.possible(db, other, [run_id]) == set()


async def test_a_run_of_two_starts_stays_with_both(db: Database, writer: TestWriter) -> None:
    """FLORA may answer several keys with one run. It is as the first start has it: a budget counts
    one start, at its time and price and by its tags, and not some of each."""
    facts: dict[str, dict[str, Any]] = {
        "one": {"tags": None, "reserved_cost": None},
        "two": {"tags": {"team": "blue"}, "at": NOW + DAY},
    }
    for key in ("one", "two"):
        entry = became("run_1", await reserve(db, key, budgets=[], **facts[key]))
        await writer.submit(of_start(entry, inputs=[{"id": key}]))
    record = await get_run(db, "run_1")
    assert record is not None
    assert (record.idempotency_key, record.tags) == ("one", None)
    assert (record.reserved_at, record.reserved_cost) == (NOW, None)
    assert record.inputs == [{"id": "one"}]
    rows = await starts.of_keys(db, "ws_1", ["one", "two"])
    records = await starts.runs_of(db, rows.values())
    assert [[one.run.run_id for one in records[key]] for key in ("one", "two")] == [["run_1"]] * 2
    found = await starts.of_run(db, "run_1")
    assert found is not None
    assert found.idempotency_key == "one"


async def test_retention_keeps_a_start_while_one_of_its_runs_is_stored(
    db: Database, writer: TestWriter
) -> None:
    """Whatever became of the first, and removes it after the last."""
    row = await reserve(db, "key", runs=2)
    for run_id in ("run_1", "run_2"):
        await writer.submit(became(run_id, row))
        await writer.submit(ended(run_id, "completed", created_at=NOW))
    await db.execute(sa.delete(runs).where(runs.c.run_id == "run_1"))
    ages = Ages(runs=400 * DAY, bodies=400 * DAY, keys=DAY)
    pruner = Pruner(database=db, clock=lambda: NOW + 30 * DAY)
    await pruner.prune(ages)
    found = await starts.get(db, "ws_1", "key")
    assert found is not None
    assert [one.run.run_id for one in (await starts.runs_of(db, [found]))["key"]] == ["run_2"]
    await db.execute(sa.delete(runs).where(runs.c.run_id == "run_2"))
    await pruner.prune(ages)
    assert await starts.get(db, "ws_1", "key") is None


@pytest.mark.parametrize("answers", [2, 3])
async def test_a_callback_costs_no_statement_for_that(
    db: Database, writer: TestWriter, answers: int
) -> None:
    """The runs of a start are counted by the statement that closes it; a callback that comes again
    counts nothing."""
    row = await reserve(db, "key", runs=2)
    for number in range(answers):
        await writer.submit(became(f"run_{number % 2}", row))
    found = await starts.get(db, "ws_1", "key")
    assert found is not None
    assert (found.run_count, found.reserved_runs, found.run_id) == (2, 1, "run_0")


async def test_further_runs_of_earlier_starts_are_found(empty_database_url: str) -> None:
    """By the address that their callbacks came to. What came elsewhere belongs to no start."""
    await migrate.upgrade(empty_database_url, "0022")
    run: dict[str, Any] = {"status": "running", "created_at": NOW, "first_seen_at": NOW}
    run |= dict.fromkeys(("progress", "output_count", "polls", "checks", "missing"), 0)
    run |= dict.fromkeys(("details", "precedences"), 0) | {"precedence": 1}
    run |= dict.fromkeys(("created_at_known", "conflict", "callback_expected"), False)
    run |= {"tracking": "active", "next_check_at": NOW, "workspace_id": "ws_1"}
    sources = {"run_2": "history"}  # a sweep may have listed it before its callback came
    came = {"received_at": NOW, "last_received_at": NOW, "receipts": 1, "body": b"{}"}
    start = {"technique_id": "tech_1", "fingerprint": "", "inputs": [], "created_at": NOW}
    start |= {"workspace_slot": "ws_1", "state": "started", "reserved_runs": 1}
    tokens = {"run_1": "a", "run_2": "a", "run_3": "a", "run_4": "b", "run_5": None}
    rows = {
        runs: [
            run | {"run_id": run_id, "source": sources.get(run_id, "start")} for run_id in tokens
        ],
        tables.starts: [
            start | {"idempotency_key": key, "run_id": run_id, "callback_token": key}
            for key, run_id in (("a", "run_1"), ("b", "run_4"))
        ],
        tables.deliveries: [
            came
            | {"delivery_id": f"whd_{run_id}", "run_id": run_id, "callback_token": token}
            | {"outcome": "applied"}
            for run_id, token in tokens.items()
        ],
    }
    async with await Database.open(empty_database_url) as db:
        for table, values in rows.items():
            await db.write(lambda c, t=table, v=values: c.execute(sa.insert(t), v).rowcount)
        await migrate.upgrade(empty_database_url)
        found = await starts.of_keys(db, "ws_1", ["a", "b"])
        assert {key: row.run_count for key, row in found.items()} == {"a": 3, "b": None}
        records = await starts.runs_of(db, found.values())
        ids = {key: [one.run.run_id for one in of] for key, of in records.items()}
        assert ids == {"a": ["run_1", "run_2", "run_3"], "b": ["run_4"]}
        assert await starts.of_run(db, "run_5") is None
