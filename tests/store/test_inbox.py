"""The inbox: what is acknowledged is stored, and what is stored is applied, once."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import repeat
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, func, select, text

from tests.store.making import (
    NOW,
    RULES,
    TestInbox,
    TestWriter,
    applier_of,
    apply_all,
    body_of,
    callback,
    delivery,
    ids,
    merge_timeline,
    open_inbox,
    open_writer,
    receipts,
    seen,
    started,
)
from tests.support.deliveries import Delivered, keep, waiting
from tests.support.faulty import FaultyDatabase
from tests.support.waiting import assert_takes_less, eventually
from tracker.core.errors import StoreError, StoreUnavailable
from tracker.core.observation import Source
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.core.run import RunStatus, Tracking
from tracker.core.waiting import cancel
from tracker.flora.callback import digest_id
from tracker.receiving.apply import SAMPLES, Applier
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import MAX_LARGE, SMALL_BODY, get_delivery, requeue
from tracker.store.schema import deliveries, run_events, runs
from tracker.store.url import DatabaseTimes
from tracker.store.writing.writer import WriteOutcome
from tracker.workspaces import Workspace, Workspaces

LATER = NOW + timedelta(hours=2)


@pytest.fixture
async def inbox(db: Database) -> AsyncIterator[TestInbox]:
    """An inbox of the database."""
    async with open_inbox(db) as inbox:
        yield inbox


async def refuse_runs(db: Database, *run_ids: str) -> None:
    """Let the database refuse rows of these runs."""
    listed = ", ".join(f"'{one}'" for one in run_ids)
    refuses = {
        "postgresql": f"ALTER TABLE runs ADD CHECK (run_id NOT IN ({listed}))",
        "sqlite": f"CREATE TRIGGER refuses BEFORE INSERT ON runs WHEN NEW.run_id IN ({listed}) "
        "BEGIN SELECT RAISE(ABORT, 'refused'); END",
    }
    await db.execute(text(refuses[db.dialect]))


def open_applier(db: Database, **options: Any) -> Applier:
    given = {
        "workspaces": Workspaces([Workspace(place="default")], database=db, clock=lambda: NOW),
        "rules": RULES,
        "clock": lambda: NOW,
        "background": False,
    }
    return Applier(db, **(given | options))


async def test_what_is_known_of_commits_stays_small(db: Database) -> None:
    """However long callbacks come while none can be applied."""
    async with open_applier(db) as applier:
        for length in range(10_000):
            applier.stored(length)
        assert len(applier._queue_lengths) == SAMPLES
        assert applier._is_busy()


async def outcomes(db: Database) -> dict[str, str]:
    """What became of each delivery."""
    async with db.read() as connection:
        rows = await connection.execute(select(deliveries.c.delivery_id, deliveries.c.outcome))
        return dict(rows.all())


async def how_many(db: Database, table: Any) -> int:
    async with db.read() as connection:
        return int(await connection.scalar(select(func.count()).select_from(table)) or 0)


# Storing


async def test_what_is_stored_waits_and_touches_no_run(
    inbox: TestInbox, other_db: Database
) -> None:
    """The bytes and what the row needs are on disk when the caller is told; nothing else is."""
    came = replace(delivery("run_1"), api_version="2026-06-11", created_at=NOW, workspace_id="ws")
    stored = await inbox.store(came)
    assert (stored.delivery_id, stored.outcome) == ("whd_run_1", DeliveryOutcome.WAITING)
    assert not stored.repeated
    row = await get_delivery(other_db, "whd_run_1")
    assert row is not None
    assert (row.outcome, row.receipts, row.body) == (DeliveryOutcome.WAITING, 1, came.body)
    assert (row.received_at, row.last_received_at, row.applied_at) == (NOW, NOW, None)
    assert (row.run_id, row.workspace_id, row.created_at) == ("run_1", "ws", NOW)
    assert await how_many(other_db, runs) == 0


async def test_many_share_a_commit(db: Database) -> None:
    """Two hundred at the same moment cost a handful of commits, and all are on disk."""
    commits: list[int] = []

    def count(items: int, *_: object) -> None:
        commits.append(items)

    async with open_inbox(db, on_write=count) as inbox:
        stored = await asyncio.gather(*(inbox.store(delivery(run)) for run in ids("run", 200)))
    assert (sum(commits), len(commits)) == (200, 1)
    assert not any(one.repeated for one in stored)
    assert len(await receipts(db)) == 200


async def test_groups_of_any_size_need_few_statements(db: Database) -> None:
    """Every delivery of a group is a row, and nothing else is; a driver keeps each statement that
    it has prepared, with the bodies that it had last, so that there must not be one for each
    size."""
    sizes = (1, 3, 5, 7, 9, 21, 33, 50, 63, 65, 90, 97, 127, 128, 129, 200)
    texts: set[str] = set()
    send = db.send

    async def heard(statement: str, values: tuple[Any, ...]) -> Any:
        texts.add(statement)
        return await send(statement, values)

    db.send = heard  # type: ignore[method-assign]
    async with open_inbox(db) as inbox:
        for size in sizes:
            came = [inbox.store(delivery(f"run_{size}_{number}")) for number in range(size)]
            assert {one.repeated for one in await asyncio.gather(*came)} == {False}
    assert await how_many(db, deliveries) == sum(sizes)
    assert 0 < len(texts) < 14


async def test_a_repeated_delivery_only_counts(inbox: TestInbox, db: Database) -> None:
    """In one group or in several; and what became of it is told."""
    later = NOW + timedelta(seconds=10)
    came = [delivery("run_1"), delivery("run_2"), delivery("run_1", at=later), delivery("run_1")]
    together = await asyncio.gather(*map(inbox.store, came))
    assert [one.repeated for one in together] == [False, False, True, True]
    assert await apply_all(db) == 2
    again = await inbox.store(delivery("run_1", at=later + timedelta(seconds=1)))
    assert (again.delivery_id, again.outcome) == ("whd_run_1", DeliveryOutcome.APPLIED)
    assert again.repeated
    assert await receipts(db) == {"whd_run_1": 4, "whd_run_2": 1}
    row = await get_delivery(db, "whd_run_1")
    assert row is not None
    assert (row.received_at, row.last_received_at) == (NOW, later + timedelta(seconds=1))
    assert await apply_all(db) == 0
    assert len(await read.events(db, "run_1")) == 1


@pytest.mark.parametrize("together", [True, False])
async def test_another_body_under_a_known_id_is_stored_beside_it(
    inbox: TestInbox, db: Database, together: bool
) -> None:
    """Both were signed: each is kept as it came and counted once, however they came."""
    one, other = delivery("run_1"), delivery("run_1", body=body_of("run_2", "whd_run_1"))
    if together:
        stored = list(await asyncio.gather(*map(inbox.store, (one, other, one, other))))
    else:
        stored = [await inbox.store(each) for each in (one, other, one, other)]
    key = digest_id(other.body)
    assert [each.delivery_id for each in stored] == ["whd_run_1", key, "whd_run_1", key]
    assert [each.repeated for each in stored] == [False, False, True, True]
    assert await receipts(db) == {"whd_run_1": 2, key: 2}
    kept = await get_delivery(db, key)
    assert kept is not None
    assert kept.body == other.body
    assert await apply_all(db) == 2
    assert {"run_1", "run_2"} == set(await read.get_runs(db, ["run_1", "run_2"]))


async def test_an_id_that_looks_like_anothers_digest_loses_nothing(
    inbox: TestInbox, db: Database
) -> None:
    """Whatever ids someone makes up, every body is kept."""
    other = delivery("run_1", body=b"other")
    forged = replace(delivery("run_2", body=b"forged"), delivery_id=digest_id(b"other"))
    came = [delivery("run_1"), forged, other]
    stored = [await inbox.store(each) for each in came]
    assert len({each.delivery_id for each in stored}) == 3
    for each, delivered in zip(stored, came, strict=True):
        row = await get_delivery(db, each.delivery_id)
        assert row is not None
        assert row.body == delivered.body


async def test_a_removed_body_still_recognises_a_repetition(inbox: TestInbox, db: Database) -> None:
    """What retention emptied cannot be compared, and is no other delivery."""
    await inbox.store(delivery("run_1"))
    await apply_all(db)
    emptied = deliveries.update().values(body=b"", body_removed_at=NOW)
    await db.write(lambda connection: connection.execute(emptied).rowcount)
    assert (await inbox.store(delivery("run_1"))).repeated
    assert await receipts(db) == {"whd_run_1": 2}


async def test_two_processes_store_the_same(db: Database, other_db: Database) -> None:
    """Each delivery is new to one of them, whatever the order, and nobody waits in a circle."""
    wanted = [delivery(run) for run in ids("run", 60)]
    async with open_inbox(db, max_group=7) as one, open_inbox(other_db, max_group=11) as other:
        first, second = await asyncio.gather(
            asyncio.gather(*map(one.store, wanted)),
            asyncio.gather(*map(other.store, reversed(wanted))),
        )
    repeated = [(a.repeated, b.repeated) for a, b in zip(first, reversed(second), strict=True)]
    assert all(sorted(pair) == [False, True] for pair in repeated)
    assert set((await receipts(db)).values()) == {2}


# Applying


async def test_applying_ends_the_run_and_makes_it_due(inbox: TestInbox, db: Database) -> None:
    """A run that nobody registered is created, ended, and to be read at once."""
    await inbox.store(delivery("run_1"))
    assert await apply_all(db, at=LATER) == 1
    record = await read.get_run(db, "run_1")
    assert record is not None
    assert (record.run.status, record.tracking) == (RunStatus.COMPLETED, Tracking.ACTIVE)
    assert (record.source, record.ended_via) == (Source.CALLBACK, Source.CALLBACK)
    assert (record.callback_at, record.next_check_at) == (NOW, NOW)
    row = await get_delivery(db, "whd_run_1")
    assert row is not None
    assert (row.outcome, row.applied_at, row.reason) == (DeliveryOutcome.APPLIED, LATER, None)
    assert [one.at for one in await read.events(db, "run_1")] == [NOW]
    assert await merge_timeline(db, "run_1") == record.run


async def test_the_first_receipt_stays_the_first(
    inbox: TestInbox, writer: TestWriter, db: Database
) -> None:
    """`callback_at` is the earliest receipt, in whichever order deliveries are applied."""
    await writer.submit(started("run_1"))
    early, late = NOW + timedelta(seconds=5), NOW + timedelta(seconds=9)
    await inbox.store(replace(delivery("run_1", at=late), delivery_id="whd_late"))
    await apply_all(db)
    await inbox.store(replace(delivery("run_1", at=early), delivery_id="whd_early"))
    await apply_all(db)
    record = await read.get_run(db, "run_1")
    assert record is not None
    assert (record.source, record.callback_at) == (Source.START, early)


async def test_a_settled_run_stays_as_it_is(
    inbox: TestInbox, writer: TestWriter, db: Database
) -> None:
    """What the API said stands; the callback is only noted."""
    await inbox.store(delivery("run_1"))
    await writer.submit(seen("run_1", RunStatus.COMPLETED))
    await apply_all(db)
    record = await read.get_run(db, "run_1")
    assert record is not None
    assert (record.tracking, record.ended_via) == (Tracking.SETTLED, Source.POLL)
    assert (record.callback_at, record.next_check_at) == (NOW, None)


ODD_BODIES = (
    b"",
    b"\xff\x00 no JSON",
    b"[" * 100_000,
    b'{"id": "whd_odd", "data": {"run_id": "run_\\u0000"}, "type": "run.sung"}',
    b'{"id": {"a": 1}, "type": ["run.completed"], "data": 7, "created_at": 1e400}',
    b'{"type": "run.completed", "data": {"run_id": "r", "status": "failed"}}',
    b'{"created_at": %s}' % (b"9" * 5000),
)


async def test_what_is_not_understood_is_quarantined_alone(inbox: TestInbox, db: Database) -> None:
    """Each says why, its bytes stay, and its neighbours are applied."""
    odd = [Delivery(delivery_id=digest_id(body), received_at=NOW, body=body) for body in ODD_BODIES]
    good = [delivery(run) for run in ids("run", 20)]
    await asyncio.gather(*map(inbox.store, [*good[:7], *odd, *good[7:]]))
    assert await apply_all(db) == 20 + len(odd)
    for one in odd:
        row = await get_delivery(db, one.delivery_id)
        assert row is not None
        assert row.outcome is DeliveryOutcome.QUARANTINED
        assert (row.body, row.applied_at, bool(row.reason)) == (one.body, None, True)
    assert await how_many(db, runs) == 20


async def test_text_that_no_database_holds_is_made_fit(inbox: TestInbox, db: Database) -> None:
    """NUL and halves of surrogate pairs are replaced in what is read of a body; bytes stay."""
    body = (
        b'{"id": "whd_1", "type": "run.failed", "data": {"run_id": "run_\\u0000\\ud800", '
        b'"status": "failed", "error_code": "a\\u0000", "error_message": "\\udfff"}}'
    )
    await inbox.store(Delivery(delivery_id="whd_1", received_at=NOW, body=body))
    assert await apply_all(db) == 1
    record = await read.get_run(db, "run_\ufffd\ufffd")
    assert record is not None
    assert record.run.error is not None
    assert (record.run.error.code, record.run.error.message) == ("a\ufffd", "\ufffd")
    assert await merge_timeline(db, record.run.run_id) == record.run


async def test_two_processes_apply_each_delivery_once(db: Database, other_db: Database) -> None:
    """Any number may apply at once: every effect is there once, on every run."""
    names = ids("run", 120)
    async with open_inbox(db) as inbox:
        for again in range(3):
            await asyncio.gather(
                *(
                    inbox.store(replace(delivery(run), delivery_id=f"whd_{run}_{again}"))
                    for run in names
                )
            )
    counted: list[int] = []

    def count(good: int, _: int) -> None:
        counted.append(good)

    async def none() -> bool:
        return await waiting(db) == 0

    async with AsyncExitStack() as stack:
        for one, limit in ((db, 7), (other_db, 11), (db, 13)):
            applier = open_applier(one, on_applied=count, max_group=limit)
            await stack.enter_async_context(applier)
            applier.wake()
        await eventually(none)
    assert sum(counted) == 360
    assert await how_many(db, run_events) == 120
    assert set((await outcomes(db)).values()) == {"applied"}


async def test_two_processes_need_no_turns_on_postgres(postgres_url: str) -> None:
    """What one has taken the other passes over; what a transaction took that came to nothing is
    applied by the next."""
    async with await Database.open(postgres_url) as db, open_inbox(db) as inbox:
        await asyncio.gather(*(inbox.store(delivery(run)) for run in ids("run", 4)))
        holder: Any = await asyncpg.connect(postgres_url)
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute(
            "SELECT FROM deliveries WHERE delivery_id <= 'whd_run_0001' FOR UPDATE"
        )
        assert await apply_all(db) == 2
        await transaction.rollback()
        await holder.close()
        assert await apply_all(db) == 2


async def test_what_an_older_receiver_wrote_is_done(db: Database) -> None:
    """A receiver of the version before writes applied rows: nobody applies them again, and they
    are counted like any other."""
    await keep(db, callback("run_1"))
    await keep(db, Delivered(delivery=delivery("run_2"), outcome=DeliveryOutcome.QUARANTINED))
    assert await apply_all(db) == 0
    async with open_inbox(db) as inbox:
        stored = await inbox.store(delivery("run_1", body=b"{}"))
    assert (stored.outcome, stored.repeated) == (DeliveryOutcome.APPLIED, True)
    assert await apply_all(db) == 0


async def test_only_its_own_workspace_may_end_a_run(
    inbox: TestInbox, writer: TestWriter, db: Database
) -> None:
    """A callback that another workspace signed is quarantined; where several signed it, it is not;
    and the first one of a new run makes it its own, within one group too."""
    await writer.submit(seen("run_1", facts={"workspace_id": "ws_a"}))
    for number, run in enumerate(("run_1", "run_2", "run_2")):
        one = delivery(run, body=body_of(run, workspace_id=f"ws_{'ab'[number % 2]}"))
        at = NOW + timedelta(seconds=number)
        await inbox.store(replace(one, delivery_id=f"whd_{number}", received_at=at))

    async def apply(*signers: str) -> Sequence[tuple[str, str]]:
        applier = applier_of(db, signers=frozenset(signers))
        done = await db.write(partial(applier.apply_waiting, 10, []))
        return done.quarantined

    quarantined = await apply("ws_b")
    assert [key for key, _ in quarantined] == ["whd_0"]
    assert "its run is of workspace ws_a" in quarantined[0][1]
    assert await outcomes(db) == {"whd_0": "quarantined", "whd_1": "applied", "whd_2": "applied"}
    await db.write(lambda connection: requeue(connection, delivery_of("whd_0", "run_1")))
    assert await apply("ws_b", "ws_a") == []


def delivery_of(delivery_id: str, run_id: str) -> Delivery:
    return replace(delivery(run_id), delivery_id=delivery_id)


# The applier


async def test_it_applies_what_its_process_stored_at_once(db: Database) -> None:
    """No look is waited for, and who waits for runs is told after the commit."""
    told: list[WriteOutcome] = []
    counted: list[tuple[int, int]] = []
    async with (
        open_applier(
            db,
            check_seconds=60.0,
            on_commit=[told.append],
            on_applied=lambda good, bad: counted.append((good, bad)),
        ) as applier,
        open_inbox(db, on_stored=applier.stored) as inbox,
    ):
        await inbox.store(delivery("run_1"))
        await inbox.store(Delivery(delivery_id="whd_odd", received_at=NOW, body=b"?"))

        async def both() -> bool:
            return await waiting(db) == 0

        await eventually(both)
    assert [outcome.changed_runs for outcome in told if outcome.changed_runs] == [["run_1"]]
    assert (sum(good for good, _ in counted), sum(bad for _, bad in counted)) == (1, 1)


async def test_what_a_dead_process_stored_is_found(db: Database) -> None:
    """At the start, and every second while others may die."""
    async with open_inbox(db) as inbox:
        await inbox.store(delivery("run_1"))
        async with open_applier(db, background=True):

            async def none() -> bool:
                return await waiting(db) == 0

            await eventually(none)
            await inbox.store(delivery("run_2"))
            await assert_takes_less(3, partial(eventually, none))


class BrokenWorkspaces(Workspaces):
    """Has a fault that one workspace's deliveries bring out."""

    def of(self, workspace_id: str | None) -> Workspace | None:
        if workspace_id == "ws_bad":
            raise RuntimeError("not today")
        return super().of(workspace_id)


