"""The start log: a key is kept once, sent by one, and closed together with its run."""

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from tests.store.making import NOW, TestWriter, callback, seen, started
from tests.support.started import of_start
from tracker.core.observation import Source
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.starts import NotStored, StartRow, StartState

LEASE = timedelta(seconds=60)


async def reserve(
    db: Database,
    key: str,
    *,
    workspace_id: str = "default",
    technique: str = "tech_1",
    at: datetime = NOW,
    **others: Any,
) -> StartRow:
    """Keep a key."""
    new = StartRow(
        workspace_id=workspace_id,
        idempotency_key=key,
        technique_id=technique,
        created_at=at,
        **{"fingerprint": "f00d", "inputs": [{"id": "a"}], **others},
    )
    return await starts.reserve(db, new)


async def mark(
    db: Database, key: str, state: StartState, *, error: dict[str, Any] | None = None
) -> StartRow:
    """Bring a kept key to a state, as its holder."""
    assert await starts.take(db, "default", key, "h", NOW, LEASE)
    row = await starts.mark_sent(
        db, "default", key, holder="h", at=NOW, callback_url=None, request_body="{}"
    )
    if state is not StartState.SENT:
        row = await starts.mark(db, "default", key, holder="h", state=state, error=error or {})
    await starts.give_back(db, "default", key, "h")
    assert row is not None
    return row


async def test_a_key_is_kept_once(db: Database, other_db: Database) -> None:
    """Of many requests with one key at the same moment one makes the row, and all see that row."""
    answers = await asyncio.gather(
        *(
            reserve(each, "key", fingerprint=f"{number}")
            for number, each in enumerate([db, other_db] * 3)
        )
    )
    assert len({row.fingerprint for row in answers}) == 1
    made = answers[0]
    assert made.state is StartState.STORED
    assert await starts.get(db, "default", "key") == made
    assert await starts.get(db, "other", "key") is None
    assert (await reserve(db, "key", workspace_id="other")).workspace_id == "other"


async def test_the_writer_closes_a_start_with_its_run(writer: TestWriter, db: Database) -> None:
    """The answer to a start stores the run and closes its workspace's row in one transaction."""
    for workspace_id in ("default", "other"):
        await reserve(db, "key", workspace_id=workspace_id)
    await starts.take(db, "default", "key", "h", NOW, LEASE)
    await writer.submit(of_start(started("run_1"), workspace_id="default", idempotency_key="key"))
    row = await starts.get(db, "default", "key")
    assert row is not None
    assert (row.state, row.run_id, row.lease_holder) == (StartState.STARTED, "run_1", None)
    other = await starts.get(db, "other", "key")
    assert other is not None
    assert other.state is StartState.STORED


async def test_a_replayed_answer_closes_it_too(writer: TestWriter, db: Database) -> None:
    """A start whose run was heard of before, and says nothing new, is closed all the same."""
    await reserve(db, "key")
    await writer.submit(started("run_1"))
    passed = await writer.submit(
        of_start(started("run_1"), workspace_id="default", idempotency_key="key")
    )
    assert not passed.changed
    row = await starts.get(db, "default", "key")
    assert row is not None
    assert row.run_id == "run_1"


async def test_only_the_holder_writes_a_state(db: Database) -> None:
    """Sent and refused are noted by who holds the key; whoever lost it is told so."""
    await reserve(db, "key")
    assert await starts.take(db, "default", "key", "h", NOW, LEASE)
    later = NOW + timedelta(seconds=1)
    sent = await starts.mark_sent(
        db, "default", "key", holder="h", at=later, callback_url=None, request_body="{}"
    )
    assert sent is not None
    assert (sent.state, sent.sent_at, sent.in_use_since) == (StartState.SENT, later, later)
    words = {"status": 402, "code": "insufficient_credits", "message": "top up", "fields": []}
    refused = StartState.REFUSED
    assert await starts.mark(db, "default", "key", holder="x", state=refused, error=words) is None
    row = await starts.mark(db, "default", "key", holder="h", state=refused, error=words)
    assert row is not None
    assert (row.state, row.error, row.lease_holder) == (refused, words, "h")
    assert row == await starts.get(db, "default", "key")
    assert (
        await starts.mark_sent(
            db, "default", "never", holder="h", at=later, callback_url=None, request_body="{}"
        )
        is None
    )


