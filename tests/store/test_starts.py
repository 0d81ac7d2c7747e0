"""The ledger of starts: a key is kept once, sent by one, and closed together with its run."""

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.store.making import NOW, callback, seen, started
from tracker.core.errors import StoreError
from tracker.core.observation import Source
from tracker.store import starts
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.store.starts import StartRow, StartState

LEASE = timedelta(seconds=60)


async def reserve(
    db: Database,
    key: str,
    *,
    slot: str = "default",
    technique: str = "tech_1",
    at: datetime = NOW,
    **others: Any,
) -> tuple[StartRow, bool]:
    """Keep a key."""
    return await starts.reserve(
        db,
        workspace_slot=slot,
        idempotency_key=key,
        technique_id=technique,
        at=at,
        **{"fingerprint": "f00d", "inputs": [{"id": "a"}], **others},
    )


async def test_a_key_is_kept_once(db: Database, other_db: Database) -> None:
    """Of many requests with one key at the same moment one makes the row, and all see that row."""
    answers = await asyncio.gather(
        *(
            reserve(each, "key", fingerprint=f"{number}")
            for number, each in enumerate([db, other_db] * 3)
        )
    )
    (made,) = [row for row, created in answers if created]
    assert {row for row, _ in [(row.fingerprint, created) for row, created in answers]} == {
        made.fingerprint
    }
    assert made.state is StartState.STORED
    assert await starts.get(db, "default", "key") == made
    assert await starts.get(db, "other slot", "key") is None
    assert (await reserve(db, "key", slot="other slot"))[1]


async def test_the_door_closes_a_start_with_its_run(door: Door, db: Database) -> None:
    """The answer to a start stores the run and closes the row of its slot in one transaction."""
    for slot in ("default", "other"):
        await reserve(db, "key", slot=slot)
    await starts.take(db, "default", "key", "h", NOW, LEASE)
    await door.put(replace(started("run_1"), slot="default", idempotency_key="key"))
    row = await starts.get(db, "default", "key")
    assert row is not None
    assert (row.state, row.run_id, row.lease_holder) == (StartState.STARTED, "run_1", None)
    other = await starts.get(db, "other", "key")
    assert other is not None
    assert other.state is StartState.STORED


async def test_a_replayed_answer_closes_it_too(door: Door, db: Database) -> None:
    """A start whose run was heard of before, and says nothing new, is closed all the same."""
    await reserve(db, "key")
    await door.put(started("run_1"))
    passed = await door.put(replace(started("run_1"), slot="default", idempotency_key="key"))
    assert not passed.news
    row = await starts.get(db, "default", "key")
    assert row is not None
    assert row.run_id == "run_1"


async def test_states_are_noted(db: Database) -> None:
    """Sent keeps its moment; a refusal keeps FLORA's words and ends the right to send."""
    await reserve(db, "key")
    await starts.take(db, "default", "key", "h", NOW, LEASE)
    later = NOW + timedelta(seconds=1)
    row = await starts.mark(db, "default", "key", state=StartState.SENT, at=later)
    assert (row.state, row.sent_at, row.lease_holder) == (StartState.SENT, later, "h")
    words = {"status": 402, "code": "insufficient_credits", "message": "top up", "fields": []}
    row = await starts.mark(db, "default", "key", state=StartState.REFUSED, error=words, at=later)
    assert (row.state, row.error, row.lease_holder) == (StartState.REFUSED, words, None)
    assert row == await starts.get(db, "default", "key")
    with pytest.raises(StoreError):
        await starts.mark(db, "default", "never", state=StartState.SENT, at=later)
    with pytest.raises(ValueError, match="door"):
        await starts.mark(db, "default", "key", state=StartState.STARTED, at=later)


async def test_what_became_a_run_stays_so(door: Door, db: Database) -> None:
    """A late answer of another attempt cannot reopen a start, and nobody may send it again."""
    await reserve(db, "key")
    await door.put(replace(started("run_1"), slot="default", idempotency_key="key"))
    row = await starts.mark(db, "default", "key", state=StartState.UNRESOLVED, at=NOW)
    assert row.state is StartState.STARTED
    assert not await starts.take(db, "default", "key", "h", NOW, LEASE)
    await door.put(replace(started("run_2"), slot="default", idempotency_key="key"))
    row = await starts.mark(db, "default", "key", state=StartState.SENT, at=NOW)
    assert row.run_id == "run_1"


async def test_one_process_sends_a_key(db: Database, other_db: Database) -> None:
    """The right to send has one holder, until it is given back or runs out."""
    await reserve(db, "key")
    asked = await asyncio.gather(
        *(
            starts.take(each, "default", "key", f"h{number}", NOW, LEASE)
            for number, each in enumerate([db, other_db] * 3)
        )
    )
    assert sum(asked) == 1
    holder = f"h{asked.index(True)}"
    assert not await starts.take(db, "default", "key", "late", NOW, LEASE)
    assert await starts.take(db, "default", "key", holder, NOW, LEASE)
    await starts.give_back(db, "default", "key", "late")
    assert not await starts.take(db, "default", "key", "late", NOW, LEASE)
    await starts.give_back(db, "default", "key", holder)
    assert await starts.take(db, "default", "key", "late", NOW, LEASE)
    assert await starts.take(db, "default", "key", "later", NOW + LEASE, LEASE)
    assert not await starts.take(db, "default", "never kept", "h", NOW, LEASE)


async def test_open_starts_are_found(door: Door, db: Database) -> None:
    """What was kept before a moment and is neither started, refused nor unresolved is open."""
    for number, key in enumerate(["b", "a", "c", "d", "e"]):
        await reserve(db, key, at=NOW + timedelta(seconds=number))
    await starts.mark(db, "default", "a", state=StartState.SENT, at=NOW)
    await starts.mark(db, "default", "c", state=StartState.REFUSED, at=NOW)
    await door.put(replace(started("run_1"), slot="default", idempotency_key="d"))
    found = await starts.open_starts(db, NOW + timedelta(seconds=4))
    assert [row.idempotency_key for row in found] == ["b", "a"]


async def test_rival_starts_are_found(door: Door, db: Database) -> None:
    """Other starts of the technique in this workspace that may own a run are its rivals."""
    await reserve(db, "mine")
    await reserve(db, "open")
    await reserve(db, "refused")
    await starts.mark(db, "default", "refused", state=StartState.REFUSED, at=NOW)
    await reserve(db, "elsewhere", slot="other")
    await reserve(db, "of another technique", technique="tech_2")
    await reserve(db, "unresolved")
    await starts.mark(db, "default", "unresolved", state=StartState.UNRESOLVED, at=NOW)
    await reserve(db, "started")
    await door.put(replace(started("run_1"), slot="default", idempotency_key="started"))
    found = await starts.rivals(db, "default", "tech_1", "mine")
    assert sorted(row.idempotency_key for row in found) == ["open", "unresolved"]


async def test_runs_of_known_origin_are_accounted_for(door: Door, db: Database) -> None:
    """A run that a start owns, or that was given to track, is nobody else's."""
    await reserve(db, "key")
    await door.put(
        replace(seen("run_start", source=Source.HISTORY), slot="default", idempotency_key="key")
    )
    await door.put_all(
        [
            started("run_answer"),
            seen("run_track", source=Source.TRACK),
            seen("run_swept", source=Source.HISTORY),
            callback("run_called"),
        ]
    )
    asked = ["run_start", "run_answer", "run_track", "run_swept", "run_called", "run_unknown"]
    assert await starts.accounted(db, asked) == {"run_start", "run_answer", "run_track"}
    assert await starts.accounted(db, []) == set()
