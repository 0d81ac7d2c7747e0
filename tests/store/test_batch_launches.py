"""Batches that a worker launches: due, leased by one, ended once."""

import asyncio
from dataclasses import replace
from datetime import timedelta

from tests.store.making import NOW
from tests.store.test_batches import BATCH, entries
from tracker.store.engine import Database
from tracker.store.queries import audit, batches
from tracker.store.queries.audit import Action
from tracker.store.queries.batches import BatchRow, LaunchEnd

ORDERED = replace(BATCH, launch={"started_by": "shop"}, launch_at=NOW)
SECOND = timedelta(seconds=1)


async def claim(db: Database, holder: str = "h", *, later: timedelta = SECOND) -> list[BatchRow]:
    return await batches.claim_due(db, ["default"], holder=holder, now=NOW + later, limit=10)


async def end(db: Database, batch: BatchRow, holder: str = "h") -> bool:
    ended = LaunchEnd(launch_at=None, stopped="a budget", errors={1: "too long"})
    return await batches.end_launch(db, batch, ended, holder=holder)


async def test_a_due_batch_has_one_holder(db: Database, other_db: Database) -> None:
    """Of many processes one gets the lease; when it expires another one does. What is not due, of
    another workspace, or a command's, is nobody's."""
    await batches.keep(db, ORDERED, entries("a"))
    for number, other in enumerate(
        [
            replace(ORDERED, launch_at=NOW + timedelta(minutes=1)),
            replace(ORDERED, workspace_id="other"),
            replace(ORDERED, launch=None, launch_at=None),
        ]
    ):
        await batches.keep(db, replace(other, batch_id=f"bat_other_{number}"), [])
    claims = await asyncio.gather(
        *(claim(each, f"{n}") for n, each in enumerate([db, other_db] * 3))
    )
    assert [len(found) for found in claims if found] == [1]
    late = batches.LEASE + 2 * SECOND
    assert [one.batch_id for one in await claim(db, "next", later=late)] == ["bat_1"]
    assert await claim(db, "other", later=late) == []


async def test_a_clock_that_was_set_back_delays_no_batch(db: Database) -> None:
    """A due time or a lease far ahead was stored before that, and is void."""
    await batches.keep(db, replace(ORDERED, launch_at=NOW + timedelta(hours=1)), [])
    (batch,) = await claim(db)
    assert await claim(db, "other") == []
    assert len(await claim(db, "other", later=timedelta(hours=-1))) == 1
    assert batch.launch_at == NOW + timedelta(hours=1)


async def test_how_a_launch_ended_is_stored_by_its_holder(db: Database) -> None:
    """Once, with the errors of its rows; not by a process whose lease is another's by now."""
    await batches.keep(db, ORDERED, entries("a", "b"))
    (batch,) = await claim(db)
    assert not await end(db, batch, "other")
    assert await batches.renew_launch(db, batch, holder="h", now=NOW)
    assert await end(db, batch)
    assert not await end(db, batch)
    stored = await batches.get(db, "bat_1")
    assert stored is not None
    assert (stored.launch_at, stored.stopped, stored.finished_at) == (None, "a budget", None)
    assert [row.error for row in await batches.entries(db, "bat_1")] == ["too long", None]
    assert await claim(db) == []


async def test_each_launch_is_released_and_ended_by_itself(db: Database) -> None:
    """The other launches of its holder stay as they are."""
    for name in ("released", "ended", "kept"):
        await batches.keep(db, replace(ORDERED, batch_id=name), entries(name))
    by_id = {one.batch_id: one for one in await claim(db)}
    await batches.release_launch(db, by_id["released"], holder="other")
    assert await claim(db, "other") == []
    await batches.release_launch(db, by_id["released"], holder="h")
    done = LaunchEnd(launch_at=None, stopped=None, errors={})
    assert await batches.end_launch(db, by_id["ended"], done, holder="h")
    assert await claim(db, "other") == [by_id["released"]]
    assert await batches.finish_ended(db, NOW) == 1
    late = await claim(db, "other", later=batches.LEASE + 2 * SECOND)
    assert {one.batch_id for one in late} == {"released", "kept"}


async def test_a_new_order_or_a_stop_is_not_overwritten(db: Database) -> None:
    """The launch before notices that it is not its order any more, and releases the lease."""
    await batches.keep(db, ORDERED, entries("a"))
    (batch,) = await claim(db)
    await batches.keep(db, replace(ORDERED, launch_at=NOW + SECOND / 2), entries("a"))
    assert not await batches.renew_launch(db, batch, holder="h", now=NOW)
    assert not await end(db, batch)
    assert await claim(db, "other") == []
    await batches.release_launch(db, batch, holder="h")
    (again,) = await claim(db, "other")
    noted = audit.entry(Action.STOP, NOW, batch_id="bat_1")
    assert await batches.stop(db, "bat_1", "stopped by shop", noted=noted)
    assert not await batches.stop(db, "bat_1", "stopped by another", noted=noted)
    assert not await batches.renew_launch(db, again, holder="other", now=NOW)
    assert not await end(db, again, "other")
    stored = await batches.get(db, "bat_1")
    assert stored is not None
    assert (stored.launch_at, stored.stopped) == (None, "stopped by shop")
    assert await batches.finish_ended(db, NOW) == 0


async def test_a_command_ends_only_what_was_ordered_before_its_plan(db: Database) -> None:
    """However often that launch was put off since. One that stopped leaves the rest to it."""
    for ordered_at, is_ended in ((NOW - SECOND, True), (NOW + SECOND, False)):
        launch = {"started_by": "shop", "ordered_at": ordered_at.isoformat()}
        put_off = replace(ORDERED, launch=launch, launch_at=NOW + timedelta(hours=1))
        await batches.keep(db, put_off, entries("a"))
        await batches.finish(db, BATCH, None, stopped="no money left", errors={1: "why"})
        kept = await batches.get(db, "bat_1")
        assert kept == replace(put_off, stopped="no money left" if is_ended else None)
        (row,) = await batches.entries(db, "bat_1")
        assert row.error == ("why" if is_ended else None)
        await batches.finish(db, BATCH, NOW)
        ended = replace(put_off, launch_at=None, finished_at=NOW)
        assert await batches.get(db, "bat_1") == (ended if is_ended else put_off)
