"""Claims on due runs and named leases: one holder at a time, and none for ever."""

import asyncio
from datetime import timedelta

from tests.store.making import NOW, TestWriter, callback, ids, seen, started
from tracker.core.record import FailedRead
from tracker.store.coordination import Due, claim_due, drop_lease, next_due_at, release, take_lease
from tracker.store.engine import Database
from tracker.store.queries.runs import get_run

LEASE = timedelta(seconds=60)


async def test_claims_are_disjoint(writer: TestWriter, db: Database, other_db: Database) -> None:
    """Many claimers at the same moment get different runs, and together all of them."""
    await writer.submit_all([callback(run) for run in ids("run", 60)])
    claimers = [(each, number) for number in range(4) for each in (db, other_db)]
    claimed = await asyncio.gather(
        *(
            claim_due(each, holder=f"{number}", now=NOW, lease=LEASE, limit=10)
            for each, number in claimers
        )
    )
    got = [record.run.run_id for records in claimed for record in records]
    assert len(got) == len(set(got))
    rest = await claim_due(db, holder="last", now=NOW, lease=LEASE, limit=100)
    assert sorted(got + [record.run.run_id for record in rest]) == ids("run", 60)
    assert len(got) >= 50


async def test_the_longest_due_come_first_and_the_future_not_at_all(
    writer: TestWriter, db: Database
) -> None:
    """Runs are claimed by how long they have been due; one that is not due yet is left alone."""
    await writer.submit(started("run_later", at=NOW))
    for minutes in (2, 3, 1):
        at = NOW - timedelta(minutes=minutes)
        await writer.submit(callback(f"run_{minutes}", at=at))
    claimed = await claim_due(db, holder="h", now=NOW, lease=LEASE, limit=2)
    assert [record.run.run_id for record in claimed] == ["run_3", "run_2"]
    assert {record.lease_holder for record in claimed} == {"h"}
    assert {record.lease_until for record in claimed} == {NOW + LEASE}
    assert await claim_due(db, holder="i", now=NOW, lease=LEASE, limit=9) != claimed


async def test_those_that_ended_last_can_be_claimed_first(writer: TestWriter, db: Database) -> None:
    """Of what is due, the runs that a callback told of, the last of them first."""
    await writer.submit(started("run_going", at=NOW - timedelta(hours=1)))
    for minutes in (2, 3, 1):
        await writer.submit(callback(f"run_{minutes}", at=NOW - timedelta(minutes=minutes)))
    claimed = await claim_due(db, holder="h", now=NOW, lease=LEASE, limit=2, which=Due.NEWEST_ENDS)
    assert [record.run.run_id for record in claimed] == ["run_1", "run_2"]
    rest = await claim_due(db, holder="h", now=NOW, lease=LEASE, limit=9, which=Due.ENDS)
    assert {record.run.run_id for record in rest} == {"run_3"}
    assert len(await claim_due(db, holder="h", now=NOW, lease=LEASE, limit=9)) == 1


async def test_a_claim_runs_out(writer: TestWriter, db: Database) -> None:
    """What a claimer never came back with can be claimed again when its lease has ended."""
    await writer.submit(callback("run_1"))
    assert await claim_due(db, holder="crashed", now=NOW, lease=LEASE, limit=1)
    soon = NOW + LEASE - timedelta(seconds=1)
    assert not await claim_due(db, holder="h", now=soon, lease=LEASE, limit=1)
    assert await next_due_at(db, now=soon) == NOW + LEASE
    (again,) = await claim_due(db, holder="h", now=NOW + LEASE, lease=LEASE, limit=1)
    assert again.lease_holder == "h"


