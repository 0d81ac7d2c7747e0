"""The ledger of sweeps: only a complete one counts."""

from datetime import timedelta

from tests.store.making import NOW, TestDoor, callback, seen, started
from tracker.core.observation import Source
from tracker.core.run import RunStatus
from tracker.store import sweeps
from tracker.store.engine import Database

HOUR = timedelta(hours=1)


async def test_a_sweep_is_kept_as_it_ended(db: Database) -> None:
    """The ledger holds what each sweep did, what stopped it, or that it never came back."""
    done = {"pages": 3, "items": 250, "discovered": 2, "repaired": 1}
    whole = await sweeps.begin(db, "ws_1", NOW)
    broken = await sweeps.begin(db, None, NOW + HOUR)
    gone = await sweeps.begin(db, "ws_1", NOW + 2 * HOUR)
    await sweeps.finish(db, whole, at=NOW + HOUR / 2, **done)
    await sweeps.finish(db, broken, at=NOW + 2 * HOUR, **done, error="FLORA answered 503")
    listed = await sweeps.list_sweeps(db, limit=3)
    assert [row.id for row in listed] == [gone, broken, whole]
    assert [row.id for row in await sweeps.list_sweeps(db, limit=2)] == [gone, broken]
    assert listed[0].finished_at is None
    assert (listed[1].workspace_id, listed[1].error) == (None, "FLORA answered 503")
    assert listed[2] == sweeps.SweepRow(
        id=whole,
        workspace_id="ws_1",
        started_at=NOW,
        finished_at=NOW + HOUR / 2,
        pages=3,
        items=250,
        discovered=2,
        repaired=1,
        unreadable=0,
        through=None,
        generations_through=None,
        error=None,
    )


async def test_the_oldest_run_that_has_not_ended_is_found(door: TestDoor, db: Database) -> None:
    """What a sweep must reach back to is the oldest open run of the workspace after a moment."""
    assert await sweeps.oldest_unfinished_since(db, ["ws_1"], NOW) is None
    ages = {"stuck": 50, "open": 5, "newer": 1}
    for name, hours in ages.items():
        facts = {"workspace_id": "ws_1", "created_at": NOW - hours * HOUR}
        await door.put(started(f"run_{name}", facts=facts))
    other = {"workspace_id": "ws_2", "created_at": NOW - 9 * HOUR}
    await door.put(started("run_elsewhere", facts=other))
    ended = {"workspace_id": "ws_1", "created_at": NOW - 8 * HOUR}
    await door.put(seen("run_ended", RunStatus.FAILED, facts=ended))
    await door.put(callback("run_called", workspace_id="ws_1", at=NOW - 7 * HOUR))
    await door.put(seen("run_nameless", source=Source.TRACK, at=NOW - 6 * HOUR))
    since = NOW - 10 * HOUR
    assert await sweeps.oldest_unfinished_since(db, ["ws_1"], since) == NOW - 5 * HOUR
    assert await sweeps.oldest_unfinished_since(db, ["ws_2"], since) == NOW - 9 * HOUR
    assert await sweeps.oldest_unfinished_since(db, [None], since) == NOW - 6 * HOUR
    assert await sweeps.oldest_unfinished_since(db, ["ws_1", None], since) == NOW - 6 * HOUR
    assert await sweeps.oldest_unfinished_since(db, None, since) == NOW - 9 * HOUR
    assert await sweeps.oldest_unfinished_since(db, ["ws_1"], NOW) is None


async def test_how_far_the_history_is_here_is_remembered(db: Database) -> None:
    """The last complete sweep that reached back says through which moment the history is known,
    for technique runs and for generations apart."""
    done = {"pages": 1, "items": 1, "discovered": 0, "repaired": 0}
    said = [
        {"through": NOW, "generations_through": NOW - HOUR},
        {"through": NOW + HOUR},
        {"through": NOW + 2 * HOUR, "error": "FLORA answered 503"},
        {},
    ]
    for hours, what in enumerate(said):
        number = await sweeps.begin(db, "ws_1", NOW + hours * HOUR)
        await sweeps.finish(db, number, at=NOW + hours * HOUR, **done, **what)
    assert await sweeps.last_through(db, "ws_1", "technique") == NOW + HOUR
    assert await sweeps.last_through(db, "ws_1", "generation") == NOW - HOUR
    assert await sweeps.last_through(db, None, "technique") is None
