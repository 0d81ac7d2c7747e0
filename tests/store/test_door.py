"""The door: one transaction for whatever waits, and an answer only after it."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import asyncpg
import pytest
import uvloop
from sqlalchemy import func, select

from tests.store.making import (
    NOW,
    callback,
    ids,
    open_door,
    quarantined,
    receipts,
    seen,
    started,
)
from tracker.core.entry import DeliveryOutcome, Unseen
from tracker.core.errors import StoreError, StoreUnavailable
from tracker.core.observation import Source
from tracker.core.run import Output, RunStatus, Tracking
from tracker.store.batch import Outcome
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.store.read import events, get_delivery, get_run
from tracker.store.tables import runs


async def test_what_waits_is_committed_together(db: Database, other_db: Database) -> None:
    """Two hundred callbacks at the same moment cost a handful of commits, and all are on disk."""
    commits: list[Outcome] = []
    async with open_door(db, on_commit=[commits.append]) as door:
        passed = await asyncio.gather(*(door.put(callback(run)) for run in ids("run", 200)))
    assert len(commits) <= 5
    assert sum(len(commit.passed) for commit in commits) == 200
    assert all(each.after and each.after.run.run_id for each in passed)
    async with other_db.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(runs))).scalar() == 200
    assert len(await receipts(other_db)) == 200


async def test_what_is_on_its_way_is_taken_along_on_sqlite(sqlite_url: str) -> None:
    """Under load a commit takes in what this process has begun to read: senders that are told of
    the commit at the same moment share the next one, though some are quicker."""
    commits: list[Outcome] = []

    async def send(sender: int) -> None:
        for number in range(8):
            for _ in range(sender % 4):
                await asyncio.sleep(0)
            await door.put(callback(f"run_{sender}_{number}"))

    async with (
        await Database.open(sqlite_url) as db,
        open_door(db, on_commit=[commits.append]) as door,
    ):
        await asyncio.gather(*map(send, range(40)))
    sizes = [len(commit.passed) for commit in commits]
    assert sum(sizes) == 320
    assert len(sizes) <= 12, sizes


async def test_what_never_pauses_is_not_waited_for(sqlite_url: str) -> None:
    """A batch is held open for a moment only, though something new comes in each round of the
    event loop."""
    commits: list[Outcome] = []
    puts: list[asyncio.Future[object]] = []
    async with (
        await Database.open(sqlite_url) as db,
        open_door(db, max_batch=20_000, on_commit=[commits.append]) as door,
    ):
        await door.put_all([callback("run_a"), callback("run_b")])
        while len(commits) < 2 and len(puts) < 8000:
            puts.append(asyncio.ensure_future(door.put(callback(f"run_{len(puts)}"))))
            await asyncio.sleep(0)
        await asyncio.gather(*puts)
    assert len(commits[1].passed) < 4000


async def test_a_batch_is_bounded(db: Database) -> None:
    """No transaction takes more entries than allowed, nor much more than the bytes allowed."""
    commits: list[Outcome] = []
    large = 3 * 1024 * 1024
    async with open_door(db, max_batch=7, on_commit=[commits.append]) as door:
        await door.put_all([callback(run) for run in ids("run", 20)])
        assert max(len(commit.passed) for commit in commits) == 7
        commits.clear()
        await door.put_all([callback(run, body=b"x" * large) for run in ids("large", 6)])
    assert [len(commit.passed) for commit in commits] == [3, 3]


async def test_a_callback_makes_its_run_known_and_due(door: Door, db: Database) -> None:
    """A callback for a run that nobody registered creates it, ended and to be read at once."""
    passed = await door.put(callback("run_1", body=b'{"raw": 1}'))
    record = await get_run(db, "run_1")
    assert record is not None
    assert record == passed.after
    assert passed.before is None
    assert (record.run.status, record.tracking) == (RunStatus.COMPLETED, Tracking.ACTIVE)
    assert (record.source, record.ended_via) == (Source.CALLBACK, Source.CALLBACK)
    assert (record.callback_at, record.next_check_at) == (NOW, NOW)
    delivery = await get_delivery(db, "whd_run_1")
    assert delivery is not None
    assert (delivery.receipts, delivery.body) == (1, b'{"raw": 1}')
    assert [event.source for event in await events(db, "run_1")] == [Source.CALLBACK]


async def test_a_repeated_delivery_only_counts(door: Door, db: Database) -> None:
    """In one batch or in several, a delivery takes effect once; after that it is counted."""
    later = NOW + timedelta(seconds=10)
    together = await door.put_all(
        [callback("run_1", "whd_1"), callback("run_1", "whd_1"), callback("run_2", "whd_2")]
    )
    assert [each.repeated for each in together] == [False, True, False]
    await door.put(seen("run_1", RunStatus.COMPLETED, at=NOW + timedelta(seconds=1)))
    settled = await get_run(db, "run_1")
    again = await door.put(callback("run_1", "whd_1", at=later, body=b"other"))
    assert again.repeated
    assert await receipts(db) == {"whd_1": 3, "whd_2": 1}
    assert await get_run(db, "run_1") == settled
    assert len(await events(db, "run_1")) == 2
    delivery = await get_delivery(db, "whd_1")
    assert delivery is not None
    assert (delivery.received_at, delivery.last_received_at) == (NOW, later)
    assert delivery.body == b"{}"


async def test_two_doors_count_one_delivery_once(db: Database, other_db: Database) -> None:
    """The same callbacks through two processes at the same moment take effect once each."""
    wanted = [callback(run) for run in ids("run", 60)]
    async with open_door(db, max_batch=7) as one, open_door(other_db, max_batch=11) as other:
        first, second = await asyncio.gather(
            one.put_all(wanted), other.put_all(list(reversed(wanted)))
        )
    repeated = [(a.repeated, b.repeated) for a, b in zip(first, reversed(second), strict=True)]
    assert all(sorted(pair) == [False, True] for pair in repeated)
    assert set((await receipts(db)).values()) == {2}


async def test_what_is_not_understood_is_kept(door: Door, db: Database) -> None:
    """A quarantined delivery is stored with its bytes and its reason, and touches no run."""
    passed = await door.put(quarantined("whd_odd", body=b"\xff\x00"))
    assert (passed.before, passed.after, passed.repeated) == (None, None, False)
    assert (await door.put(quarantined("whd_odd"))).repeated
    delivery = await get_delivery(db, "whd_odd")
    assert delivery is not None
    assert delivery.outcome is DeliveryOutcome.QUARANTINED
    assert (delivery.run_id, delivery.receipts, delivery.body) == (None, 2, b"\xff\x00")
    assert delivery.reason == "not a JSON object"


async def test_entries_for_one_run_are_applied_in_order(door: Door, db: Database) -> None:
    """A batch may hold a run's whole life; each answer shows the state before and after it."""
    output = Output("o1", "imageUrl", "https://x/1.png")
    passed = await door.put_all(
        [
            started("run_1"),
            callback("run_1", at=NOW + timedelta(seconds=5)),
            seen(
                "run_1",
                RunStatus.COMPLETED,
                at=NOW + timedelta(seconds=6),
                facts={"outputs": (output,), "progress": 100},
                reads=1,
            ),
        ]
    )
    states = [each.after.tracking for each in passed if each.after]
    assert states == [Tracking.ACTIVE, Tracking.ACTIVE, Tracking.SETTLED]
    assert passed[1].before == passed[0].after
    record = await get_run(db, "run_1")
    assert record == passed[2].after
    assert record is not None
    assert (record.source, record.ended_via, record.checks) == (Source.START, Source.CALLBACK, 1)
    assert record.run.outputs == (output,)
    assert record.inputs == [{"id": "prompt", "type": "text", "value": "a cat"}]
    told = [event.source for event in await events(db, "run_1")]
    assert told == [Source.START, Source.CALLBACK, Source.POLL]