async def test_what_cannot_be_applied_is_quarantined_alone(db: Database) -> None:
    """Whatever breaks on it, in the database or in the tracker, its neighbours are applied."""
    refused = ("run_0017", "run_0018")
    bad = {"run_0003", *refused}
    await refuse_runs(db, *refused)
    async with open_inbox(db) as inbox:
        bodies = {run: body_of(run) for run in ids("run", 40)}
        bodies["run_0003"] = body_of("run_0003", workspace_id="ws_bad")
        await asyncio.gather(
            *(inbox.store(delivery(run, body=body)) for run, body in bodies.items())
        )
    workspaces = BrokenWorkspaces([Workspace(place="default")], database=db, clock=lambda: NOW)
    applier = open_applier(db, workspaces=workspaces)
    assert await applier.drain() == 40
    found = await outcomes(db)
    assert {key for key, outcome in found.items() if outcome != "applied"} == {
        f"whd_{run}" for run in bad
    }
    row = await get_delivery(db, "whd_run_0003")
    assert row is not None
    assert row.reason == "it cannot be applied: RuntimeError: not today"
    assert await how_many(db, runs) == 37


async def test_a_database_that_is_away_blames_no_delivery(
    db: Database, faulty_db: FaultyDatabase
) -> None:
    """It is tried again, and nothing is quarantined."""
    async with open_inbox(db) as inbox:
        await inbox.store(delivery("run_1"))
    faulty_db.faults = repeat(StoreUnavailable("the database is away"), 3)
    async with open_applier(faulty_db) as applier:
        applier.wake()

        async def none() -> bool:
            return await waiting(db) == 0

        await eventually(none)
    assert next(faulty_db.faults, None) is None
    assert await outcomes(db) == {"whd_run_1": "applied"}


