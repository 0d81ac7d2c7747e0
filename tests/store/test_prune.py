"""Retention: what is old goes with all that hangs on it, what is still needed stays."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, case, insert, select, update

from tests.store.making import (
    NOW,
    TestWriter,
    apply_all,
    body_of,
    callback,
    ids,
    open_inbox,
    open_writer,
    quarantined,
    receipts,
    seen,
    started,
)
from tests.store.test_rollups import counted, stored_rollups
from tests.support.deliveries import Delivered
from tests.support.started import of_start
from tests.support.waiting import steady_clock
from tracker.core.errors import InvalidRequest
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, DeliveryOutcome, Entry, FailedRead, Observed
from tracker.core.rollup import STATE
from tracker.core.run import Output, RunStatus
from tracker.operations.retention import TABLES, Ages, Pruner, ages
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.queries import starts, sweeps
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.deliveries import get_delivery, requeue
from tracker.store.queries.starts import StartState
from tracker.store.queries.sweeps import Interval
from tracker.store.schema import (
    batch_rows,
    batches,
    deliveries,
    endpoints,
    message_attempts,
    messages,
    metadata,
    run_events,
    run_outputs,
    run_tallies,
    runs,
)
from tracker.store.schema import starts as start_table
from tracker.store.writing import retention, rollups
from tracker.store.writing.retention import ListedRun

DAY = timedelta(days=1)
AGES = Ages(runs=90 * DAY, bodies=30 * DAY)
BILLED = timedelta(minutes=2)
"""How long after its end a run was read."""
NOTHING = dict.fromkeys(TABLES, 0)


async def no_pause(_: float) -> None:
    """Others may go on all the same."""
    await asyncio.sleep(0)


def pruner(db: Database, **options: Any) -> Pruner:
    """One that does not rest, by a clock that stands still."""
    return Pruner(database=db, **{"clock": lambda: NOW, "sleep": no_pause, **options})


def settled(run_id: str, days: float, **facts: Any) -> list[Entry | Delivered]:
    """A run that was started, called back and read so many days ago."""
    at = NOW - days * DAY
    whole = {
        "created_at": at,
        "completed_at": at,
        "charged_cost": Decimal("0.5"),
        "outputs": (Output("a", "text", "one"), Output("b", "text", "two")),
    }
    return [
        started(run_id, at=at, facts={"workspace_id": "ws_1"}),
        callback(run_id, at=at, body=b"as it came"),
        seen(run_id, RunStatus.COMPLETED, at=at + BILLED, facts=whole | facts),
    ]


async def put(writer: TestWriter, *entries: Sequence[Entry | Delivered]) -> None:
    """One after the other."""
    for some in entries:
        for entry in some:
            await writer.submit(entry)


async def kept(db: Database, table: Any = runs, column: str = "run_id") -> set[Any]:
    """The ids that a table has."""
    async with db.read() as connection:
        return set((await connection.execute(select(table.c[column]))).scalars())


async def assert_no_orphans(db: Database) -> None:
    """Nothing is left of a run that is gone, and none is half."""
    here = await kept(db)
    for table in (run_outputs, run_events, deliveries):
        assert await kept(db, table) <= here
    assert await kept(db, run_outputs) == here


async def test_an_old_run_goes_with_all_that_hangs_on_it(writer: TestWriter, db: Database) -> None:
    """Outputs, timeline and callback go with the run, a younger one keeps its own; counting says
    the same without removing anything, and a second time there is nothing to do."""
    await put(writer, settled("old", 91), settled("young", 89))
    expected = {
        "runs": 1,
        "run_outputs": 2,
        "run_events": 3,
        "deliveries": 1,
        "bodies": 2,
        "starts": 0,
        "messages": 0,
        "message_attempts": 0,
        "sweeps": 0,
        "audit": 0,
    }
    assert await pruner(db).prune(AGES, dry=True) == expected
    assert await kept(db) == {"old", "young"}
    assert await pruner(db).prune(AGES) == expected
    assert await kept(db) == {"young"}
    await assert_no_orphans(db)
    assert await pruner(db).prune(AGES) == NOTHING


async def test_what_is_not_settled_stays(writer: TestWriter, db: Database) -> None:
    """A run that is still to be read, one that FLORA denies, and one that settled only lately are
    kept, however long ago they began."""
    then = NOW - 400 * DAY
    await writer.submit(started("active", at=then))
    await writer.submit(started("lost", at=then))
    for hour in range(5):
        at = then + timedelta(hours=hour)
        await writer.submit(FailedRead(run_id="lost", at=at, error="no such run", missing=True))
    await writer.submit(callback("ended", at=then))  # nobody has read how it ended
    late = {"created_at": then, "charged_cost": Decimal(1)}
    await writer.submit(seen("late", RunStatus.COMPLETED, at=NOW - DAY, facts=late))
    for dry in (True, False):
        assert (await pruner(db).prune(AGES, dry=dry))["runs"] == 0
    assert await kept(db) == {"active", "lost", "ended", "late"}


@pytest.mark.one_database("sqlite")
async def test_rollups_stay_true(writer: TestWriter, db: Database) -> None:
    """States no longer count what is gone, as a recount finds too; the hours and days keep it."""
    await put(writer, *(settled(run, 100) for run in ids("old", 5)), settled("young", 1))
    history = {key: n for key, n in (await stored_rollups(db)).items() if key.measure != STATE}
    await pruner(db).prune(AGES)

    def states(found: dict[Any, Any]) -> dict[Any, Any]:
        return {key: n for key, n in found.items() if key.measure == STATE}

    assert states(await stored_rollups(db)) == states(await counted(db))
    assert [n for n, _ in states(await stored_rollups(db)).values()] == [1]
    for _ in range(2):
        assert {
            k: n for k, n in (await stored_rollups(db)).items() if k.measure != STATE
        } == history
        await rollups.recount(db)


async def test_the_rollups_of_what_is_gone_do_not_pile_up(writer: TestWriter, db: Database) -> None:
    """However many transactions it takes, they leave one note for each hour of what they removed:
    who counts anew has to know that, and no more."""
    of_one_hour = [settled(f"old_{n}", 100 + n / 1440) for n in range(1, 46)]
    await writer.submit_all([entry for entries in of_one_hour for entry in entries])
    pauses: list[float] = []

    async def count(seconds: float) -> None:
        pauses.append(seconds)

    assert (await pruner(db, sleep=count).prune(AGES))["runs"] == 45
    assert len(pauses) >= 2
    since = run_tallies.c.since
    async with db.read() as connection:
        notes = select(since).where(run_tallies.c.measure == rollups.PRUNED)
        [until] = await connection.scalars(notes)
    last = NOW - 100 * DAY - timedelta(minutes=1)
    assert until == last.replace(minute=0, second=0, microsecond=0)


async def test_a_callback_without_its_body_is_still_recognised(
    writer: TestWriter, db: Database
) -> None:
    """The body goes first; a repetition then only counts, and says nothing new of its run."""
    await put(writer, settled("run_1", 31), settled("run_2", 29))
    assert await pruner(db).prune(AGES) == NOTHING | {"bodies": 1}
    row = await get_delivery(db, "whd_run_1")
    assert row is not None
    assert (row.body, row.body_removed_at) == (None, NOW)
    other = await get_delivery(db, "whd_run_2")
    assert other is not None
    assert (other.body, other.body_removed_at) == (b"as it came", None)
    async with open_inbox(db) as inbox:
        stored = await inbox.store(callback("run_1", at=NOW, body=b"as it came").delivery)
    assert stored.repeated
    assert await apply_all(db) == 0
    assert (await receipts(db))["whd_run_1"] == 2
    assert len(await read.events(db, "run_1")) == 3


async def test_quarantined_callbacks_go_only_where_that_is_asked_for(
    writer: TestWriter, db: Database
) -> None:
    """Nobody has understood them yet, so they keep their bodies until someone says otherwise."""
    await writer.submit(quarantined("whd_old", at=NOW - 400 * DAY))
    await writer.submit(quarantined("whd_young", at=NOW - 100 * DAY))
    assert await pruner(db).prune(AGES) == NOTHING
    asked = Ages(runs=AGES.runs, bodies=AGES.bodies, quarantined=365 * DAY)
    expected = NOTHING | {"deliveries": 1, "bodies": 1}
    assert await pruner(db).prune(asked, dry=True) == expected
    assert await pruner(db).prune(asked) == expected
    assert await kept(db, deliveries, "delivery_id") == {"whd_young"}


async def test_a_callback_that_came_again_lately_outlives_its_run(
    writer: TestWriter, db: Database
) -> None:
    """As long as FLORA may repeat it, it is known; later it goes too."""
    await put(writer, settled("run_1", 100), [callback("run_1", at=NOW - DAY)])
    assert (await pruner(db).prune(AGES))["deliveries"] == 0
    assert await kept(db) == set()
    async with open_inbox(db) as inbox:
        assert (await inbox.store(callback("run_1", at=NOW).delivery)).repeated
    much_later = pruner(db, clock=lambda: NOW + 91 * DAY)
    expected = NOTHING | {"deliveries": 1}
    assert await much_later.prune(AGES, dry=True) == expected
    assert await much_later.prune(AGES) == expected


@pytest.mark.one_database("sqlite")
async def test_broken_off_anywhere_it_is_gone_on_with(writer: TestWriter, db: Database) -> None:
    """After whichever transaction it ends, no run is half, and the next one does the rest."""

    class Interrupted(Exception):
        pass

    async def once(_: float) -> None:
        raise Interrupted

    await put(writer, *(settled(run, 100 + n) for n, run in enumerate(ids("old", 40))))
    await put(writer, *(settled(run, 40) for run in ids("younger", 3)))
    times = 0
    while True:
        try:
            await pruner(db, sleep=once).prune(AGES)
        except Interrupted:
            times += 1
            await assert_no_orphans(db)
        else:
            break
    assert times >= 3
    assert await kept(db) == set(ids("younger", 3))
    assert await stored_rollups(db) != {}
    assert [n for k, (n, _) in (await stored_rollups(db)).items() if k.measure == STATE] == [3]


async def test_several_at_once_and_a_receiver_meanwhile(db: Database, other_db: Database) -> None:
    """Each row is removed once, whoever comes first; callbacks are taken all the while."""
    old = ids("old", 80)
    async with open_writer(other_db) as writer:
        for step in zip(*(settled(run, 100) for run in old), strict=True):
            await writer.submit_all(step)
        done = asyncio.Event()
        slowest = 0.0

        async def receive() -> int:
            nonlocal slowest
            number = 0
            async with steady_clock() as clock:
                while not done.is_set():
                    began = clock()
                    await writer.submit(callback(f"new_{number}", at=NOW))
                    slowest = max(slowest, clock() - began)
                    number += 1
            return number

        receiving = asyncio.create_task(receive())
        counts = await asyncio.gather(
            pruner(db, sleep=asyncio.sleep).prune(AGES),
            pruner(other_db, sleep=asyncio.sleep).prune(AGES),
        )
        done.set()
        received = await receiving
    assert sum(one["runs"] for one in counts) == len(old)
    assert sum(one["run_events"] for one in counts) == 3 * len(old)
    assert sum(one["bodies"] for one in counts) == len(old)
    assert await kept(db) == {f"new_{number}" for number in range(received)}
    assert received >= 5
    assert slowest < 2


async def test_what_someone_holds_is_left_for_the_next_time(postgres_url: str) -> None:
    """A run or a callback that is locked is not waited for, and goes later."""
    async with await Database.open(postgres_url) as db, open_writer(db) as writer:
        await put(writer, settled("held", 100), settled("free", 100), settled("known", 100))
        owner: Any = await asyncpg.connect(postgres_url)
        async with owner.transaction():
            await owner.execute("SELECT FROM runs WHERE run_id = 'held' FOR UPDATE")
            await owner.execute("SELECT FROM deliveries WHERE delivery_id = 'whd_known' FOR UPDATE")
            counts = await pruner(db).prune(AGES)
            assert (counts["runs"], counts["deliveries"]) == (2, 1)
        await owner.close()
        counts = await pruner(db).prune(AGES)
        assert (counts["runs"], counts["deliveries"]) == (1, 2)


async def test_a_recount_meanwhile_does_not_end_it(postgres_url: str) -> None:
    """While all runs are counted anew nobody compacts what changed, and all that is old goes."""
    async with await Database.open(postgres_url) as db, open_writer(db) as writer:
        await put(writer, settled("run_1", 100), settled("run_2", 40))
        counting: Any = await asyncpg.connect(postgres_url)
        async with counting.transaction():
            await counting.execute("LOCK TABLE run_tallies IN SHARE ROW EXCLUSIVE MODE")
            counts = await pruner(db).prune(AGES)
        await counting.close()
        assert (counts["runs"], counts["bodies"]) == (1, 2)
        assert [n for k, (n, _) in (await stored_rollups(db)).items() if k.measure == STATE] == [1]


async def test_a_body_that_someone_holds_goes_the_next_time(postgres_url: str) -> None:
    """Those that came after it go at once, and yet it is looked for again."""
    async with await Database.open(postgres_url) as db, open_writer(db) as writer:
        await put(writer, settled("held", 40), *(settled(run, 35) for run in ids("free", 30)))
        owner: Any = await asyncpg.connect(postgres_url)
        async with owner.transaction():
            await owner.execute("SELECT FROM deliveries WHERE delivery_id = 'whd_held' FOR UPDATE")
            assert await pruner(db).prune(AGES) == NOTHING | {"bodies": 30}
        await owner.close()
        assert await pruner(db).prune(AGES) == NOTHING | {"bodies": 1}


async def test_the_body_of_a_late_replay_goes_too(writer: TestWriter, db: Database) -> None:
    """A callback that was in quarantine when the bodies of its time went loses its own the next
    time, however old it is."""
    held_back = quarantined("whd_late", at=NOW - 60 * DAY, body=body_of("run_2"))
    await writer.submit(held_back)
    await put(writer, settled("run_1", 35))
    assert await pruner(db).prune(AGES) == NOTHING | {"bodies": 1}
    await db.write(lambda connection: requeue(connection, held_back.delivery))
    assert await apply_all(db) == 1
    assert await pruner(db).prune(AGES) == NOTHING | {"bodies": 1}
    row = await get_delivery(db, "whd_late")
    assert row is not None
    assert (row.body, row.body_removed_at) == (None, NOW)
    assert await pruner(db).prune(AGES) == NOTHING


async def test_what_is_not_applied_yet_is_spared(writer: TestWriter, db: Database) -> None:
    """However old it is, a delivery that waits is kept whole, and so is what it will be needed for;
    once it is applied its body goes the next time."""
    waits = Delivered(
        delivery=Delivery(
            delivery_id="whd_waits",
            received_at=NOW - 400 * DAY,
            body=body_of("run_2"),
            run_id="run_2",
        ),
        outcome=DeliveryOutcome.WAITING,
    )
    await writer.submit(waits)
    await put(writer, settled("run_1", 35))
    assert await pruner(db).prune(AGES) == NOTHING | {"bodies": 1}
    row = await get_delivery(db, "whd_waits")
    assert row is not None
    assert (row.outcome, row.body) == (DeliveryOutcome.WAITING, waits.delivery.body)
    assert await apply_all(db) == 1
    assert await pruner(db).prune(AGES) == NOTHING | {"bodies": 1}


async def _start(
    db: Database, writer: TestWriter, key: str, run_id: str | None, at: datetime
) -> None:
    await starts.reserve(
        db,
        starts.StartRow(
            workspace_id="default",
            idempotency_key=key,
            technique_id="tech_1",
            fingerprint="print",
            inputs=[{"id": "prompt", "type": "text", "value": "secret"}],
            created_at=at,
        ),
    )
    if run_id is not None:
        first = Observation(run_id=run_id, source=Source.START, at=at)
        await writer.submit(of_start(Observed(observation=first), idempotency_key=key))


async def test_what_was_asked_for_goes_but_not_that_it_was(
    writer: TestWriter, db: Database
) -> None:
    """A key is known for good, so that nothing is paid twice; its inputs go with its run."""
    await _start(db, writer, "row-1", "run_1", NOW - 100 * DAY)
    await put(writer, settled("run_1", 100))
    await pruner(db).prune(AGES)
    row = await starts.get(db, "default", "row-1")
    assert row is not None
    assert (row.state, row.run_id, row.fingerprint, row.inputs) == (
        StartState.STARTED,
        "run_1",
        "print",
        [],
    )


async def test_keys_go_only_where_that_is_asked_for(writer: TestWriter, db: Database) -> None:
    """Then those go that are old enough and came to an end of which nothing is here: not that of a
    run that stays, of a start in doubt, or of a batch's row, which would be started again."""
    asked = Ages(runs=AGES.runs, bodies=AGES.bodies, keys=365 * DAY)
    assert await pruner(db).prune(asked) == NOTHING
    for key, run_id, days in (
        ("gone-1", "run_1", 400),
        ("gone-2", "run_2", 400),
        ("young", "run_3", 100),
        ("row", "run_4", 400),
        ("active", "run_5", 400),
        ("refused", None, 400),
        ("open", None, 800),
    ):
        await _start(db, writer, key, run_id, NOW - days * DAY)
        if run_id is not None and key != "active":
            await put(writer, settled(run_id, days))
    refused = update(start_table).where(start_table.c.idempotency_key == "refused")
    batch = {"batch_id": "b", "workspace_slot": "default", "technique_id": "tech_1", "name": "b"}
    row = {"batch_id": "b", "position": 1, "line": 2, "row_digest": "d", "generation": 0}

    def prepare(connection: Any) -> None:
        connection.execute(refused.values(state="refused", technique_id="tech_0"))
        connection.execute(insert(batches).values(**batch, created_at=NOW))
        connection.execute(insert(batch_rows).values(**row, attempt=1, idempotency_key="row"))

    await db.write(prepare)
    assert (await pruner(db).prune(AGES))["starts"] == 0
    for dry in (True, False):
        assert await pruner(db).prune(asked, dry=dry) == NOTHING | {"starts": 3}
    left = await kept(db, start_table, "idempotency_key")
    assert left == {"young", "row", "active", "open"}


