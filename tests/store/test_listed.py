"""Where runs stand in FLORA's list: what is newer is above."""

from datetime import timedelta

from tests.store.making import NOW, TestWriter, seen
from tracker.store.coordination import list_positions
from tracker.store.engine import Database

MINUTE = timedelta(minutes=1)


async def test_a_place_counts_the_runs_above(writer: TestWriter, db: Database) -> None:
    """Newer runs of the same list count; generation runs and other workspaces' do not."""
    for number in range(6):
        await writer.submit(
            seen(
                f"run_{number}",
                facts={
                    "created_at": NOW - number * MINUTE,
                    "run_type": "generation" if number == 1 else "technique",
                    "workspace_id": "ws_2" if number == 2 else "ws_1",
                },
            )
        )
    wanted = ["run_0", "run_3", "run_5"]
    found = await list_positions(db, wanted, ["ws_1", None], among=100)
    assert found == {"run_0": 1, "run_3": 2, "run_5": 4}
    assert await list_positions(db, wanted, None, among=100) == {"run_0": 1, "run_3": 3, "run_5": 5}


async def test_what_is_far_below_has_no_place(writer: TestWriter, db: Database) -> None:
    """Only so many of the newest runs are looked through."""
    for number in range(6):
        await writer.submit(seen(f"run_{number}", facts={"created_at": NOW - number * MINUTE}))
    assert await list_positions(db, ["run_1", "run_5"], None, among=3) == {"run_1": 2}