async def test_a_key_in_use_keeps_its_first_request(db: Database) -> None:
    """Sent again, a start keeps since when its key is in use and what it asked FLORA to call."""
    await reserve(db, "key")
    assert await starts.take(db, "default", "key", "h", NOW, LEASE)
    first = await starts.mark_sent(
        db,
        "default",
        "key",
        holder="h",
        at=NOW,
        callback_url="https://a.example",
        request_body="{}",
    )
    later = NOW + timedelta(seconds=50)
    again = await starts.mark_sent(
        db,
        "default",
        "key",
        holder="h",
        at=later,
        callback_url="https://b.example",
        request_body="{}",
    )
    assert first is not None
    assert again is not None
    assert (again.in_use_since, again.sent_at) == (NOW, later)
    assert again.callback_url == "https://a.example"
    await starts.take(db, "default", "key", "h", later, LEASE)
    await starts.mark(db, "default", "key", holder="h", state=StartState.REFUSED, error={})
    anew = await starts.mark_sent(
        db,
        "default",
        "key",
        holder="h",
        at=later,
        callback_url="https://b.example",
        request_body="{}",
    )
    assert anew is not None
    assert (anew.in_use_since, anew.callback_url) == (later, "https://b.example")


async def test_what_became_a_run_stays_so(writer: TestWriter, db: Database) -> None:
    """A late answer of another attempt cannot reopen a start, and nobody may send it again."""
    await reserve(db, "key")
    assert await starts.take(db, "default", "key", "h", NOW, LEASE)
    await writer.submit(of_start(started("run_1"), workspace_id="default", idempotency_key="key"))
    unresolved = StartState.UNRESOLVED
    assert await starts.mark(db, "default", "key", holder="h", state=unresolved, error={}) is None
    assert not await starts.take(db, "default", "key", "h", NOW, LEASE)
    await writer.submit(of_start(started("run_2"), workspace_id="default", idempotency_key="key"))
    row = await starts.get(db, "default", "key")
    assert row is not None
    assert (row.state, row.run_id) == (StartState.STARTED, "run_1")


async def test_one_process_sends_a_key(db: Database, other_db: Database) -> None:
    """The right to send has one holder, until it is given back or runs out."""
    await reserve(db, "key")
    asked = await asyncio.gather(
        *(
            starts.take(each, "default", "key", f"h{number}", NOW, LEASE)
            for number, each in enumerate([db, other_db] * 3)
        )
    )
    [row] = filter(None, asked)
    holder = str(row.lease_holder)
    assert holder == f"h{asked.index(row)}"
    assert not await starts.take(db, "default", "key", "late", NOW, LEASE)
    assert await starts.take(db, "default", "key", holder, NOW, LEASE)
    await starts.give_back(db, "default", "key", "late")
    assert not await starts.take(db, "default", "key", "late", NOW, LEASE)
    await starts.give_back(db, "default", "key", holder)
    assert await starts.take(db, "default", "key", "late", NOW, LEASE)
    assert await starts.take(db, "default", "key", "later", NOW + LEASE, LEASE)
    assert not await starts.take(db, "default", "never kept", "h", NOW, LEASE)


async def test_open_starts_are_found(writer: TestWriter, db: Database) -> None:
    """What was sent, and is neither started, refused nor unresolved, is open."""
    for number, key in enumerate(["b", "a", "c", "d", "e"]):
        await reserve(db, key, at=NOW + timedelta(seconds=number))
    await mark(db, "a", StartState.SENT)
    await mark(db, "c", StartState.REFUSED)
    await writer.submit(of_start(started("run_1"), workspace_id="default", idempotency_key="d"))
    await mark(db, "e", StartState.IN_DOUBT)
    assert [row.idempotency_key for row in await starts.open_starts(db)] == ["a", "e"]


