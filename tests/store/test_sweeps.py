"""The log of sweeps."""

from datetime import timedelta

from tests.store.making import NOW
from tracker.store.engine import Database
from tracker.store.queries import sweeps

HOUR = timedelta(hours=1)


async def test_a_sweep_is_kept_as_it_ended(db: Database) -> None:
    """The log holds what each sweep did, what stopped it, or that it never came back."""
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
        generations_error=None,
    )


async def test_a_workspace_takes_over_its_unnamed_sweeps_alone(db: Database) -> None:
    """Those before its id was known; not another workspace's."""
    for workspace_id in ("ws_other", None, "ws_1"):
        last = await sweeps.begin(db, workspace_id, NOW)
    await sweeps.finish(db, last, at=NOW + HOUR, also_of="ws_1")
    listed = await sweeps.list_sweeps(db)
    assert [row.workspace_id for row in listed] == ["ws_1", "ws_1", "ws_other"]
    assert [row.finished_at for row in listed] == [NOW + HOUR, None, None]
