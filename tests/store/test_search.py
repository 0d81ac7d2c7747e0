"""Runs are found by several things at once, with work that does not grow with their number."""

from datetime import timedelta
from functools import partial

import pytest

from tests.store.making import NOW, TestWriter, callback, seen, started
from tests.store.test_plans import _reads_a_table, plans
from tracker.core.errors import InvalidRequest
from tracker.core.run import RunError, RunStatus
from tracker.store.engine import Database
from tracker.store.queries.search import STATES, Wanted, search_runs


async def _ids(db: Database, **wanted: object) -> list[str]:
    found = await search_runs(db, Wanted(**wanted))  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model_timeout", ["run_failed"]),
        ("TOO LONG", ["run_failed"]),
        ("tech_b", ["run_failed"]),
        ("run_", ["run_done", "run_failed", "run_details", "run_running", "run_pending"]),
        ("run_done", ["run_done"]),
        ("50%", ["run_failed", "run_running", "run_pending"]),
        ("5%", []),
        ("runXdone", []),
        ("' OR 1=1 --", []),
    ],
)
async def test_text_is_searched_literally(some: Database, text: str, found: list[str]) -> None:
    """Whatever its case; no character of it means anything else."""
    assert await _ids(some, text=text) == found


async def test_an_id_finds_its_run_however_old(some: Database) -> None:
    """Anyone who pastes an id wants that run, and not the window of the newest ones."""
    found = await search_runs(some, Wanted(text="run_pending"), window=1)
    assert [record.run.run_id for record in found.records] == ["run_pending"]


async def test_a_window_says_how_far_it_searched(some: Database) -> None:
    """What lies beyond it is found by going on, and nothing is skipped or shown twice."""
    wanted, cursor, shown, looked = Wanted(text="größe"), None, [], []
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
    for wanted in (Wanted(), Wanted(text="run_"), Wanted(workspace_id="ws_1", text="run_")):
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
        await search_runs(db, Wanted(), cursor="nonsense")
    assert caught.value.fields[0].field == "cursor"


ENTRANCES = [
    (Wanted(), "ix_runs_newest"),
    (Wanted(state="failed"), "ix_runs_newest_not_completed"),
    (Wanted(state="completed"), "ix_runs_newest"),
    (Wanted(state="completed", workspace_id="ws_1"), "ix_runs_newest_of_workspace"),
    (Wanted(state="lost"), "ix_runs_newest_not_settled"),
    (Wanted(state="details"), "ix_runs_newest_not_settled"),
    (Wanted(state="conflict"), "ix_runs_newest"),
    (Wanted(technique_id="tech_1", state="failed"), "ix_runs_newest_of_a_technique"),
    (Wanted(workspace_id="ws_1", text="cat"), "ix_runs_newest_of_workspace"),
    (Wanted(text="cat", since=NOW - timedelta(days=2)), "ix_runs_newest"),
    (Wanted(technique_id="tech_1", workspace_id="ws_1", text="x"), "ix_runs_newest_of_a_technique"),
]


async def test_every_search_enters_by_an_index(full: Database) -> None:
    """No combination of filters reads the table whole: a window is a small part of it."""
    for wanted, index in ENTRANCES:
        told = await plans(full, partial(search_runs, wanted=wanted, window=200))
        assert index in told, f"{wanted}:\n{told}"
        assert not _reads_a_table(told), f"{wanted}:\n{told}"