async def test_rival_starts_are_found(writer: TestWriter, db: Database) -> None:
    """Other starts of the technique in this workspace that may own a run are its rivals."""
    await reserve(db, "mine")
    await reserve(db, "never sent")
    await reserve(db, "open")
    await mark(db, "open", StartState.IN_DOUBT)
    await reserve(db, "refused")
    await mark(db, "refused", StartState.REFUSED)
    await reserve(db, "elsewhere", workspace_id="other")
    await reserve(db, "of another technique", technique="tech_2")
    await reserve(db, "unresolved")
    await mark(db, "unresolved", StartState.UNRESOLVED)
    await reserve(db, "started")
    await writer.submit(
        of_start(started("run_1"), workspace_id="default", idempotency_key="started")
    )
    found = await starts.rivals(db, "default", "tech_1", "mine")
    assert sorted(row.idempotency_key for row in found) == ["open", "unresolved"]


async def test_runs_of_known_origin_are_of_no_other_start(writer: TestWriter, db: Database) -> None:
    """A run that a start owns, or that was given to track, is nobody else's; nor is one that was
    known before, or is of another technique."""
    row = await reserve(db, "sent", at=NOW + starts.SET_BACK)
    await reserve(db, "key")
    await writer.submit(
        of_start(
            seen("run_start", source=Source.HISTORY), workspace_id="default", idempotency_key="key"
        )
    )
    await writer.submit_all(
        [
            started("run_answer"),
            seen("run_track", source=Source.TRACK),
            seen("run_swept", source=Source.HISTORY),
            seen("run_before", source=Source.HISTORY, at=NOW - timedelta(seconds=1)),
            seen("run_other", source=Source.HISTORY, facts={"technique_id": "tech_2"}),
            callback("run_called"),
        ]
    )
    asked = ["run_start", "run_answer", "run_track", "run_swept", "run_called", "run_unknown"]
    asked += ["run_before", "run_other"]
    assert await starts.possible(db, row, asked) == {"run_swept", "run_called", "run_unknown"}
    assert await starts.possible(db, row, []) == set()


async def test_an_outcome_that_comes_late_is_not_of_a_later_request(db: Database) -> None:
    """What a process could not store at once is stored only if the key was not sent again since:
    else it would free a key whose last request may have started a run."""
    await reserve(db, "key")
    row = await mark(db, "key", StartState.IN_DOUBT)
    refused = NotStored(row.sent_at, starts.outcome(StartState.REFUSED, {"message": "no credits"}))
    assert await starts.take(db, "default", "key", "x", NOW, LEASE)
    again = NOW + timedelta(seconds=30)
    await starts.mark_sent(
        db, "default", "key", holder="x", at=again, callback_url=None, request_body="{}"
    )
    assert await starts.give_back(db, "default", "key", "x")
    assert await starts.give_back(db, "default", "key", "h", refused)
    found = await starts.get(db, "default", "key")
    assert found is not None
    assert (found.state, found.sent_at) == (StartState.IN_DOUBT, again)
    doubt = NotStored(again, starts.outcome(StartState.IN_DOUBT, None))
    for known in (replace(refused, sent_at=again), doubt):  # the first outcome is the last
        assert await starts.give_back(db, "default", "key", "h", known)
        found = await starts.get(db, "default", "key")
        assert found is not None
        assert found.state is StartState.REFUSED


async def test_what_may_not_be_sent_is_not_marked_as_sent(db: Database) -> None:
    """A start whose lease is over, one that is left to a person, and a key with which FLORA has
    another request."""

    async def may_send(key: str, *, at: datetime = NOW) -> bool:
        row = await starts.mark_sent(
            db, "default", key, holder="h", at=at, callback_url=None, request_body="{}"
        )
        return row is not None

    await reserve(db, "late")
    assert await starts.take(db, "default", "late", "h", NOW, LEASE)
    assert not await may_send("late", at=NOW + LEASE)
    assert await may_send("late")
    await reserve(db, "unresolved")
    await mark(db, "unresolved", StartState.UNRESOLVED)
    assert await starts.take(db, "default", "unresolved", "h", NOW, LEASE)
    assert not await may_send("unresolved")
    await reserve(db, "used")
    await mark(db, "used", StartState.REFUSED, error={"code": "idempotency_conflict"})
    again = await reserve(db, "used", lease_holder="h", lease_until=NOW + LEASE)
    assert again.lease_holder is None


