"""Callbacks that are committed without a transaction around them come to the same as all others,
whoever comes in between."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import delete, event, func, select, text

from tests.store.making import (
    NOW,
    callback,
    fold,
    open_door,
    quarantined,
    receipts,
    seen,
    started,
)
from tests.support.databases import PostgresDatabases
from tests.support.waiting import eventually
from tracker.core.entry import Entry
from tracker.core.errors import StoreError
from tracker.core.record import Record
from tracker.core.run import Output, RunStatus
from tracker.store import tallies
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.store.faults import WriteConflict
from tracker.store.read import events, get_run
from tracker.store.tables import deliveries, run_events, runs

RUNS = [f"run_{number:02d}" for number in range(40)]
BEGAN: list[Entry] = [
    started("run_started"),
    seen("run_running", facts={"progress": 12.5, "charged_cost": None}),
    seen("run_ended", RunStatus.COMPLETED, facts={"outputs": (Output("o", "text", "a"),)}),
    callback("run_told", "whd_told"),
]
CAME: list[Entry] = [
    callback("run_started"),
    callback("run_running", status=RunStatus.FAILED),
    callback("run_new", workspace_id="ws_1"),
    callback("run_new", "whd_another", status=RunStatus.FAILED),
    callback("run_new"),
    quarantined("whd_odd"),
]


@pytest.fixture
async def db(postgres_url: str) -> AsyncIterator[Database]:
    """Open to one process, and to `other`, in which somebody else writes."""
    async with await Database.open(postgres_url) as db:
        yield db


@pytest.fixture
async def other(postgres_url: str) -> AsyncIterator[Door]:
    """Another process's door."""
    async with await Database.open(postgres_url) as db, open_door(db) as door:
        yield door


class Ways:
    """Counts which way batches go: at once, or in a transaction."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at_once = self.in_a_transaction = 0
        self.between: Callable[[], Awaitable[object]] | None = None
        """What somebody else does, once, between the two statements of a batch."""
        at_once, write = db.at_once, db.write

        async def counted_at_once(work: Callable[[Any], Awaitable[Any]]) -> Any:
            done = await at_once(lambda connection: work(_Between(connection, self)))
            self.at_once += 1
            return done

        async def counted_write(work: Callable[[Any], Any]) -> Any:
            self.in_a_transaction += 1
            return await write(work)

        monkeypatch.setattr(db, "at_once", counted_at_once)
        monkeypatch.setattr(db, "write", counted_write)


class _Between:
    """A connection between whose first and second statement something happens."""

    def __init__(self, connection: Any, ways: Ways) -> None:
        self._connection = connection
        self._ways = ways

    async def fetch(self, *statement: Any) -> Any:
        answer = await self._connection.fetch(*statement)
        happens, self._ways.between = self._ways.between, None
        if happens is not None:
            await happens()
        return answer


@pytest.fixture
def ways(db: Database, monkeypatch: pytest.MonkeyPatch) -> Ways:
    """Which way batches go."""
    return Ways(db, monkeypatch)


async def everything(db: Database) -> dict[str, Any]:
    """What is kept, in words that two databases share."""
    async with db.read() as connection:
        ids = (await connection.execute(select(runs.c.run_id).order_by(runs.c.run_id))).scalars()
        records = {run_id: await get_run(db, run_id) for run_id in ids}
        told = {
            run_id: [(e.source, e.status, e.detail) for e in await events(db, run_id)]
            for run_id in records
        }
        came = (await connection.execute(select(deliveries).order_by("delivery_id"))).all()
    await tallies.fold(db)
    async with db.read() as connection:
        counted = (
            await connection.execute(text("SELECT * FROM run_tallies ORDER BY 1,2,3,4,5,6"))
        ).all()
    return {"records": records, "events": told, "came": came, "counted": counted}


async def test_it_comes_to_the_same(
    postgres_databases: PostgresDatabases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs, timelines, deliveries and tallies are those of a transaction, and so is each answer."""
    kept = []
    for is_heard in (False, True):
        with postgres_databases.migrated() as url:
            async with await Database.open(url) as db:
                ways = Ways(db, monkeypatch)
                if is_heard:  # then nothing goes past whoever listens
                    event.listen(db.engines[1], "before_cursor_execute", lambda *_: None)
                async with open_door(db) as door:
                    await door.put_all(BEGAN)
                    before = ways.at_once
                    passed = await door.put_all(CAME)
                assert (ways.at_once > before) is not is_heard
                kept.append((passed, await everything(db)))
    assert kept[0] == kept[1]