async def test_the_answer_gives_its_claim_back(writer: TestWriter, db: Database) -> None:
    """A observation made under a claim ends it; one that names another claim does not."""
    await writer.submit_all([callback("run_1"), callback("run_2")])
    await claim_due(db, holder="h", now=NOW, lease=LEASE, limit=2)
    await writer.submit(seen("run_1", claim="someone", reads=1))
    record = await get_run(db, "run_1")
    assert record is not None
    assert record.lease_holder == "h"
    await writer.submit(seen("run_1", claim="h", reads=1))
    await writer.submit(FailedRead(run_id="run_2", at=NOW, error="FLORA answered 503", claim="h"))
    for run in ("run_1", "run_2"):
        record = await get_run(db, run)
        assert record is not None
        assert (record.lease_holder, record.lease_until) == (None, None)


async def test_released_runs_can_be_claimed_at_once(writer: TestWriter, db: Database) -> None:
    """A claimer that stops gives back what it holds, all of it or some, and nobody else's."""
    await writer.submit_all([callback(run) for run in ids("run", 4)])
    await claim_due(db, holder="other", now=NOW, lease=LEASE, limit=1)
    mine = await claim_due(db, holder="h", now=NOW, lease=LEASE, limit=3)
    assert await release(db, "h", [mine[0].run.run_id]) == 1
    assert await release(db, "h") == 2
    again = await claim_due(db, holder="i", now=NOW, lease=LEASE, limit=9)
    assert [each.run.run_id for each in again] == [each.run.run_id for each in mine]


async def test_workspaces_are_kept_apart(writer: TestWriter, db: Database) -> None:
    """Only the named workspaces' runs are claimed; `None` stands for runs whose is not known."""
    for name in ("ws_1", "ws_2", None):
        await writer.submit(callback(f"run_{name}", workspace_id=name, at=NOW))

    async def due(workspaces: list[str | None]) -> list[str]:
        holder = f"{workspaces}"
        claimed = await claim_due(
            db, holder=holder, now=NOW, lease=LEASE, limit=9, workspaces=workspaces
        )
        await release(db, holder)
        return sorted(record.run.run_id for record in claimed)

    assert await due(["ws_1"]) == ["run_ws_1"]
    assert await due(["ws_1", None]) == ["run_None", "run_ws_1"]
    assert await due([None]) == ["run_None"]
    assert await due([]) == []
    assert await next_due_at(db, ["ws_3"], now=NOW) is None
    assert await next_due_at(db, ["ws_2"], now=NOW) == NOW


async def test_the_next_due_moment_is_known(writer: TestWriter, db: Database) -> None:
    """What waits is announced by its own time; nothing that waits is no time at all."""
    assert await next_due_at(db, now=NOW) is None
    passed = await writer.submit(started("run_1"))
    assert passed.after is not None
    assert await next_due_at(db, now=NOW) == passed.after.next_check_at
    assert passed.after.next_check_at == NOW + timedelta(seconds=30)


async def test_a_lease_has_one_holder(db: Database, other_db: Database) -> None:
    """Of many who ask for a lease at once one gets it, keeps it while it asks, and can drop it."""
    asked = await asyncio.gather(
        *(
            take_lease(each, "sweep ws_1", f"holder_{number}", NOW, LEASE)
            for number, each in enumerate([db, other_db] * 4)
        )
    )
    assert sum(asked) == 1
    holder = f"holder_{asked.index(True)}"
    assert await take_lease(db, "sweep ws_1", holder, NOW + LEASE / 2, LEASE)
    assert not await take_lease(db, "sweep ws_1", "late", NOW + LEASE, LEASE)
    assert await take_lease(db, "sweep ws_2", "late", NOW, LEASE)
    await drop_lease(db, "sweep ws_1", "late")
    assert not await take_lease(db, "sweep ws_1", "late", NOW + LEASE, LEASE)
    await drop_lease(db, "sweep ws_1", holder)
    assert await take_lease(db, "sweep ws_1", "late", NOW + LEASE, LEASE)


async def test_a_lease_runs_out(db: Database) -> None:
    """A holder that crashed keeps nobody out for longer than it asked for."""
    assert await take_lease(db, "sweep", "crashed", NOW, LEASE)
    assert not await take_lease(db, "sweep", "next", NOW + LEASE - timedelta(seconds=1), LEASE)
    assert await take_lease(db, "sweep", "next", NOW + LEASE, LEASE)