@pytest.mark.parametrize("page", [1, 2, 100])
async def test_keys_are_walked_through_to_the_end(
    writer: TestWriter, db: Database, page: int
) -> None:
    """However many techniques there are, and however many starts of one moment lie on a page."""
    for number in range(7):
        await _start(db, writer, f"key-{number}", None, NOW - (400 + number // 3) * DAY)
    technique = case((start_table.c.idempotency_key < "key-3", "tech_0"), else_="tech_2")
    refused = update(start_table).values(state="refused", technique_id=technique)
    await db.write(lambda connection: connection.execute(refused).rowcount)
    asked = Ages(runs=AGES.runs, bodies=AGES.bodies, keys=365 * DAY)
    for dry in (True, False):
        assert (await pruner(db, page=page).prune(asked, dry=dry))["starts"] == 7
    assert await kept(db, start_table, "idempotency_key") == set()


async def test_a_run_that_an_unresolved_start_may_be_stays(
    writer: TestWriter, db: Database
) -> None:
    """While nobody knows which run a start became, those of its technique and time are kept."""
    await _start(db, writer, "unclear", None, NOW - 100 * DAY)
    unresolved = update(start_table).values(state="unresolved", sent_at=NOW - 100 * DAY)
    await db.write(lambda connection: connection.execute(unresolved).rowcount)
    await put(
        writer,
        settled("perhaps", 100, technique_id="tech_1"),
        settled("unknown", 100),
        settled("another", 100, technique_id="tech_2"),
        settled("earlier", 110, technique_id="tech_1"),
    )
    assert (await pruner(db).prune(AGES, dry=True))["runs"] == 2
    assert (await pruner(db).prune(AGES))["runs"] == 2
    assert await kept(db) == {"perhaps", "unknown"}


async def swept(db: Database, days: float, workspace_id: str | None = "ws_1", **how: Any) -> int:
    """A sweep of so many days ago."""
    at = NOW - days * DAY
    number = await sweeps.begin(db, workspace_id, at)
    figures = dict.fromkeys(("pages", "items", "discovered", "repaired"), 0)
    await sweeps.finish(db, number, at=at, **figures, **how)
    return number


async def test_the_sweeps_on_which_something_rests_stay(db: Database) -> None:
    """Old ones go; of each workspace the last, the last complete, and those that say how far the
    history is here do not."""
    failed = {"error": "FLORA answered 503"}
    gone = [await swept(db, 199, through=NOW - 200 * DAY), await swept(db, 198, **failed)]
    generations = await swept(db, 197, generations_through=NOW - 197 * DAY)
    through = await swept(db, 196, through=NOW - 196 * DAY)
    complete = await swept(db, 195)
    gone.append(await swept(db, 194, **failed))
    last = await swept(db, 193, **failed)
    unknown = await swept(db, 192, None, through=NOW)
    young = await swept(db, 1, "ws_2"), await swept(db, 0.5, "ws_2")
    assert (await pruner(db).prune(AGES, dry=True))["sweeps"] == len(gone)
    assert (await pruner(db).prune(AGES))["sweeps"] == len(gone)
    assert {row.id for row in await sweeps.list_sweeps(db)} == {
        generations,
        through,
        complete,
        last,
        unknown,
        *young,
    }


async def test_how_far_it_has_been_is_known(writer: TestWriter, db: Database) -> None:
    """What is older than a removed run of its workspace, lies where the history was read, and is
    not here, has been removed."""
    then = NOW - 100 * DAY
    assert (await retention.find_removed(db, [ListedRun("run_1", "ws_1", then)]))[0] == set()
    await put(writer, settled("run_1", 100), [started("here", at=then)])
    await pruner(db).prune(AGES)
    said = [
        ListedRun("run_1", "ws_1", then),
        ListedRun("unswept", "ws_1", then, "generation"),
        ListedRun("older", "ws_1", then - DAY),
        ListedRun("never_read", "ws_1", then - 3 * DAY),
        ListedRun("younger", "ws_1", then + timedelta(seconds=1)),
        ListedRun("elsewhere", "ws_2", then),
        ListedRun("here", "ws_1", then),
    ]
    assert (await retention.find_removed(db, said))[0] == set()
    first = Interval(from_at=then - 2 * DAY, to_at=then - DAY, read_at=NOW)
    await coverage.add(db, "ws_1", "technique", first)
    assert (await retention.find_removed(db, said))[0] == {"older"}
    await coverage.add(db, "ws_1", "technique", replace(first, from_at=first.to_at, to_at=NOW))
    assert (await retention.find_removed(db, said))[0] == {"run_1", "older"}


async def test_the_mark_never_goes_back(writer: TestWriter, db: Database) -> None:
    """Who prunes less far later changes nothing of what was removed."""
    await put(writer, settled("run_1", 100), settled("run_2", 200))
    await pruner(db).prune(AGES)
    await put(writer, settled("run_3", 300))
    await pruner(db).prune(AGES)
    assert await retention.marks(db, "runs") == {"ws_1": NOW - 100 * DAY}


async def test_old_messages_go_and_pending_ones_stay(db: Database) -> None:
    """Delivered and failed messages go by age, with their attempts; pending ones stay, except those
    of an endpoint that was removed from all settings as long ago."""
    old, late = NOW - 100 * DAY, NOW - DAY

    def message(name: str, endpoint_id: str = "shop", **more: Any) -> dict[str, Any]:
        times = {"event_at": old, "created_at": old, "last_attempt_at": old}
        kind = {"event": "run.settled", "run_id": "run_1", "body": "{}", "attempts": 1}
        ids = {"message_id": name, "event_id": name, "endpoint_id": endpoint_id}
        pending = {"state": "pending", "next_attempt_at": NOW, "delivered_at": None}
        return ids | kind | times | pending | more

    delivered = {"state": "delivered", "delivered_at": old, "next_attempt_at": None}
    rows = [
        message("delivered", **delivered),
        message("delivered late", **delivered | {"last_attempt_at": late}),
        message("failed", state="failed", next_attempt_at=None),
        message("new", **delivered | {"created_at": late}),
        message("pending"),
        message("nobody's", "gone"),
    ]
    at = {"url": "https://a.example", "events": [], "filters": {}, "since": old, "state": "enabled"}
    known = [
        {"endpoint_id": "shop", "configured_at": late} | at,
        {"endpoint_id": "gone", "configured_at": old} | at,
    ]
    attempts = [
        {"message_id": row["message_id"], "number": 1, "at": old, "seconds": 1} for row in rows
    ]

    def add(connection: Connection) -> None:
        connection.execute(insert(endpoints), known)
        connection.execute(insert(messages), rows)
        connection.execute(insert(message_attempts), attempts)

    await db.write(add)
    dry = await pruner(db).prune(AGES, dry=True)
    assert await pruner(db).prune(AGES) == dry
    assert (dry["messages"], dry["message_attempts"]) == (3, 3)
    async with db.read() as connection:
        left = (await connection.execute(select(messages.c.message_id))).scalars()
        assert set(left) == {"delivered late", "new", "pending"}


def test_every_table_is_considered() -> None:
    """A new table has to say what retention makes of it, here and in docs/retention.md."""
    removed = {name for name in TABLES if name != "bodies"}
    kept_for_good = {
        "batches",
        "batch_rows",
        "techniques",
        "leases",
        "workspace_keys",
        "retention",
        "history_coverage",
        "run_tallies",
        "run_tally_changes",
        "endpoints",
    }
    kept_for_good.add("sessions")  # each sign-in removes those that are over
    kept_for_good.add("outbox")  # emptied as soon as its messages are made
    assert set(metadata.tables) == removed | kept_for_good


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"older_than": timedelta(hours=23)}, "--older-than must be at least 1d"),
        ({"older_than": 6 * DAY}, r"TRACKER_HISTORY_SINCE \(7d\)"),
        ({"bodies": timedelta(hours=1)}, "--bodies-older-than must be at least 1d"),
        ({"bodies": 91 * DAY}, "must not be longer than --older-than"),
        ({"quarantined": timedelta(0)}, "--quarantined-older-than must be at least 1d"),
        ({"keys": 89 * DAY}, "--keys-older-than must not be shorter than --older-than"),
    ],
)
def test_unsound_ages_are_refused(given: dict[str, timedelta], said: str) -> None:
    """What could still be asked for, or would be looked for again, is not removed."""
    asked = {"older_than": 90 * DAY, "bodies": None, "quarantined": None, "keys": None} | given
    with pytest.raises(InvalidRequest, match=said):
        ages(**asked, first_sweep=7 * DAY)  # type: ignore[arg-type]


def test_bodies_go_after_a_month_by_themselves() -> None:
    """Or with their runs, where those go sooner."""
    for days, bodies in ((90, 30), (10, 10)):
        chosen = ages(days * DAY, bodies=None, quarantined=None, keys=None, first_sweep=7 * DAY)
        assert chosen == Ages(runs=days * DAY, bodies=bodies * DAY)