async def test_it_is_the_usual_way(db: Database, ways: Ways) -> None:
    """Callbacks for runs that are new, or known and still running, need no transaction."""
    async with open_door(db) as door:
        await door.put(seen("run_1"))
        ways.in_a_transaction = 0
        passed = await door.put_all([callback("run_1"), callback("run_2"), quarantined("whd_3")])
    assert (ways.at_once, ways.in_a_transaction) == (1, 0)
    assert [each.news for each in passed] == [True, True, False]
    assert not any(each.repeated for each in passed)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(callback("run_told", "whd_told"), id="came before"),
        pytest.param(callback("run_ended"), id="has outputs"),
        pytest.param(callback("run_new", outputs=(Output("o", "text", "a"),)), id="gets outputs"),
    ],
)
async def test_what_is_out_of_the_ordinary_goes_the_other_way(
    db: Database, ways: Ways, entry: Entry
) -> None:
    """Together with all that came with it, and each has its effect once."""
    async with open_door(db) as door:
        await door.put_all(BEGAN)
        ways.at_once = ways.in_a_transaction = 0
        passed = await door.put_all([callback("run_running"), entry])
    assert (ways.at_once, ways.in_a_transaction) == (0, 1)
    assert passed[0].news
    assert (await receipts(db))["whd_run_running"] == 1
    run_id = entry.observation.run_id  # type: ignore[union-attr]
    record = await get_run(db, run_id)
    assert record is not None
    assert record.run == await fold(db, run_id)


async def _forget(door: Door, run_id: str) -> None:
    def forget(connection: Any) -> None:
        for table in (run_events, runs):
            connection.execute(delete(table).where(table.c.run_id == run_id))

    await door._db.write(forget)


