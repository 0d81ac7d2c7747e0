"""A start's hold, while the database comes and goes."""

import asyncio
from pathlib import Path

from tests.support.logs import capture_logs
from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.starting.sending import holding
from tracker.store.clock import SharedClock, shared_clock
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow
from tracker.workspaces import Service, Workspaces


async def reserved(db: Database, key: str) -> StartRow:
    """A start that nobody holds."""
    return await starts.reserve(
        db,
        starts.StartRow(
            workspace_id="default",
            idempotency_key=key,
            technique_id="tech_1",
            fingerprint="f00d",
            inputs=[],
            created_at=utc_now(),
        ),
    )


def service(db: Database, clock: SharedClock) -> Service:
    workspaces = Workspaces([], database=db, clock=clock)
    return Service(database=db, workspaces=workspaces, clock=clock, process="process")


async def test_whenever_it_is_broken_off_nobody_holds_the_start(database_url: str) -> None:
    """Also while the hold is being taken, and nobody knows yet whether it was."""
    async with await Database.open(database_url) as db, shared_clock(db) as clock:
        for moment in range(40):
            row = await reserved(db, f"key-{moment}")

            async def hold(row: StartRow = row) -> None:
                async with holding(service(db, clock), row):
                    await asyncio.sleep(30)

            holds = asyncio.create_task(hold())
            await asyncio.sleep(moment * 0.0002)
            holds.cancel()
            await asyncio.wait([holds])

            async def nobodys(key: str = row.idempotency_key) -> bool:
                found = await starts.get(db, "default", key)
                return found is not None and found.lease_holder is None

            await eventually(nobodys)


async def test_a_hold_that_could_not_be_given_back_is_as_soon_as_it_can_be(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Else the caller's next try would wait until it runs out, though nobody has it. Said once."""
    path, away = tmp_path / "tracker.db", tmp_path / "away.db"
    async with await Database.open(sqlite_url) as db, shared_clock(db) as clock:
        row = await reserved(db, "key")
        with capture_logs() as lines:

            async def hold() -> None:
                async with holding(service(db, clock), row) as held:
                    assert held is not None
                    path.rename(away)

            holds = asyncio.create_task(hold())
            await eventually(lambda: lines)
            away.rename(path)
            await holds

            async def given_back() -> bool:
                async with holding(service(db, clock), row) as again:
                    return again is not None

            await eventually(given_back)
    assert [line["event"] for line in lines] == ["start.hold_kept"]
