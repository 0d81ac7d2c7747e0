"""Runs are found by several things at once, with work that does not grow with their number."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from hashlib import sha256

import pytest

from tests.store.making import NOW, TestWriter, callback, seen, started
from tests.store.test_plans import _reads_a_table, plans
from tests.support.started import of_start
from tracker.core.errors import InvalidRequest
from tracker.core.run import RunError, RunStatus
from tracker.store.engine import Database
from tracker.store.queries import batches, paging, starts
from tracker.store.queries.batches import BatchEntry, BatchRow
from tracker.store.queries.search import STATES, SearchFilters, Sort, count_runs, search_runs
from tracker.store.queries.sheet_rows import (
    RowOutcome,
    first_outputs,
    page_starts,
    rows_of_start,
    search_sheets,
)


async def _ids(db: Database, **wanted: object) -> list[str]:
    found = await search_runs(db, SearchFilters(**wanted))  # type: ignore[arg-type]
    return [record.run.run_id for record in found.records]


@pytest.fixture
async def some(db: Database, writer: TestWriter) -> Database:
    """One run in each state, a minute apart."""
    at = [NOW + timedelta(minutes=minutes) for minutes in range(6)]
    of = {"technique_id": "tech_a", "technique_name": "Größe 50%", "workspace_id": "ws_1"}
    for run_id, moment, facts in (
        ("run_pending", at[0], of),
        ("run_running", at[1], of),
        ("run_failed", at[3], of | {"technique_id": "tech_b"}),
        ("run_done", at[4], {"workspace_id": "ws_2"}),
    ):
        await writer.submit(started(run_id, at=moment, facts={**facts, "created_at": moment}))
    await writer.submit(seen("run_running", at=at[1]))
    error = {"error": RunError("model_timeout", "The model took too long")}
    await writer.submit(seen("run_failed", RunStatus.FAILED, at=at[5], facts=error))
    await writer.submit(seen("run_done", RunStatus.COMPLETED, at=at[5]))
    await writer.submit(callback("run_details", at=at[2]))
    return db


async def test_states_are_what_people_ask_for(some: Database) -> None:
    """Each state finds its runs, newest first."""
    found = {state: await _ids(some, state=state) for state in STATES}
    assert found == {
        "open": ["run_details", "run_running", "run_pending"],
        "pending": ["run_pending"],
        "running": ["run_running"],
        "details": ["run_details"],
        "completed": ["run_done", "run_details"],
        "failed": ["run_failed"],
        "other": [],
        "lost": [],
        "conflict": [],
    }


async def test_filters_narrow_each_other(some: Database) -> None:
    """All of what is given has to hold."""
    assert await _ids(some, workspace_id="ws_1") == ["run_failed", "run_running", "run_pending"]
    assert await _ids(some, workspace_id="ws_1", technique_id="tech_a", state="running") == [
        "run_running"
    ]
    assert await _ids(some, state="failed", technique_id="tech_a") == []
    assert await _ids(some, since=NOW + timedelta(minutes=3)) == ["run_done", "run_failed"]
    assert await _ids(some, until=NOW + timedelta(minutes=1)) == ["run_running", "run_pending"]


async def test_text_is_searched_literally(some: Database) -> None:
    """Whatever its case; no character of it means anything else."""
    for text, found in (
        ("model_timeout", ["run_failed"]),
        ("TOO LONG", ["run_failed"]),
        ("tech_b", ["run_failed"]),
        ("run_", ["run_done", "run_failed", "run_details", "run_running", "run_pending"]),
        ("run_done", ["run_done"]),
        ("50%", ["run_failed", "run_running", "run_pending"]),
        ("5%", []),
        ("runXdone", []),
        ("' OR 1=1 --", []),
    ):
        assert await _ids(some, text=text) == found, text


async def test_an_id_finds_its_run_however_old(some: Database) -> None:
    """Anyone who pastes an id wants that run, and not the window of the newest ones."""
    found = await search_runs(some, SearchFilters(text="run_pending"), window=1)
    assert [record.run.run_id for record in found.records] == ["run_pending"]


async def test_a_window_says_how_far_it_searched(some: Database) -> None:
    """What lies beyond it is found by going on, and nothing is skipped or shown twice."""
    wanted, cursor, shown, looked = SearchFilters(text="größe"), None, [], []
    for _ in range(5):
        found = await search_runs(some, wanted, cursor=cursor, window=2)
        shown += [record.run.run_id for record in found.records]
        looked.append(found.searched_to)
        cursor = found.next_cursor
        if cursor is None:
            break
    assert shown == ["run_failed", "run_running", "run_pending"]
    assert looked == [NOW + timedelta(minutes=3), NOW + timedelta(minutes=1), None]


async def test_pages_follow_each_other(some: Database) -> None:
    """With and without a window, pages of one run each show all of them in order."""
    for wanted in (
        SearchFilters(),
        SearchFilters(text="run_"),
        SearchFilters(workspace_id="ws_1", text="run_"),
    ):
        whole = (await search_runs(some, wanted)).records
        cursor, shown = None, []
        while True:
            found = await search_runs(some, wanted, cursor=cursor, limit=1)
            shown += found.records
            cursor = found.next_cursor
            if cursor is None:
                break
        assert shown == whole


async def test_a_foreign_cursor_is_refused(db: Database) -> None:
    """It names the field, as everywhere."""
    with pytest.raises(InvalidRequest) as caught:
        await search_runs(db, SearchFilters(), cursor="nonsense")
    assert caught.value.fields[0].field == "cursor"


async def test_what_a_run_was_asked_for_is_found(db: Database, writer: TestWriter) -> None:
    """The values of its inputs, literally, whatever their case; not the names of their fields."""
    prompt = 'A "red" bike\nby the sea: 50% Größe'
    inputs = [{"id": "prompt", "type": "text", "value": prompt}]
    entry = started("run_bike", facts={"created_at": NOW})
    await writer.submit(of_start(entry, inputs=inputs))
    await writer.submit(started("run_cat"))
    for text in ("RED", '"red" bike', "bike\nby", "50%", "Größe"):
        assert await _ids(db, text=text) == ["run_bike"], text
    for text in ("prompt", "value", "5%", "e_cat"):
        assert await _ids(db, text=text) == [], text


async def test_runs_are_sorted_by_cost_and_duration(db: Database, writer: TestWriter) -> None:
    """The most expensive and the longest first, page by page; with a filter those of the newest
    matching runs; runs without the value are left out."""
    await _of_various_costs(writer, 9)
    await writer.submit(
        started(
            "run_open", facts={"created_at": NOW, "technique_id": "tech_0", "workspace_id": "ws_1"}
        )
    )
    expected = {
        Sort.COST: ["run_8", "run_7", "run_6", "run_5", "run_4", "run_3", "run_2", "run_1"],
        Sort.DURATION: ["run_0", "run_1", "run_2", "run_3", "run_4", "run_5", "run_6", "run_7"],
    }
    for sort, found in expected.items():
        pages = await _pages(db, SearchFilters(sort=sort), limit=3)
        assert pages[:8] == found, sort
        assert "run_open" not in pages
        few = await _pages(db, SearchFilters(sort=sort, technique_id="tech_0"), limit=2)
        assert few == [one for one in pages if int(one[-1]) % 3 == 0], sort
        newest = await _pages(db, SearchFilters(sort=sort, workspace_id="ws_1"), limit=2, window=5)
        assert newest == [one for one in pages if one in ("run_8", "run_7", "run_6", "run_5")]
    with pytest.raises(InvalidRequest):
        await search_runs(db, SearchFilters(sort=Sort.COST), cursor=paging.cursor_at(NOW, "run_1"))


async def _of_various_costs(writer: TestWriter, count: int) -> None:
    """Runs of three techniques: the later its number, the more it cost and the less it took."""
    for number in range(count):
        facts = {
            "created_at": NOW - timedelta(seconds=count - number),
            "completed_at": NOW,
            "technique_id": f"tech_{number % 3}",
            "workspace_id": "ws_1",
            "charged_cost": Decimal(number) / 8,
        }
        await writer.submit(seen(f"run_{number}", RunStatus.COMPLETED, facts=facts))


async def _pages(
    db: Database, wanted: SearchFilters, *, limit: int, window: int = 10_000
) -> list[str]:
    cursor, shown = None, []
    for _ in range(50):
        found = await search_runs(db, wanted, cursor=cursor, limit=limit, window=window)
        shown += [record.run.run_id for record in found.records]
        cursor = found.next_cursor
        if cursor is None:
            return shown
    raise AssertionError("the pages do not end")


async def test_results_are_counted_up_to_a_bound(some: Database) -> None:
    """Exactly while few runs match, and beyond that as "more"; a filter without an index counts in
    the newest ones."""
    assert await count_runs(some, SearchFilters()) == (5, False)
    assert await count_runs(some, SearchFilters(text="tech_")) == (3, False)
    assert await count_runs(some, SearchFilters(), window=4) == (4, True)
    assert await count_runs(some, SearchFilters(text="tech_b"), window=4) == (1, True)
    assert await count_runs(some, SearchFilters(state="failed", sort=Sort.COST)) == (0, False)
    assert await count_runs(some, SearchFilters(sort=Sort.DURATION), window=4) == (0, False)
    assert await count_runs(some, SearchFilters(tag="a=b"), window=4) == (
        0,
        some.dialect == "sqlite",
    )


async def test_runs_are_found_by_their_batch(db: Database, writer: TestWriter) -> None:
    """By the id or name of their batch, and by a carried cell; a run knows its rows."""
    await _keep_batch(db, writer, "bat_1", "spring.csv", skus=("SKU-1", "SKU-2"))
    await _keep_batch(db, writer, "bat_2", "autumn.csv", skus=("SKU-3",))
    await writer.submit(started("run_alone"))
    assert sorted(await _ids(db, batch_id="bat_1")) == ["run_SKU-1", "run_SKU-2"]
    assert await _ids(db, batch_id="bat_1", state="failed") == []
    assert await _ids(db, batch_id="bat_1", sort=Sort.COST) == []
    assert await count_runs(db, SearchFilters(batch_id="bat_1")) == (2, False)
    by_cell = await search_sheets(db, "sku-2")
    assert [(row.name, row.position, row.run_id) for row in by_cell.rows] == [
        ("spring.csv", 2, "run_SKU-2")
    ]
    assert by_cell.batches == []
    by_name = await search_sheets(db, "SPRING")
    assert by_name.batches == [("bat_1", "spring.csv")]
    assert sorted(await _ids(db, text="SPRING", among=by_name.run_ids)) == [
        "run_SKU-1",
        "run_SKU-2",
    ]
    assert await search_sheets(db, "article") == ([], [], ())  # the name of the column
    start = await starts.of_run(db, "run_SKU-2")
    assert start is not None
    rows = await rows_of_start(db, start)
    assert [(row.name, row.position, row.carried) for row in rows] == [
        ("spring.csv", 2, {"article": "SKU-2"})
    ]


async def _keep_batch(
    db: Database, writer: TestWriter, batch_id: str, name: str, *, skus: tuple[str, ...]
) -> None:
    """A batch whose rows have started, each a run named by its article."""
    batch = BatchRow(
        batch_id=batch_id,
        workspace_id="ws_1",
        technique_id="tech_1",
        name=name,
        created_at=NOW,
        columns=["article"],
    )
    entries = [
        BatchEntry(
            position=n,
            line=n + 1,
            digest=sha256(sku.encode()).hexdigest()[:24],
            carried={"article": sku},
        )
        for n, sku in enumerate(skus, start=1)
    ]
    await batches.keep(db, batch, entries)
    for entry in entries:
        run_id = f"run_{entry.carried['article']}"
        await starts.reserve(
            db,
            starts.StartRow(
                workspace_id="ws_1",
                idempotency_key=entry.key,
                technique_id="tech_1",
                fingerprint="",
                inputs=[],
                created_at=NOW,
            ),
        )
        start = started(run_id, facts={"created_at": NOW})
        await writer.submit(of_start(start, workspace_id="ws_1", idempotency_key=entry.key))


ENTRANCES = [
    (SearchFilters(), "ix_runs_newest"),
    (SearchFilters(state="failed"), "ix_runs_newest_not_completed"),
    (SearchFilters(state="completed"), "ix_runs_newest"),
    (SearchFilters(state="completed", workspace_id="ws_1"), "ix_runs_newest_of_workspace"),
    (SearchFilters(state="lost"), "ix_runs_newest_not_settled"),
    (SearchFilters(state="details"), "ix_runs_newest_not_settled"),
    (SearchFilters(state="conflict"), "ix_runs_newest"),
    (SearchFilters(technique_id="tech_1", state="failed"), "ix_runs_newest_of_a_technique"),
    (SearchFilters(workspace_id="ws_1", text="cat"), "ix_runs_newest_of_workspace"),
    (SearchFilters(text="cat", since=NOW - timedelta(days=2)), "ix_runs_newest"),
    (
        SearchFilters(technique_id="tech_1", workspace_id="ws_1", text="x"),
        "ix_runs_newest_of_a_technique",
    ),
    (SearchFilters(sort=Sort.COST), "ix_runs_by_cost"),
    (
        SearchFilters(sort=Sort.COST, technique_id="tech_1", text="x"),
        "ix_runs_newest_of_a_technique",
    ),
    (SearchFilters(sort=Sort.DURATION), "ix_runs_by_duration"),
    (SearchFilters(batch_id="bat_1", state="failed"), "starts"),
]


async def test_rows_of_batches_are_found_by_an_index(full: Database) -> None:
    """The pages of a batch, its pictures, the rows of a run, and a text in carried cells."""
    start = await starts.of_run(full, "run_100")
    assert start is not None
    start = replace(start, idempotency_key=f"row-{'0' * 24}-again1-retry2")
    for call in (
        partial(page_starts, batch_id="bat_1", limit=100),
        partial(page_starts, batch_id="bat_1", outcome=RowOutcome.FAILED, code="x", limit=100),
        partial(first_outputs, batch_ids=["bat_1", "bat_2"], most=4),
        partial(rows_of_start, start=start),
        # So few of the rows here that an index is worth it.
        partial(search_sheets, text="cat", newest=10),
    ):
        told = await plans(full, call)
        # Which has no rows here.
        assert not _reads_a_table(told.replace("Seq Scan on run_outputs", "")), f"{call}:\n{told}"


async def test_every_search_enters_by_an_index(full: Database) -> None:
    """No combination of filters reads the table whole: a window is a small part of it."""
    for wanted, index in ENTRANCES:
        told = await plans(full, partial(search_runs, wanted=wanted, window=200))
        told += await plans(full, partial(count_runs, wanted=wanted, window=200))
        assert index in told, f"{wanted}:\n{told}"
        assert not _reads_a_table(told), f"{wanted}:\n{told}"