MEANWHILE: dict[str, Callable[[Door], Awaitable[object]]] = {
    "a run has changed": lambda door: door.put(seen("run_1", facts={"progress": 50.0})),
    "a run has become known": lambda door: door.put(seen("run_2", RunStatus.COMPLETED)),
    "a run has gone": lambda door: _forget(door, "run_1"),
    "a delivery has come": lambda door: door.put(callback("run_3", "whd_run_3")),
    "it has all come": lambda door: door.put_all([callback(f"run_{n}") for n in (1, 2, 3)]),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
async def test_who_comes_in_between_is_not_overwritten(
    db: Database, other: Door, ways: Ways, meanwhile: str
) -> None:
    """What somebody else committed after the runs were read stands, and nothing counts twice."""
    async with open_door(db) as door:
        await door.put(seen("run_1"))
        ways.at_once = ways.in_a_transaction = 0
        ways.between = lambda: MEANWHILE[meanwhile](other)
        passed = await door.put_all([callback("run_1"), callback("run_2"), callback("run_3")])
        assert (ways.at_once, ways.in_a_transaction) == (0, 1)
        assert (await door.put(callback("run_4"))).news  # the connection is as good as before
    assert ways.at_once == 1
    again = {"a delivery has come": [2], "it has all come": [0, 1, 2]}.get(meanwhile, [])
    assert [position for position, each in enumerate(passed) if each.repeated] == again
    came = await receipts(db)
    assert came == {f"whd_run_{n}": 1 + (n - 1 in again) for n in (1, 2, 3, 4)}
    for number in (1, 2, 3):
        record = await get_run(db, f"run_{number}")
        assert record is not None
        assert record.run.status is RunStatus.COMPLETED
        assert record.run == await fold(db, f"run_{number}")
        ends = [one for one in await events(db, f"run_{number}") if one.status == "completed"]
        assert len(ends) == 1


async def test_who_is_just_writing_a_run_is_waited_for(
    db: Database, ways: Ways, postgres_url: str
) -> None:
    """The statement began before the other transaction ended, and sees what came of it."""
    somebody: Any = await asyncpg.connect(postgres_url)
    watcher: Any = await asyncpg.connect(postgres_url)
    transaction = somebody.transaction()

    async def write() -> None:
        await transaction.start()
        await somebody.execute("UPDATE runs SET technique_name = 'theirs' WHERE run_id = 'run_1'")

    async def waits() -> bool:
        for_them = f"{somebody.get_server_pid()} = ANY(pg_blocking_pids(pid))"
        found = await watcher.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {for_them}")
        return bool(found)

    async with open_door(db) as door:
        await door.put(seen("run_1"))
        ways.at_once = ways.in_a_transaction = 0
        ways.between = write
        putting = asyncio.create_task(door.put_all([callback("run_1"), callback("run_2")]))
        await eventually(waits)
        await transaction.commit()
        passed = await putting
    await somebody.close()
    await watcher.close()
    assert (ways.at_once, ways.in_a_transaction) == (0, 1)
    assert [each.repeated for each in passed] == [False, False]
    record = await get_run(db, "run_1")
    assert record is not None
    assert (record.run.technique_name, record.run.status) == ("theirs", "completed")


async def test_two_that_write_the_same_runs_do_not_wait_in_a_circle(
    db: Database, postgres_url: str
) -> None:
    """Deliveries and runs are locked in one order, whichever way, and however they come."""
    async with (
        await Database.open(postgres_url) as second,
        open_door(db) as one,
        open_door(second) as two,
    ):
        await one.put_all([seen(run_id) for run_id in RUNS])
        for turn in range(15):
            forth = [callback(run_id, f"whd_{turn}_{run_id}", at=NOW) for run_id in RUNS]
            back = [callback(run_id, f"whd_{turn}_{run_id}_", at=NOW) for run_id in RUNS[::-1]]
            looks: list[Entry] = [seen(run_id, facts={"progress": float(turn)}) for run_id in RUNS]
            await asyncio.gather(one.put_all(forth), two.put_all(back), two.put_all(looks[::-1]))
        async with db.read() as connection:
            deadlocks = (
                select(func.pg_stat_get_db_deadlocks(text("oid")))
                .select_from(text("pg_database"))
                .where(text("datname = current_database()"))
            )
            assert (await connection.execute(deadlocks)).scalar() == 0
    assert set((await receipts(db)).values()) == {1}


async def test_a_connection_that_was_cut_is_replaced(db: Database, other: Door, ways: Ways) -> None:
    """The server ends it while nobody uses it, and while somebody does; nothing is lost."""

    async def cut() -> None:
        async with other._db.read() as connection:
            others = "pid <> pg_backend_pid() AND application_name = 'tracker'"
            await connection.execute(
                text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
            )

    async with open_door(db) as door:
        await door.put(callback("run_1"))
        await cut()
        await door.put(callback("run_2"))
        ways.between = cut
        await door.put(callback("run_3"))
    records: list[Record | None] = [await get_run(db, f"run_{n}") for n in (1, 2, 3)]
    assert all(records)
    assert set((await receipts(db)).values()) == {1}


async def backend(db: Database, statement: str = "SELECT 1") -> int:
    """Send a statement at once; over which of the server's processes."""
    pids: list[int] = []

    async def work(connection: Any) -> None:
        pids.append(connection.get_server_pid())
        await connection.fetch(statement)

    with suppress(StoreError, WriteConflict):
        await db.at_once(work)
    return pids[0]


async def test_a_connection_is_kept_unless_something_is_wrong_with_it(db: Database) -> None:
    """A statement that the server refuses says nothing against it; one that was cut off does."""
    first = await backend(db)
    assert await backend(db, "SELECT 1 / 0") == first
    assert await backend(db, "SELECT 'x'::int") == first
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await backend(db, "SELECT pg_sleep(20)")
    assert await backend(db) != first


async def test_nothing_is_left_open_behind_the_end(postgres_url: str) -> None:
    """Not even where something was under way."""
    async with await Database.open(postgres_url, application_name="ended") as db:
        await backend(db)
        sleeping = asyncio.create_task(backend(db, "SELECT pg_sleep(0.3)"))
        await asyncio.sleep(0.1)
    await sleeping
    async with await Database.open(postgres_url) as other, other.read() as connection:
        ended = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ended'")

        async def is_gone() -> bool:
            await connection.rollback()  # what the server shows is of one moment else
            return not (await connection.execute(ended)).scalar()

        await eventually(is_gone)