async def test_outputs_are_replaced_as_a_whole(door: Door, db: Database) -> None:
    """A higher sight's outputs take the place of a lower one's, however many there were."""
    few = (Output("o1", "text", "final"),)
    many = tuple(Output(f"o{n}", "imageUrl", f"https://x/{n}") for n in range(3))
    await door.put(seen("run_1", RunStatus.RUNNING, facts={"outputs": many}))
    await door.put(seen("run_1", RunStatus.COMPLETED, facts={"outputs": few}))
    record = await get_run(db, "run_1")
    assert record is not None
    assert record.run.outputs == few


async def test_a_sight_without_news_leaves_no_event(door: Door, db: Database) -> None:
    """A read that shows what is known already is counted on the run and nowhere else."""
    await door.put(seen("run_1", RunStatus.RUNNING, reads=1))
    passed = await door.put(seen("run_1", RunStatus.RUNNING, at=NOW + timedelta(1), reads=1))
    assert not passed.news
    assert len(await events(db, "run_1")) == 1
    record = await get_run(db, "run_1")
    assert record is not None
    assert (record.checks, record.looks) == (2, 2)


async def test_an_unseen_run_is_counted_only_where_it_is_known(door: Door, db: Database) -> None:
    """A read that fails is noted on its run; about a run never heard of it says nothing."""
    await door.put(started("run_1"))
    at = NOW + timedelta(seconds=40)
    await door.put_all(
        [
            Unseen(run_id="run_1", at=at, error="FLORA answered 404", missing=True),
            Unseen(run_id="run_unknown", at=at, error="FLORA answered 404", missing=True),
        ]
    )
    record = await get_run(db, "run_1")
    assert record is not None
    assert (record.missing, record.missing_since) == (1, at)
    assert record.last_error == "FLORA answered 404"
    assert await get_run(db, "run_unknown") is None


