"""A replayed callback: it leaves quarantine together with what it does to its run, and once."""

import asyncio
from dataclasses import replace
from datetime import timedelta

from tests.store.making import NOW, POLICY, callback, fold, open_door, quarantined, seen
from tracker.core.entry import Delivered, DeliveryOutcome, Replayed
from tracker.core.observation import Source
from tracker.core.run import RunStatus, Tracking
from tracker.store import read
from tracker.store.door import Door
from tracker.store.engine import Database

LATER = NOW + timedelta(hours=2)


def replayed(delivery_id: str, run_id: str = "run_1") -> Replayed:
    """What was stored under that id, understood two hours after it came."""
    now = callback(run_id, delivery_id, at=LATER)
    assert now.observation is not None
    return Replayed(
        delivery=replace(now.delivery, received_at=NOW, workspace_id="ws_1"),
        observation=now.observation,
    )


async def test_a_replay_applies_the_delivery_and_its_effect_together(
    db: Database, door: Door
) -> None:
    """The run is ended by a callback that came when it came, is due at once, and can be folded."""
    await door.put(quarantined("whd_1"))
    passed = await door.put(replayed("whd_1"))
    assert passed.before is None
    assert not passed.repeated

    row = await read.get_delivery(db, "whd_1")
    assert row is not None
    assert (row.outcome, row.reason) == (DeliveryOutcome.APPLIED, None)
    assert (row.run_id, row.event_type, row.workspace_id) == ("run_1", "run.completed", "ws_1")
    assert (row.received_at, row.receipts, row.body) == (NOW, 1, b"?")

    record = await read.get_run(db, "run_1")
    assert record is not None
    assert (record.run.status, record.ended_via) == (RunStatus.COMPLETED, Source.CALLBACK)
    assert (record.callback_at, record.first_seen_at) == (NOW, LATER)
    assert record.next_check_at == LATER
    assert await fold(db, "run_1") == record.run
    assert [event.at for event in await read.events(db, "run_1")] == [LATER]


async def test_a_replay_happens_once(db: Database, door: Door) -> None:
    """Again, and at the same moment, changes nothing more."""
    await door.put(quarantined("whd_1"))
    at_once = await asyncio.gather(*(door.put(replayed("whd_1")) for _ in range(3)))
    assert sorted(passed.repeated for passed in at_once) == [False, True, True]
    assert (await door.put(replayed("whd_1"))).repeated
    assert len(await read.events(db, "run_1")) == 1


async def test_what_was_never_quarantined_is_not_replayed(db: Database, door: Door) -> None:
    """An applied delivery, and one that never came, leave runs alone."""
    await door.put(callback("run_9", "whd_9"))
    assert (await door.put(replayed("whd_9"))).repeated
    assert (await door.put(replayed("whd_none"))).repeated
    assert await read.get_run(db, "run_1") is None
    assert await read.get_delivery(db, "whd_none") is None


async def test_the_first_callback_stays_the_first(db: Database, door: Door) -> None:
    """`callback_at` is the earliest authentic one, whichever was understood first."""
    await door.put(quarantined("whd_old", at=NOW))
    await door.put(callback("run_1", "whd_new", at=NOW + timedelta(minutes=1)))
    await door.put(replayed("whd_old"))
    record = await read.get_run(db, "run_1")
    assert record is not None
    assert record.callback_at == NOW

    await door.put(quarantined("whd_late", at=LATER))
    await door.put(replayed("whd_late"))
    record = await read.get_run(db, "run_1")
    assert record is not None
    assert record.callback_at == NOW


async def test_a_settled_run_stays_as_it_is(db: Database, door: Door) -> None:
    """What the API said stands; the callback is only noted."""
    await door.put(seen("run_1", RunStatus.COMPLETED))
    await door.put(quarantined("whd_1"))
    await door.put(replayed("whd_1"))
    record = await read.get_run(db, "run_1")
    assert record is not None
    assert record.tracking is Tracking.SETTLED
    assert (record.ended_via, record.next_check_at) == (Source.POLL, None)
    assert record.callback_at == NOW


async def test_replays_and_deliveries_do_not_wait_in_a_circle(
    db: Database, other_db: Database
) -> None:
    """Two processes replay and count the same deliveries in opposite orders, and none gives up."""
    names = [f"whd_{number}" for number in range(12)]

    async def go(database: Database, order: list[str]) -> None:
        async with open_door(database, policy=POLICY) as door:
            entries: list[Delivered | Replayed] = []
            for name in order:
                entries += [quarantined(name), replayed(name, f"run_{name}")]
            await door.put_all(entries)

    await asyncio.gather(go(db, names), go(other_db, names[::-1]))
    rows, _ = await read.list_deliveries(db, limit=50)
    assert {row.outcome for row in rows} == {DeliveryOutcome.APPLIED}
    assert {row.receipts for row in rows} == {2}
    for name in names:
        assert len(await read.events(db, f"run_{name}")) == 1