async def test_a_slow_database_applies_smaller_groups(postgres_url: str) -> None:
    """A group whose statements are each in time, and too slow together, is not tried for ever."""
    times = DatabaseTimes(statement=5.0, answer=1.0)
    async with (
        await Database.open(postgres_url, times=times) as db,
        open_inbox(db) as inbox,
    ):
        await asyncio.gather(*(inbox.store(delivery(run)) for run in ids("run", 100)))
        admin: Any = await asyncpg.connect(postgres_url)
        await admin.execute(
            """
            CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN PERFORM pg_sleep(0.007); RETURN NEW; END';
            CREATE TRIGGER slow BEFORE INSERT ON runs FOR EACH ROW EXECUTE FUNCTION slow();
            CREATE TRIGGER slow BEFORE UPDATE ON deliveries FOR EACH ROW EXECUTE FUNCTION slow();
            """
        )
        await admin.close()
        async with open_applier(db) as applier:
            applier.wake()

            async def none() -> bool:
                return await waiting(db) == 0

            await eventually(none)
    assert set((await _outcomes_at(postgres_url)).values()) == {"applied"}


async def test_a_locked_run_holds_up_its_own_delivery_alone(postgres_url: str) -> None:
    """While someone holds a run, callbacks of others are applied, and its own is afterwards."""
    async with (
        await Database.open(postgres_url, times=DatabaseTimes(lock=0.3)) as db,
        open_inbox(db) as inbox,
        open_writer(db) as writer,
    ):
        await writer.submit(seen("run_0002"))
        await asyncio.gather(*(inbox.store(delivery(run)) for run in ids("run", 5)))
        holder: Any = await asyncpg.connect(postgres_url)
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("SELECT FROM runs WHERE run_id = 'run_0002' FOR UPDATE")
        async with open_applier(db, held_up_seconds=1.0) as applier:
            applier.wake()

            async def others() -> bool:
                return await waiting(db) == 1

            await eventually(others)
            await transaction.rollback()

            async def none() -> bool:
                return await waiting(db) == 0

            await eventually(none)
        await holder.close()
    assert set((await _outcomes_at(postgres_url)).values()) == {"applied"}


