"""Receivers and workers that write the same runs at the same moment never wait in a circle."""

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.util import await_only

from tests.store.making import POLICY, callback, open_writer, seen
from tests.support.waiting import eventually
from tracker.core.record import Entry
from tracker.core.run import RunStatus
from tracker.store.engine import Database
from tracker.store.queries.runs import get_run
from tracker.store.writing.writer import MergeRules, WriteBatch, WriteOutcome

WAITING = text("SELECT count(*) FROM pg_locks WHERE NOT granted")


class Halting(WriteBatch):
    """Stands still between locking what is known and writing what is new."""

    locked: asyncio.Event
    go_on: asyncio.Event

    def write(self) -> WriteOutcome:
        """As ever, but when it is told to."""
        self.locked.set()
        await_only(self.go_on.wait())
        return super().write()

    @classmethod
    def writing(cls, *entries: Entry) -> Callable[[Connection], WriteOutcome]:
        """The work of a transaction that writes these, and halts."""
        cls.locked, cls.go_on = asyncio.Event(), asyncio.Event()

        def work(connection: Connection) -> WriteOutcome:
            run_ids = {entry.run_id for entry in entries}
            batch = cls(connection, run_ids, MergeRules(POLICY, lambda _: None), "origin")
            for entry in entries:
                batch.add(entry)
            return batch.write()

        return work


async def until_someone_waits(db: Database) -> None:
    """Until a transaction waits for another's lock."""

    async def waits() -> bool:
        async with db.read() as connection:
            return bool((await connection.execute(WAITING)).scalar())

    await eventually(waits)


@pytest.mark.usefixtures("patient")
async def test_a_run_that_becomes_known_meanwhile_is_not_waited_for(postgres_url: str) -> None:
    """One has locked a run and wants to add another, which someone else has added and a third one
    has locked, who waits for the first: the first begins anew at once, and no deadlock arises."""
    errors: list[str] = []

    def note(context: Any) -> None:
        errors.append(context.original_exception.sqlstate)

    async with (
        await Database.open(postgres_url) as one,
        await Database.open(postgres_url) as other,
        open_writer(other) as writer,
        await Database.open(postgres_url) as third,
        open_writer(third) as third_writer,
    ):
        for engine in (*one.engines, *other.engines, *third.engines):
            event.listen(engine, "handle_error", note)
        await writer.submit(seen("run_2"))
        entries = [seen("run_1", RunStatus.COMPLETED), seen("run_2", RunStatus.COMPLETED)]
        first = asyncio.create_task(one.write(Halting.writing(*entries)))
        await Halting.locked.wait()
        await writer.submit(callback("run_1"))
        last = asyncio.create_task(third_writer.submit_all([seen("run_1"), callback("run_2")]))
        await until_someone_waits(other)
        Halting.go_on.set()
        await asyncio.gather(first, last)
        for run_id in ("run_1", "run_2"):
            record = await get_run(other, run_id)
            assert record is not None
            assert (record.run.status, record.callback_at is not None) == ("completed", True)
    assert errors == []


@pytest.mark.usefixtures("patient")
async def test_what_two_know_of_one_run_is_merged(postgres_url: str) -> None:
    """Who comes second waits for the first, and adds to what that has written."""
    async with (
        await Database.open(postgres_url) as one,
        await Database.open(postgres_url) as other,
        open_writer(other) as writer,
    ):
        await writer.submit(seen("run_1"))
        billed = seen("run_1", RunStatus.COMPLETED, facts={"charged_cost": Decimal(1)})
        first = asyncio.create_task(one.write(Halting.writing(billed)))
        await Halting.locked.wait()
        last = asyncio.create_task(writer.submit(seen("run_1", facts={"project_id": "cats"})))
        await until_someone_waits(one)
        Halting.go_on.set()
        await asyncio.gather(first, last)
        record = await get_run(other, "run_1")
        assert record is not None
        assert (record.run.charged_cost, record.run.project_id) == (Decimal(1), "cats")
