"""Batches: rows are kept with their keys, and what became of them is read from starts and runs."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import update

from tests.store.making import NOW, TestWriter, seen, started
from tests.store.test_starts import mark, reserve
from tests.support.started import of_start
from tracker.core.errors import InvalidRequest
from tracker.core.run import Output, RunError, RunStatus
from tracker.core.starts import RunNumber
from tracker.store.engine import Database
from tracker.store.queries import batches, sheet_rows
from tracker.store.queries.batches import BatchCounts, BatchEntry, BatchRow, LaunchEnd
from tracker.store.queries.sheet_rows import LatestRunNumber, RowOutcome
from tracker.store.queries.starts import StartState
from tracker.store.schema import runs

BATCH = BatchRow(
    batch_id="bat_1",
    workspace_id="default",
    technique_id="tech_1",
    name="looks.csv",
    created_at=NOW,
)


def entries(*digests: str, run_number: RunNumber | None = None) -> list[BatchEntry]:
    return [
        BatchEntry(
            position=number, line=number + 1, digest=digest, run_number=run_number or RunNumber()
        )
        for number, digest in enumerate(digests, 1)
    ]


async def counts_of(db: Database, batch_id: str = "bat_1") -> BatchCounts:
    return (await batches.batch_counts(db, [batch_id]))[batch_id]


async def test_a_batch_is_kept_with_its_rows(db: Database) -> None:
    """What was kept is read back, row by row."""
    rows = entries("a", "b")
    await batches.keep(db, BATCH, rows)
    assert await batches.get(db, "bat_1") == BATCH
    assert await batches.get(db, "bat_2") is None
    assert await batches.entries(db, "bat_1") == rows
    assert await batches.entries(db, "bat_1", after=1, limit=1) == rows[1:]
    assert await batches.entries(db, "bat_2") == []


async def test_a_batch_is_kept_with_all_that_launches_it(db: Database) -> None:
    """Inputs, tags and carried cells of its rows, and its options, are read back; a command that
    repeats it leaves the options as they are until the batch is launched, and is alone with it
    then."""
    inputs = [{"id": "prompt", "type": "text", "value": "猫"}]
    (row,) = entries("a")
    row = replace(row, inputs=inputs, tags={"client": "acme"}, carried={"SKU": "17"})
    launch = {"max_cost": "5", "started_by": "shop"}
    launched = replace(BATCH, source="api", columns=["SKU"], launch=launch, launch_at=NOW)
    await batches.keep(db, launched, [row])
    await batches.keep(db, replace(BATCH, source="cli", columns=["SKU"]), [row])
    assert await batches.get(db, "bat_1") == launched
    assert await batches.entries(db, "bat_1") == [row]
    (due,) = await batches.claim_due(db, ["default"], holder="h", now=NOW, limit=1)
    ended = LaunchEnd(launch_at=None, stopped=None, errors={})
    assert await batches.end_launch(db, due, ended, holder="h")
    await batches.keep(db, replace(BATCH, columns=["SKU"]), [row])
    assert await batches.get(db, "bat_1") == replace(launched, launch=None, launch_at=None)


async def test_a_batch_that_is_given_again_is_brought_up_to_date(db: Database) -> None:
    """Name, lines and attempts follow the sheet; it is open again, and begun when it was begun."""
    await batches.keep(db, BATCH, entries("a", "b"))
    await batches.finish(db, BATCH, NOW)
    assert await batches.get(db, "bat_1") == replace(BATCH, finished_at=NOW)
    later = replace(BATCH, name="new.csv", created_at=NOW + timedelta(hours=1))
    (first, second) = entries("a", "b")
    moved = [replace(first, line=7), replace(second, run_number=RunNumber().retried())]
    await batches.keep(db, later, moved)
    assert await batches.get(db, "bat_1") == replace(BATCH, name="new.csv")
    assert await batches.entries(db, "bat_1") == moved


async def test_a_row_never_goes_back(db: Database) -> None:
    """A command that planned before another one retried a row does not undo it."""
    (row,) = entries("a")
    retried = replace(row, run_number=RunNumber().retried())
    await batches.keep(db, BATCH, [retried])
    await batches.keep(db, BATCH, [row])
    assert await batches.entries(db, "bat_1") == [retried]


async def test_the_latest_turn_of_a_row_is_found_in_any_batch(db: Database) -> None:
    """By workspace; a generation counts as finished where one batch with it was."""
    again = RunNumber().again()
    await batches.keep(db, BATCH, entries("a", "b", "c"))
    await batches.finish(db, BATCH, NOW)
    await batches.keep(db, replace(BATCH, batch_id="bat_2"), entries("b", "c", run_number=again))
    retried = entries("c", run_number=again.retried())
    third = replace(BATCH, batch_id="bat_3")
    await batches.keep(db, third, retried)
    await batches.finish(db, third, NOW)
    elsewhere = replace(BATCH, batch_id="bat_4", workspace_id="other")
    await batches.keep(db, elsewhere, entries("d"))
    assert await sheet_rows.latest_run_numbers(db, "default", ["a", "b", "c", "d"]) == {
        "a": LatestRunNumber(run_number=RunNumber(), finished=True),
        "b": LatestRunNumber(run_number=again, finished=False),
        "c": LatestRunNumber(run_number=again.retried(), finished=True),
    }


@pytest.mark.one_database("sqlite")
async def test_large_sheets_are_kept_and_found(db: Database) -> None:
    """More rows than one statement takes parameters for."""
    digests = [f"d{number}" for number in range(33_000)]
    rows = entries(*digests)
    await batches.keep(db, BATCH, rows)
    assert await batches.entries(db, "bat_1") == rows
    assert len(await sheet_rows.latest_run_numbers(db, "default", digests)) == len(digests)
    assert await counts_of(db) == BatchCounts(rows=len(digests))


async def test_batches_are_listed_newest_first(db: Database) -> None:
    """Page by page, also those of one moment: none is shown twice, and none left out."""
    for number in range(5):
        moment = NOW + timedelta(seconds=number // 2)
        await batches.keep(db, replace(BATCH, batch_id=f"bat_{number}", created_at=moment), [])
    pages: list[list[str]] = []
    cursor = None
    while not pages or cursor:
        page, cursor = await batches.list_batches(db, cursor=cursor, limit=2)
        pages.append([one.batch_id for one in page])
    assert pages == [["bat_4", "bat_3"], ["bat_2", "bat_1"], ["bat_0"]]
    with pytest.raises(InvalidRequest, match="cursor"):
        await batches.list_batches(db, cursor="nonsense", limit=2)


async def test_failed_rows_are_grouped_by_reason(db: Database, writer: TestWriter) -> None:
    """By FLORA's code and the advice that follows; a row is retryable where a retry of failed rows
    starts it. Rows are filtered by outcome and by code."""
    rows = entries(*"abcdefghi")
    rows[3] = replace(rows[3], run_number=RunNumber().retried())
    await batches.keep(db, BATCH, rows)
    await batches.finish(db, BATCH, None, errors={9: "FLORA shows no price"})
    for row in rows[:8]:
        await reserve(db, row.key)
    refused = {"code": "input_validation_error", "message": "prompt is too long"}
    await mark(db, rows[0].key, StartState.REFUSED, error=refused)
    await mark(db, rows[1].key, StartState.SENT)
    for row, code in zip(rows[2:7], ["provider_error"] * 3 + ["safety_blocked", None], strict=True):
        start = of_start(
            started(f"run_{row.digest}"), workspace_id="default", idempotency_key=row.key
        )
        await writer.submit(start)
        if code is not None:
            facts = {"error": RunError(code, f"{code} happened")}
            await writer.submit(seen(f"run_{row.digest}", RunStatus.FAILED, facts=facts))
    found = await sheet_rows.error_groups(db, "bat_1")
    assert [(one.code, one.count, one.retryable, one.message) for one in found] == [
        ("provider_error", 3, 2, "provider_error happened"),
        ("input_validation_error", 1, 0, "prompt is too long"),
        ("not_started", 1, 0, "FLORA shows no price"),
        ("safety_blocked", 1, 0, "safety_blocked happened"),
    ]

    async def of(outcome: RowOutcome | None = None, code: str | None = None) -> str:
        kept = await batches.entries(db, "bat_1", outcome=outcome, code=code)
        return "".join(row.digest for row in kept)

    assert [await of(outcome) for outcome in RowOutcome] == ["", "acdefi", "bg", "h"]
    assert await of(code="provider_error") == "cde"


async def test_rows_are_counted_by_what_became_of_them(db: Database, writer: TestWriter) -> None:
    """Every state of a start and of a run has its count; costs add up exactly."""
    keys = {name: f"row-{name}" for name in "abcdefgh"}
    await batches.keep(db, BATCH, entries(*keys))
    for name in "bcdefgh":
        await reserve(db, keys[name])
    for name, state in zip("cde", ("refused", "unresolved", "sent"), strict=True):
        await mark(db, keys[name], StartState(state))
    for number, name in enumerate("fgh"):
        start = started(f"run_{name}", at=NOW + timedelta(seconds=number))
        await writer.submit(of_start(start, workspace_id="default", idempotency_key=keys[name]))
    cost: dict[str, Any] = {"charged_cost": Decimal("0.1"), "outputs": (Output("o", "text", "x"),)}
    await writer.submit(seen("run_g", RunStatus.COMPLETED, facts=cost))
    await writer.submit(seen("run_h", RunStatus.FAILED, facts={"charged_cost": Decimal("0.2")}))
    found = await counts_of(db)
    assert found.next_check_at is not None
    unset = dict.fromkeys(("next_check_at", "last_end_at", "last_end_seen_at"))
    assert replace(found, **unset) == BatchCounts(
        rows=8,
        started=3,
        active=1,
        completed=1,
        failed=1,
        refused=1,
        unresolved=1,
        doubt=1,
        cost=Decimal("0.3"),
        not_final=3,
    )
    assert (found.ended, found.unstarted) == (2, 5)
    assert await batches.batch_counts(db, ["bat_2"]) == {"bat_2": BatchCounts()}
    # A lost run is due once a day, and nobody waits for it.
    await db.execute(update(runs).where(runs.c.run_id == "run_f").values(tracking="lost"))
    counts = await counts_of(db)
    assert (counts.active, counts.lost, counts.next_check_at) == (0, 1, None)


async def test_a_batch_is_finished_when_its_last_run_has_ended(
    db: Database, writer: TestWriter
) -> None:
    """Also where its command did not wait for the runs."""
    await batches.keep(db, BATCH, entries("a", "b"))
    for number, row in enumerate(entries("a", "b")):
        await reserve(db, row.key)
        start = started(f"run_{row.digest}", at=NOW + timedelta(seconds=number))
        await writer.submit(of_start(start, workspace_id="default", idempotency_key=row.key))
    await batches.finish(db, BATCH, NOW)
    batch = replace(BATCH, finished_at=NOW)
    assert (await counts_of(db)).finished_at(batch) is None
    last = NOW + timedelta(minutes=2)
    for run_id, end in (("run_a", last), ("run_b", NOW + timedelta(minutes=1))):
        facts: dict[str, Any] = {"completed_at": end, "charged_cost": Decimal("0.1")}
        await writer.submit(seen(run_id, RunStatus.FAILED, facts=facts))
    counts = await counts_of(db)
    assert counts.finished_at(batch) == last
    assert counts.finished_at(BATCH) is None
