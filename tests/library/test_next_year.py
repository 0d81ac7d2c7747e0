"""What a newer version has stored ends no loop of a worker; the library shows it as it is."""

from sqlalchemy import func, select, update

from tests.library.conftest import INPUTS, MakeTracker
from tests.support import next_year
from tests.support.logs import capture_logs
from tests.support.next_year import NEW, RUNS
from tests.support.waiting import eventually
from tracker.store.engine import Database
from tracker.store.schema import batches, starts


async def stopped(db: Database) -> str | None:
    """Why the batch is not launched."""
    found: str = await db.fetchval(select(batches.c.stopped))
    return None if found == NEW else found


async def test_every_loop_goes_on(make_tracker: MakeTracker, database_url: str) -> None:
    """A run that is started beside what is not known ends, is billed and reported."""
    await next_year.fill(database_url)
    seen: list[object] = []
    with capture_logs() as lines:
        tracker = make_tracker(worker=True)

        @tracker.on("run.settled", name="all")
        async def ended(event: object) -> None:
            seen.append(event)

        async with await Database.open(database_url) as db, tracker:
            run = await (await tracker.start("icon-pack", INPUTS)).wait(20)
            assert run.succeeded
            await eventually(lambda: bool(seen))
            due = {"launch_at": next_year.NOW, "workspace_slot": run.workspace_id}
            await db.write(lambda one: one.execute(update(batches).values(due)).rowcount)
            waiting = await eventually(lambda: stopped(db))
            assert (
                waiting
                == f"it waits for a worker of the newer version that it was ordered with ({NEW})"
            )
            assert await db.fetchval(select(func.count()).select_from(starts)) == 4
            for run_id in RUNS:
                shown = await tracker.get(run_id)
                assert shown.source == NEW
                assert shown.retry_advice is None or shown._repr_html_()
                assert {one.source for one in await shown.events()} >= {NEW}
            assert (await tracker.batch("bat_1"))._repr_html_()
    assert not [line for line in lines if line["log_level"] == "error"]
