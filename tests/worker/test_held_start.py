"""A start's hold, while the database comes and goes."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.logs import capture_logs
from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.core.errors import StartPending
from tracker.starting import sending
from tracker.starting.sending import HELD_FOR, holding
from tracker.store.clock import SharedClock, shared_clock
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.starts import NotStored, StartRow, StartState
from tracker.store.url import DatabaseTimes
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


async def test_nothing_is_sent_once_the_lease_may_be_over(database_url: str) -> None:
    """The machine was suspended after the database answered: another process may send it by now."""
    client: Any = SimpleNamespace(key_fingerprint="f00d", clock_offset=None)
    async with await Database.open(database_url) as db, shared_clock(db) as clock:
        row = await reserved(db, "key")
        async with holding(service(db, clock), row) as held:
            assert held is not None
            held.valid_until = clock.seconds()
            with pytest.raises(StartPending, match="taken over"):
                await held.let_through(client, "f00d", None, "{}")
            assert not held.was_sent
        found = await starts.get(db, "default", "key")
        assert found is not None
        assert found.state is StartState.STORED


async def test_nothing_is_tried_once_the_database_is_closed(database_url: str) -> None:
    """An application that has closed its tracker keeps no task of it."""
    before = asyncio.all_tasks()
    db = await Database.open(database_url)
    async with shared_clock(db) as clock:
        row = await reserved(db, "key")
        async with holding(service(db, clock), row) as held:
            assert held is not None
            held.not_stored = starts.as_before(row, clock())
            await db.close()
    assert asyncio.all_tasks() == before


async def test_what_is_not_stored_is_stored_when_another_holder_is_done(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage, a worker that looks at open starts may be the first to hold it."""
    monkeypatch.setattr(sending, "RELEASE_AGAIN_AFTER", 0.01)
    times = DatabaseTimes(release=0.1)
    async with (
        await Database.open(database_url, times=times) as db,
        shared_clock(db) as clock,
    ):
        row = await reserved(db, "key-1")
        start, later = ("default", "key-1"), clock() + 2 * HELD_FOR
        async with holding(service(db, clock), row) as held:
            assert held is not None
            sent = await starts.mark_sent(
                db, *start, holder=held.holder, at=clock(), callback_url=None, request_body="{}"
            )
            assert sent is not None
            refused = starts.outcome(StartState.REFUSED, {"message": "no credits"})
            held.not_stored = NotStored(sent.sent_at, refused)
            assert await starts.take(db, *start, "worker", later, HELD_FOR)
        await starts.give_back(db, *start, "worker")

        async def is_refused() -> bool:
            found = await starts.get(db, *start)
            return found is not None and found.state is StartState.REFUSED

        await eventually(is_refused)