async def _outcomes_at(url: str) -> dict[str, str]:
    async with await Database.open(url) as db:
        return await outcomes(db)


class Monotonic:
    """A monotonic clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def many_waiting(applier: Applier) -> AsyncIterator[None]:
    """Within the block a hundred callbacks wait at each commit of the inbox."""

    async def commit() -> None:
        while True:
            applier.stored(100)
            await asyncio.sleep(0.002)

    committing = asyncio.create_task(commit())
    try:
        yield
    finally:
        await cancel(committing)


async def test_applying_holds_back_while_many_wait_to_be_acknowledged(
    db: Database,
) -> None:
    """While a hundred wait at each commit one small group a second is applied; then the rest at
    once, in large ones."""
    groups: list[int] = []
    monotonic = Monotonic()
    applier = open_applier(
        db,
        monotonic=monotonic,
        max_group=30,
        busy_group=10,
        on_applied=lambda good, _: groups.append(good),
    )

    async def none() -> bool:
        return await waiting(db) == 0

    async with open_inbox(db) as inbox, applier:
        await asyncio.gather(*(inbox.store(delivery(run)) for run in ids("run", 100)))
        async with many_waiting(applier):
            for second in (1, 2, 3):
                await eventually(lambda second=second: len(groups) == second)
                monotonic.now += 0.75
                await asyncio.sleep(0.1)  # nothing happens: there is no condition to wait for
                assert groups == [10] * second
                monotonic.now += 0.25
        # The clock does not advance, and a pause of two seconds is allowed for.
        await assert_takes_less(4, partial(eventually, none))
    assert groups[:3] == [10] * 3
    assert max(groups) == 30
    assert sum(groups) == 100


async def test_a_busy_process_notifies_others(postgres_url: str) -> None:
    """At most ten times a second, over the channel that every long-running process listens to."""
    heard: list[str] = []
    monotonic = Monotonic()
    listener: Any = await asyncpg.connect(postgres_url)
    await listener.add_listener("tracker_inbox", lambda *notice: heard.append(notice[3]))
    async with await Database.open(postgres_url) as db:
        async with open_inbox(db) as inbox:
            await inbox.store(delivery("run_1"))
        async with open_applier(db, monotonic=monotonic) as applier, many_waiting(applier):
            for tenth in (1, 2, 3):
                await eventually(lambda tenth=tenth: len(heard) == tenth)
                monotonic.now += 0.0625
                await asyncio.sleep(0.1)  # nothing happens: there is no condition to wait for
                assert heard == [db.origin] * tenth
                monotonic.now += 0.0625
            await eventually(lambda: len(heard) == 4)
    await listener.close()


async def test_no_run_is_read_to_store(db: Database, inbox: TestInbox) -> None:
    """One statement, or a look and an insert, about deliveries alone."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    for engine in db.engines:
        event.listen(engine, "before_cursor_execute", note)
    await asyncio.gather(*(inbox.store(delivery(run)) for run in ids("run", 3)))
    for engine in db.engines:
        event.remove(engine, "before_cursor_execute", note)
    told = [one for one in sent if not one.startswith(("BEGIN", "PRAGMA"))]
    assert 1 <= len(told) <= 2 + 2 * (db.dialect == "sqlite")
    assert all("deliveries" in one and " runs" not in one for one in told)


