"""What a metric is told of the database, on both engines."""

from datetime import timedelta
from decimal import Decimal

from tests.store.making import (
    NOW,
    TestWriter,
    apply_all,
    callback,
    delivery,
    open_inbox,
    quarantined,
    seen,
    started,
)
from tests.store.test_starts import mark, reserve
from tracker.core.run import RunStatus
from tracker.store.engine import Database
from tracker.store.queries.deliveries import acknowledge
from tracker.store.queries.overview import counts, read_gauges
from tracker.store.queries.starts import StartState

WS = {"workspace_id": "ws_1"}
ENDED = {**WS, "completed_at": NOW, "charged_cost": Decimal("0.25"), "outputs": ()}


async def test_what_waits_to_be_applied_is_counted(db: Database) -> None:
    """With the time of the first; nothing is left once it is applied."""
    async with open_inbox(db) as inbox:
        for seconds, run in ((5, "run_2"), (0, "run_1"), (9, "run_3")):
            await inbox.store(delivery(run, at=NOW + timedelta(seconds=seconds)))
    found = await read_gauges(db, now=NOW)
    assert (found.waiting, found.oldest_waiting_at) == (3, NOW)
    counted = await counts(db, now=NOW)
    assert (counted.waiting, counted.oldest_waiting_at) == (3, NOW)
    await apply_all(db)
    found = await read_gauges(db, now=NOW)
    assert (found.waiting, found.oldest_waiting_at) == (0, None)


async def test_an_empty_database_has_zeros(db: Database) -> None:
    """And nothing where there is nothing to tell."""
    found = await read_gauges(db, now=NOW)
    assert (found.due, found.overdue, found.awaiting_callback, found.quarantined) == (0, 0, 0, 0)
    assert (found.open_starts, found.unresolved_starts) == (0, 0)
    assert (found.runs, found.callbacks, found.cost_today) == ({}, {}, {})
    assert (found.oldest_due_at, found.last_callback_at) == (None, None)


async def test_runs_are_counted_by_where_they_stand(db: Database, writer: TestWriter) -> None:
    """By workspace, status and tracking, whether or not the rollups have been compacted."""
    done = RunStatus.COMPLETED
    await writer.submit_all(
        [
            started("run_1", facts=WS),
            started("run_2", facts=WS),
            seen("run_3", done, facts=ENDED, reads=1),
            seen("run_4"),
        ]
    )
    await writer.submit(callback("run_2", workspace_id="ws_1"))
    found = await read_gauges(db, now=NOW)
    assert found.runs == {
        ("", "running", "active"): 1,
        ("ws_1", "pending", "active"): 1,
        ("ws_1", "completed", "active"): 1,
        ("ws_1", "completed", "settled"): 1,
    }
    assert found.awaiting_callback == 1
    assert found.callbacks == {("ws_1", "came"): 1}
    assert found.cost_today == {"ws_1": Decimal("0.25")}
    assert found.last_callback_at == NOW


async def test_due_and_overdue_go_by_the_time(db: Database, writer: TestWriter) -> None:
    """Due is what may be read now, overdue what nobody has read for over a minute since."""
    await writer.submit_all([callback("run_1"), callback("run_2", at=NOW + timedelta(seconds=90))])
    for seconds, due, overdue in ((-1, 0, 0), (0, 1, 0), (59, 1, 0), (60, 1, 1), (90, 2, 1)):
        found = await read_gauges(db, now=NOW + timedelta(seconds=seconds))
        assert (found.due, found.overdue) == (due, overdue), seconds
    assert found.oldest_due_at == NOW


async def test_only_the_last_hours_are_recent(db: Database, writer: TestWriter) -> None:
    """The hour that has begun and the one before; costs are of the day."""
    await writer.submit_all(
        [started("run_1", facts=WS), seen("run_1", RunStatus.FAILED, facts=ENDED)]
    )
    hours = {
        hour: (await read_gauges(db, now=NOW + timedelta(hours=hour))).callbacks
        for hour in (0, 1, 2)
    }
    assert hours == {0: {("ws_1", "missed"): 1}, 1: {("ws_1", "missed"): 1}, 2: {}}
    assert (await read_gauges(db, now=NOW + timedelta(hours=12))).cost_today == {}


async def test_what_waits_for_a_person_is_counted(db: Database, writer: TestWriter) -> None:
    """Callbacks that nobody understood, and starts that nobody can tell about."""
    await writer.submit_all([quarantined(f"whd_{number}") for number in (1, 2, 3)])
    assert await db.write(lambda c: acknowledge(c, ["whd_3", "whd_none"], NOW)) == ["whd_3"]
    for key in ("key_1", "key_2", "key_3"):
        await reserve(db, key)
    await mark(db, "key_1", StartState.UNRESOLVED)
    await mark(db, "key_2", StartState.SENT)
    await mark(db, "key_3", StartState.IN_DOUBT)
    found = await read_gauges(db, now=NOW)
    assert (found.quarantined, found.open_starts, found.unresolved_starts) == (2, 2, 1)


async def test_no_count_goes_beyond_the_bound(db: Database, writer: TestWriter) -> None:
    """However much has piled up, so many rows are looked at; the longest due are among them."""
    late = [callback(f"run_{n}", at=NOW + timedelta(seconds=n)) for n in range(5)]
    await writer.submit_all(list(reversed(late)))
    found = await read_gauges(db, now=NOW + timedelta(hours=1), bound=2)
    assert (found.due, found.overdue) == (2, 2)
    assert found.oldest_due_at == NOW