async def test_each_value_of_a_start_that_is_not_sent_yet_takes_its_own_type(db: Database) -> None:
    """Types can be corrected until it is sent, whatever the order of the inputs is by then. Those
    of several values of one input may differ, if the definition says none."""
    first = [("pages", "text", "1"), ("a", "text", "2"), ("pages", "text", "3")]
    then = [("a", "text", "2"), ("pages", "imageUrl", "1"), ("pages", "videoUrl", "3")]
    kept, given = (
        [{"id": id_, "type": type_, "value": value} for id_, type_, value in inputs]
        for inputs in (first, then)
    )
    await reserve(db, "key", inputs=kept)
    row = await reserve(db, "key", inputs=given, lease_holder="h", lease_until=NOW + LEASE)
    assert row.inputs == [given[1], given[0], given[2]]
    assert row.is_for("tech_1", given)


async def test_starts_without_an_outcome_are_listed_newest_first(db: Database) -> None:
    """Whatever their states, page by page."""
    states = {1: StartState.UNRESOLVED, 2: StartState.SENT, 3: StartState.IN_DOUBT}
    for number, state in states.items():
        await reserve(db, f"key-{number}", at=NOW + timedelta(seconds=number))
        await mark(db, f"key-{number}", state)
    await reserve(db, "key-4")
    page, cursor = await starts.list_starts(db, limit=2)
    assert [row.idempotency_key for row in page] == ["key-3", "key-2"]
    page, cursor = await starts.list_starts(db, cursor=cursor, limit=2)
    assert ([row.idempotency_key for row in page], cursor) == (["key-1"], None)


async def test_the_newest_run_that_was_known_before(writer: TestWriter, db: Database) -> None:
    """By FLORA's clock, whichever day it has, but not by a time that one run alone has."""

    async def newest() -> datetime | None:
        return await starts.newest_known(db, "ws_1", before=NOW)

    async def know(number: int, created_at: datetime | None, **more: Any) -> None:
        facts = {"created_at": created_at, "workspace_id": "ws_1"} | more
        at = NOW + timedelta(seconds=number)
        await writer.submit(seen(f"run_{number}", source=Source.HISTORY, at=at, facts=facts))

    await know(-1, None)
    await know(-2, NOW, workspace_id="ws_2")
    await know(1, NOW)
    assert await newest() is None
    await know(-3, NOW.replace(year=9999))
    assert await newest() == NOW.replace(year=9999)
    days = [NOW + timedelta(days=day) for day in range(9)]
    for number, day in enumerate(days, 4):
        await know(-number, day)
    assert await newest() == days[-4]


async def test_a_hold_that_was_given_back_is_not_prolonged(db: Database) -> None:
    """Who holds a key prolongs it; where that comes late, nobody holds it. After its time that is
    done only for what was sent: the room of another start may be someone else's by then."""

    async def holder() -> tuple[str | None, datetime | None]:
        row = await starts.get(db, "default", "key")
        assert row is not None
        return row.lease_holder, row.lease_until

    await reserve(db, "key")
    assert await starts.take(db, "default", "key", "h", NOW, LEASE)
    later = NOW + 2 * LEASE
    await starts.prolong(db, "default", "key", "x", later, LEASE)
    assert await holder() == ("h", NOW + LEASE)
    assert not await starts.prolong(db, "default", "key", "h", later, LEASE)
    assert await starts.prolong(db, "default", "key", "h", NOW, LEASE)
    await starts.mark_sent(
        db, "default", "key", holder="h", at=NOW, callback_url=None, request_body="{}"
    )
    assert await starts.prolong(db, "default", "key", "h", later, LEASE)
    assert await holder() == ("h", later + LEASE)
    await starts.give_back(db, "default", "key", "h")
    await starts.prolong(db, "default", "key", "h", later, LEASE)
    assert await holder() == (None, None)