async def test_large_bodies_are_applied_a_few_at_a_time(db: Database) -> None:
    """However many wait, only so many large bodies are in memory at once; all are applied."""
    large = b" " * SMALL_BODY
    groups: list[int] = []
    async with open_inbox(db) as inbox:
        for run in ids("run", MAX_LARGE + 8):
            await inbox.store(delivery(run, body=body_of(run) + large))
        await inbox.store(delivery("small"))
    applier = open_applier(db, on_applied=lambda good, _: groups.append(good))
    assert await applier.drain() == MAX_LARGE + 9
    assert groups == [MAX_LARGE + 1, 8]
    assert set((await outcomes(db)).values()) == {"applied"}


async def test_a_database_that_lets_nobody_write_blames_no_delivery(
    db: Database, faulty_db: FaultyDatabase
) -> None:
    """Whatever it says to everyone, a missing privilege for one, is reported and tried again; what
    it waits for stays whole."""
    async with open_inbox(db) as inbox:
        await inbox.store(delivery("run_1"))
    faulty_db.faults = repeat(StoreError("the database refuses this: permission denied"))
    async with open_applier(faulty_db) as applier:
        applier.wake()
        await eventually(lambda: faulty_db.tried >= 3)
        assert await outcomes(db) == {"whd_run_1": "waiting"}
        faulty_db.faults = iter(())

        async def none() -> bool:
            return await waiting(db) == 0

        await eventually(none)
    assert await outcomes(db) == {"whd_run_1": "applied"}