async def test_a_refused_entry_does_not_take_its_neighbours_along(door: Door, db: Database) -> None:
    """Where the database refuses one entry of a batch, that one fails and all others are stored."""
    entries = [callback(run) for run in ids("run", 20)]
    entries[13] = callback("run_bad", progress=400.0)
    answers = await asyncio.gather(*(door.put(entry) for entry in entries), return_exceptions=True)
    failed = [number for number, each in enumerate(answers) if isinstance(each, Exception)]
    assert failed == [13]
    assert isinstance(answers[13], StoreError)
    assert not isinstance(answers[13], StoreUnavailable)
    assert len(await receipts(db)) == 19
    assert await get_run(db, "run_bad") is None


async def test_text_that_no_database_holds_is_made_fit(door: Door, db: Database) -> None:
    """NUL and halves of surrogate pairs are replaced in ids, facts and events; bytes stay."""
    passed = await door.put(
        replace(
            callback("run_\0", "whd_\ud800", body=b'"\0\xed\xa0\x80"'),
            observation=seen(
                "run_\0",
                RunStatus.COMPLETED,
                source=Source.CALLBACK,
                facts={"technique_name": "a\0b\udfffc"},
            ).observation,
        )
    )
    assert passed.after is not None
    assert passed.after.run.run_id == "run_\ufffd"
    record = await get_run(db, "run_\0")
    assert record == passed.after
    assert record is not None
    assert record.run.technique_name == "a\ufffdb\ufffdc"
    (event,) = await events(db, "run_\ufffd")
    assert event.detail["technique_name"] == "a\ufffdb\ufffdc"
    delivery = await get_delivery(db, "whd_\ufffd")
    assert delivery is not None
    assert delivery.body == b'"\0\xed\xa0\x80"'


async def test_inputs_of_any_shape_are_kept(door: Door, db: Database) -> None:
    """What a run was started with is somebody's JSON: odd numbers and odd text included."""
    odd = [{"id": "n", "value": 2**70, "nul\0": "a\0", "inf": float("inf"), "deep": [[None]]}]
    await door.put(replace(started("run_1"), inputs=odd))
    record = await get_run(db, "run_1")
    assert record is not None
    expected = {"id": "n", "value": float(2**70), "nul\ufffd": "a\ufffd", "inf": None}
    assert record.inputs == [expected | {"deep": [[None]]}]


async def test_closing_commits_what_waits_and_refuses_the_rest(db: Database) -> None:
    """What was put before the end is stored and answered; what comes after it is refused."""
    door = open_door(db, max_batch=10)
    door.start()
    waiting = [asyncio.ensure_future(door.put(callback(run))) for run in ids("run", 45)]
    await asyncio.sleep(0)
    await door.aclose()
    assert all(each.after for each in await asyncio.gather(*waiting))
    assert len(await receipts(db)) == 45
    with pytest.raises(StoreUnavailable):
        await door.put(callback("run_late"))


async def test_a_caller_that_goes_away_breaks_nothing(door: Door, db: Database) -> None:
    """A cancelled caller's entry is stored all the same, and its neighbours are answered."""
    calls = [asyncio.ensure_future(door.put(callback(run))) for run in ids("run", 10)]
    await asyncio.sleep(0)
    calls[3].cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(each, asyncio.CancelledError) for each in answers) == 1
    await door.put(callback("run_after"))
    assert len(await receipts(db)) == 11


async def test_a_hook_that_fails_is_no_callers_fault(db: Database) -> None:
    """What somebody else does after a commit cannot take the commit back."""

    def fails(_: Outcome) -> None:
        raise RuntimeError("not today")

    told: list[Outcome] = []
    async with open_door(db, on_commit=[fails, told.append]) as door:
        passed = await door.put(callback("run_1"))
    assert passed.after is not None
    assert [outcome.news for outcome in told] == [["run_1"]]


async def test_too_many_that_wait_are_refused_at_once(db: Database) -> None:
    """A flood against a slow database is answered, not gathered without end."""
    async with open_door(db, max_waiting=5) as door:
        with pytest.raises(StoreUnavailable):
            await door.put_all([callback(run) for run in ids("run", 6)])
        with suppress(StoreUnavailable):
            await asyncio.gather(*(door.put(callback(run)) for run in ids("run", 50)))
        await door.put(callback("run_after"))
        stored = await receipts(db)
    assert "whd_run_after" in stored
    assert len(stored) < 51


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_batch_that_is_held_up_holds_up_nobody_else(
    postgres_url: str, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """While a callback waits for its run, which somebody has locked, others are committed; on the
    loop of the tests, and on the one that serves, whose clock goes by milliseconds."""

    async def put_beside_a_locked_run() -> None:
        holder = await asyncpg.connect(postgres_url)
        async with await Database.open(postgres_url) as db, open_door(db) as door:
            await door.put(seen("run_held"))
            transaction = holder.transaction()
            await transaction.start()
            await holder.execute("SELECT FROM runs WHERE run_id = 'run_held' FOR UPDATE")
            held = asyncio.create_task(door.put(callback("run_held")))
            for number in range(3):
                await asyncio.sleep(0.01)
                async with asyncio.timeout(1):
                    await door.put(callback(f"run_{number}"))
            assert not held.done()
            await transaction.rollback()
            assert (await held).news
        await holder.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(put_beside_a_locked_run())
