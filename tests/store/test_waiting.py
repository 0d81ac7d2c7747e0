"""What waits for its commit: in order, in bounded groups, and never more than there is room for."""

import asyncio
from collections.abc import Sequence

import pytest

from tests.store.making import callback, open_door, receipts, seen
from tracker.core.entry import Entry, Replayed
from tracker.core.errors import StoreUnavailable
from tracker.store.engine import Database
from tracker.store.waiting import MAX_BATCH_BYTES, Waiting, WaitingList


def _waiting(entry: Entry, expires: float = 0.0) -> Waiting:
    return Waiting(entry, asyncio.get_running_loop().create_future(), expires)


def _filled(entries: Sequence[Entry], **bounds: int) -> WaitingList:
    waiting = WaitingList(**{"most": 100, **bounds})
    for number, entry in enumerate(entries):
        waiting.add(_waiting(entry, expires=float(number)))
    return waiting


async def test_room_is_counted_in_bytes_of_bodies() -> None:
    """What else is in an entry is small; what is taken off makes room again."""
    waiting = _filled([callback("run_1", body=b"x" * 60)], most_bytes=100)
    assert waiting.has_room([callback("run_2", body=b"x" * 40)])
    assert not waiting.has_room([callback("run_2", body=b"x" * 41)])
    assert not waiting.has_room([callback(run, body=b"x" * 21) for run in ("run_2", "run_3")])
    assert waiting.has_room([seen("run_2")])
    waiting.take(10)
    assert waiting.has_room([callback("run_2", body=b"x" * 100)])


async def test_room_is_counted_in_entries() -> None:
    """However small they are."""
    waiting = _filled([seen("run_1"), seen("run_2")], most=3)
    assert waiting.has_room([seen("run_3")])
    assert not waiting.has_room([seen("run_3"), seen("run_4")])


async def test_what_has_expired_makes_room() -> None:
    """The first ones go, each once, and the next one's time is known."""
    waiting = _filled([callback(f"run_{n}", body=b"x" * 30) for n in range(3)], most_bytes=100)
    assert waiting.first_expires == 0.0
    expired = waiting.take_expired(1.0)
    assert [one.expires for one in expired] == [0.0, 1.0]
    assert (len(waiting), waiting.first_expires) == (1, 2.0)
    assert waiting.has_room([callback("run_4", body=b"x" * 70)])
    assert not waiting.take_expired(1.0)
    waiting.take(10)
    assert waiting.first_expires is None


async def test_a_group_has_at_most_so_many_bytes_and_one_entry_more() -> None:
    """In the order in which they came, and none is left behind."""
    entries = [callback(f"run_{n}", body=b"x" * (MAX_BATCH_BYTES // 2 - 1)) for n in range(5)]
    waiting = _filled(entries)
    assert [len(waiting.take(500)) for _ in range(3)] == [3, 2, 0]


async def test_a_replay_goes_alone() -> None:
    """What waits before and behind it goes without it."""
    called = callback("run_2")
    assert called.observation is not None
    replayed = Replayed(delivery=called.delivery, observation=called.observation)
    waiting = _filled([seen("run_1"), replayed, seen("run_3"), seen("run_4")])
    groups = [[one.entry for one in waiting.take(10)] for _ in range(3)]
    assert groups == [[seen("run_1")], [replayed], [seen("run_3"), seen("run_4")]]


async def test_bodies_that_nobody_can_keep_are_refused_at_once(db: Database) -> None:
    """The door takes no more bytes than it may hold, and takes some again when they are written."""
    body = b"x" * 1000
    async with open_door(db, max_waiting_bytes=3000) as door:
        with pytest.raises(StoreUnavailable):
            await door.put_all([callback(f"run_{n}", body=body) for n in range(4)])
        await door.put_all([callback(f"run_{n}", body=body) for n in range(3)])
        await door.put_all([callback(f"run_{n}", body=body) for n in range(3, 6)])
        assert len(await receipts(db)) == 6
