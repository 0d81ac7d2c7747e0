"""What is stored already when statuses of a newer FLORA are taken: migration 0014."""

from typing import Any

from sqlalchemy import insert, select

from tests.store.making import open_writer, seen
from tests.store.test_bills_migration import a_run
from tests.store.upgrading import OldWriters
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.schema import runs

BEFORE = "0013"


async def test_lost_runs_become_due_and_new_statuses_are_taken(empty_database_url: str) -> None:
    """A lost run of the version before is read again, its other rows stay, and whatever FLORA calls
    an end is stored and counted from then on, as unpriced where no bill came."""
    now = utc_now()
    await migrate.upgrade(empty_database_url, BEFORE)
    lost = {"tracking": "lost", "next_check_at": None}
    rows = [
        a_run("lost", "running", 0, ended=None, charged_cost=None, **lost),
        a_run("running", "running", 0, ended=None, charged_cost=None),
        a_run("failed", "failed", 0, ended=now, charged_cost=None),
    ]
    async with await Database.open(empty_database_url) as db:
        tables = (await OldWriters.knowing(db))._tables

        def work(connection: Any) -> None:
            connection.execute(insert(tables["runs"]), rows)

        await db.write(work)
    await migrate.upgrade(empty_database_url)
    async with await Database.open(empty_database_url) as db:
        found = await read.get_runs(db, ["lost", "running", "failed"])
        assert found["lost"].next_check_at is not None
        assert found["lost"].tracking == "lost"
        assert (found["failed"].next_check_at, found["failed"].run.settled) == (None, True)
        async with open_writer(db) as writer:
            cancelled = Observation(
                run_id="cancelled", source=Source.POLL, at=now, status="cancelled", completed_at=now
            )
            await writer.submit(Observed(observation=cancelled))
            await writer.submit(seen("lost"))
        async with db.read() as connection:
            statuses = await connection.execute(select(runs.c.run_id, runs.c.status))
            assert dict(map(tuple, statuses))["cancelled"] == "cancelled"
