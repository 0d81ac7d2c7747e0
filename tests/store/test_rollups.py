"""The rollups are exactly what counting all runs gives, whatever happened to the runs."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, func, insert, select, update

from tests.store.making import (
    NOW,
    TestWriter,
    as_entry,
    callback,
    ids,
    observations,
    open_writer,
    seen,
    started,
)
from tests.support.faulty import FaultyDatabase
from tests.support.forked import run_python
from tests.support.logs import capture_logs
from tests.support.started import of_start
from tests.support.waiting import eventually
from tracker.core.observation import Observation, Source
from tracker.core.record import Entry, FailedRead, Record
from tracker.core.rollup import ALWAYS, RollupKey, facts
from tracker.core.run import RunStatus, Tracking
from tracker.store import migrate
from tracker.store.engine import Database, migration_engine
from tracker.store.queries import audit
from tracker.store.queries.audit import Action
from tracker.store.queries.runs import RUN_COLUMNS, records
from tracker.store.schema import audit as audit_table
from tracker.store.schema import (
    deliveries,
    run_events,
    run_outputs,
    run_tallies,
    run_tally_changes,
    runs,
)
from tracker.store.url import DatabaseUrl
from tracker.store.writing import rollups
from tracker.store.writing.rollups import FACTS, PRUNED, ROLLUPS, RollupCompactor
from tracker.store.writing.statements import ShownByFlora, forget_run

ROOT = Path(__file__).parents[2]
Counts = dict[RollupKey, tuple[int, int]]
RUNS = ids("run", 4)


RESERVED: dict[str, Any] = {
    "tags": {"team": "red", "order": '12=3 "x"'},
    "reserved_at": NOW - timedelta(days=1),
    "reserved_cost": Decimal("0.31"),
}


async def stored_rollups(db: Database) -> Counts:
    """What a reader sees."""
    key = [ROLLUPS.c[name] for name in RollupKey._fields]
    statement = (
        select(*key, func.sum(ROLLUPS.c.runs), func.sum(ROLLUPS.c.amount))
        .where(ROLLUPS.c.measure != PRUNED)
        .group_by(*key)
    )
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
    return {RollupKey(*row[:7]): (int(row[7]), int(row[8])) for row in rows if any(row[7:])}


async def counted(db: Database) -> Counts:
    """What the view `run_facts` makes of the rows of `runs`."""
    key = [FACTS.c[name] for name in RollupKey._fields]
    statement = select(*key, func.count(), func.sum(FACTS.c.amount)).group_by(*key)
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
    return {RollupKey(*row[:7]): (int(row[7]), int(row[8])) for row in rows}


def summed(records: Iterable[Record]) -> Counts:
    """What the core makes of these records."""
    found: Counts = {}
    for record in records:
        for key, amount in facts(record):
            count, so_far = found.get(key, (0, 0))
            found[key] = (count + 1, so_far + amount)
    return found


async def all_records(db: Database) -> list[Record]:
    """Every run."""
    async with db.read() as connection:
        rows = (await connection.execute(select(*RUN_COLUMNS))).all()
        return await connection.run_sync(records, rows)


async def assert_exact(db: Database) -> Counts:
    """All three ways of counting agree."""
    records = await all_records(db)
    expected = summed(records)
    assert await counted(db) == expected
    assert await stored_rollups(db) == expected
    return expected


async def rows_in(db: Database, table: Any) -> int:
    async with db.read() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


_unseen = st.builds(
    FailedRead,
    run_id=st.sampled_from(RUNS),
    at=st.integers(0, 4).map(lambda hours: NOW + timedelta(hours=hours)),
    error=st.just("no such run"),
    missing=st.just(True),
)
_entries: st.SearchStrategy[list[Any]] = st.lists(
    st.one_of(
        st.sampled_from(RUNS).flatmap(observations),
        st.sampled_from(RUNS).flatmap(observations),
        _unseen,
        st.just("compact"),
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.one_database("sqlite")
@pytest.mark.timeout(180)
@settings(
    max_examples=max(4, settings().max_examples // 8),  # each writes for a while
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(history=_entries)
async def test_any_history_is_counted_exactly(db: Database, history: list[Any]) -> None:
    """Ends that are contradicted, workspaces that are learnt late, runs that are lost and come
    back: compacted in between or not, the rollups are what the runs count for."""
    for table in (runs, deliveries, run_tallies, run_tally_changes):
        await db.write(lambda connection, table=table: connection.execute(delete(table)).rowcount)
    async with open_writer(db, max_group=3) as writer:
        for each in history:
            if each == "compact":
                await rollups.compact(db)
            elif isinstance(each, Observation):
                ours = each.source is Source.START
                await writer.submit(
                    of_start(as_entry(each), **RESERVED) if ours else as_entry(each)
                )
            else:
                await writer.submit(each)
    await assert_exact(db)
    await rollups.compact(db)
    assert await rows_in(db, run_tally_changes) == 0
    expected = await assert_exact(db)
    await rollups.recount(db)
    assert await stored_rollups(db) == expected


async def test_a_lost_run_that_comes_back_counts_once(writer: TestWriter, db: Database) -> None:
    """A state is left when another is entered."""
    await writer.submit(started("run_1"))
    for hour in range(5):
        at = NOW + timedelta(hours=hour)
        await writer.submit(FailedRead(run_id="run_1", at=at, error="no such run", missing=True))
    assert [each.word for each in await stored_rollups(db)] == [Tracking.LOST]
    await writer.submit(seen("run_1", at=NOW + timedelta(hours=9)))
    assert [
        (key.status, key.word, runs) for key, (runs, _) in (await stored_rollups(db)).items()
    ] == [("running", "active", 1)]
    await assert_exact(db)


async def test_a_forgotten_run_counts_for_nothing(writer: TestWriter, db: Database) -> None:
    """A run that FLORA never showed, a lost one, and by force a billed one leave no row and no
    count behind; one that FLORA shows stays unless it is forced."""
    entry = audit.entry(Action.FORGET, NOW)
    await writer.submit(seen("shown", RunStatus.COMPLETED, facts={"charged_cost": Decimal(2)}))
    await writer.submit(seen("typo", source=Source.TRACK))
    await writer.submit(of_start(started("lost"), **RESERVED))
    for hour in range(5):
        at = NOW + timedelta(hours=hour)
        await writer.submit(FailedRead(run_id="lost", at=at, error="no such run", missing=True))
    await rollups.compact(db)
    with pytest.raises(ShownByFlora):
        await forget_run(db, "shown", force=False, entry=entry)
    for left, run_id in ((2, "typo"), (1, "lost"), (0, "shown")):
        found = await forget_run(db, run_id, force=run_id == "shown", entry=entry)
        assert found is not None
        assert len(await all_records(db)) == left
        await assert_exact(db)
    for table in (run_events, run_outputs):
        assert await rows_in(db, table) == 0
    assert await forget_run(db, "typo", force=True, entry=entry) is None
    assert await rows_in(db, audit_table) == 3


async def test_a_late_callback_is_no_missed_one(writer: TestWriter, db: Database) -> None:
    """A run whose end was polled misses its callback until it comes; then it came late."""
    outcomes = []
    for entry in (started("run_1"), seen("run_1", RunStatus.COMPLETED), callback("run_1")):
        await writer.submit(entry)
        outcomes.append([key.word for key in await stored_rollups(db) if key.measure == "callback"])
    assert outcomes == [[], ["missed"], ["late"]]
    await assert_exact(db)


async def test_a_contradicted_end_moves(writer: TestWriter, db: Database) -> None:
    """What a callback said to have completed and the API calls failed is counted as failed."""
    await writer.submit(started("run_1"))
    await writer.submit(callback("run_1", status=RunStatus.COMPLETED))
    await writer.submit(seen("run_1", RunStatus.FAILED, facts={"charged_cost": Decimal("0.25")}))
    found = await stored_rollups(db)
    assert {(key.measure, key.status) for key in found if key.status} == {
        ("state", "failed"),
        ("end", "failed"),
        ("cost", "failed"),
        ("failure", "failed"),
        ("spent", "charged"),
    }
    assert [amount for key, (_, amount) in found.items() if key.measure == "cost"] == [250_000_000]
    await assert_exact(db)


@pytest.mark.one_database("postgres")
async def test_writers_and_compactors_at_once_lose_nothing(
    db: Database, other_db: Database
) -> None:
    """Two processes write and compact as they like: nothing counts twice, nothing is left out."""
    names = ids("run", 60)

    async def write(writer: TestWriter, order: list[str], status: RunStatus) -> None:
        for run_id in order:
            await writer.submit(seen(run_id, status, facts={"technique_id": run_id[-1]}))

    async def compact_often(where: Database, done: asyncio.Event) -> None:
        while not done.is_set():
            await rollups.compact(where)

    done = asyncio.Event()
    async with open_writer(db) as one, open_writer(other_db) as two:
        compacting = [asyncio.create_task(compact_often(where, done)) for where in (db, other_db)]
        await asyncio.gather(
            *(write(one, names[at::3], RunStatus.RUNNING) for at in range(3)),
            *(write(two, names[::-1][at::3], RunStatus.COMPLETED) for at in range(3)),
        )
        done.set()
        await asyncio.gather(*compacting)
    assert sum(runs for key, (runs, _) in (await assert_exact(db)).items() if not key.bucket)
    await rollups.compact(db)
    await assert_exact(db)


async def test_a_recount_corrects_and_misses_nothing(db: Database, other_db: Database) -> None:
    """Whatever stood in the rollups, they are right afterwards, also for who wrote meanwhile."""
    async with open_writer(db) as writer:
        await writer.submit_all([seen(run, RunStatus.COMPLETED) for run in ids("run", 50)])
        await rollups.compact(db)
        await db.write(lambda c: c.execute(update(run_tallies).values(runs=7)).rowcount)
        with pytest.raises(AssertionError):
            await assert_exact(db)
        more = [seen(run, RunStatus.COMPLETED) for run in ids("more", 50)]
        await asyncio.gather(rollups.recount(other_db), *(writer.submit(each) for each in more))
    await assert_exact(db)


@pytest.mark.one_database("sqlite")
async def test_deleted_runs_leave_their_history(writer: TestWriter, db: Database) -> None:
    """Runs that retention deletes are in no state any more, and their hours stay, recounted or
    not."""
    later = NOW + timedelta(days=2)
    await writer.submit_all([seen(run, RunStatus.COMPLETED) for run in ids("old", 3)])
    await writer.submit_all([seen(run, RunStatus.COMPLETED, at=later) for run in ids("new", 2)])
    gone = list(ids("old", 2))

    def prune(connection: Any) -> None:
        rollups.remove_states(connection, gone)
        connection.execute(delete(runs).where(runs.c.run_id.in_(gone)))

    await db.write(prune)
    for _ in range(2):
        found = await stored_rollups(db)
        assert Counter({k.measure: n for k, (n, _) in found.items() if k.since == ALWAYS}) == {
            "state": 3
        }
        ends = {key.since: n for key, (n, _) in found.items() if key.measure == "end"}
        assert sorted(ends.values()) == [2, 3]
        await rollups.recount(db)


async def test_writers_compact(db: Database) -> None:
    """A few moments after a commit its changes are in the rollups, and at the latest when the
    process ends."""

    async def compacted() -> bool:
        return await rows_in(db, run_tally_changes) == 0

    entries: list[Entry] = [seen("run_1"), seen("run_2")]
    async with (
        RollupCompactor(db, background=True, delay=0.05) as compactor,
        open_writer(db, on_commit=[compactor.committed]) as writer,
    ):
        for entry in entries:
            await writer.submit(entry)
            await eventually(compacted)
    async with (
        RollupCompactor(db, background=False) as compactor,
        open_writer(db, on_commit=[compactor.committed]) as writer,
    ):
        await writer.submit(seen("run_3"))
        assert await rows_in(db, run_tally_changes) > 0
    assert await rows_in(db, run_tally_changes) == 0
    await assert_exact(db)


@pytest.mark.one_database("sqlite")
async def test_a_backlog_is_compacted_in_short_transactions(db: Database) -> None:
    """However many changes there are, as after a recount, no transaction takes as many as a slow
    database would need its whole time limit for: it would be too long each time."""
    many = 30_001
    change = {"measure": "end", "since": NOW, "workspace_id": "", "technique_id": "", "status": ""}
    change |= {"word": "", "bucket": 0, "runs": 1, "amount": 1}
    await db.write(
        lambda connection: connection.execute(insert(run_tally_changes), [change] * many)
    )
    begun: list[object] = []
    event.listen(db._transactions.engine, "begin", begun.append)
    assert await rollups.compact(db) == many
    assert await rows_in(db, run_tally_changes) == 0
    assert len(begun) > 3


async def test_a_fault_ends_no_compaction_for_good(db: Database, faulty_db: FaultyDatabase) -> None:
    """It is logged, and the next one compacts what that left."""
    faulty_db.faults = iter([ValueError("a fault"), ZeroDivisionError("another")])

    async def compacted() -> bool:
        return await rows_in(db, run_tally_changes) == 0

    with capture_logs() as lines:
        async with (
            RollupCompactor(faulty_db, background=True, delay=0.01, retry=0.01) as compactor,
            open_writer(db, on_commit=[compactor.committed]) as writer,
        ):
            await writer.submit(seen("run_1"))
            await eventually(compacted)
    assert [(line["event"], line["loop"]) for line in lines] == [("loop.failed", "rollups")]


async def test_the_last_compaction_makes_up_for_a_failed_one(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Said once; and where a commit has shown since that the database is back, it is done."""
    path, away = tmp_path / "tracker.db", tmp_path / "away.db"
    async with await Database.open(sqlite_url) as db:
        with capture_logs() as lines:
            async with (
                RollupCompactor(db, background=True, delay=0.01, retry=60.0) as compactor,
                open_writer(db, on_commit=[compactor.committed]) as writer,
            ):
                path.rename(away)
                await eventually(lambda: lines)
                away.rename(path)
                await writer.submit(seen("run_1"))
                assert await rows_in(db, run_tally_changes) > 0
        assert [line["event"] for line in lines] == ["loop.database_down"]
        assert await rows_in(db, run_tally_changes) == 0


async def test_sources_distinguish_adopted_runs(writer: TestWriter, db: Database) -> None:
    """A run that a sweep finds ended long ago says nothing about how soon ends are known; one that
    a callback told of does."""
    long_ago = {"completed_at": NOW - timedelta(days=3), "charged_cost": Decimal(1)}
    await writer.submit(seen("old", RunStatus.COMPLETED, source=Source.HISTORY, facts=long_ago))
    await writer.submit(callback("new", completed_at=NOW - timedelta(seconds=4)))
    found = await stored_rollups(db)
    assert {(key.word, key.bucket) for key in found if key.measure == "end"} == {
        ("history", 1),
        ("callback", 0),
    }
    assert {(k.word, k.bucket, ms) for k, (_, ms) in found.items() if k.measure == "seen"} == {
        ("callback", 5000, 4000)
    }
    await assert_exact(db)


_OLD = """INSERT INTO runs (run_id, status, progress, created_at, created_at_known, output_count,
    standing, details, ranks, conflict, source, first_seen_at, callback_at, callback_expected,
    ended_via, tracking, settled_at, next_check_at, looks, checks, missing, charged_cost,
    completed_at)
VALUES ({values})"""
_SETTLED = (
    "'{run}', 'completed', 100, '{at}', {yes}, 0, 5, 2, 0, {no}, 'start', '{at}', {callback}, "
    "{yes}, '{via}', 'settled', '{later}', NULL, 0, 1, 0, 0.25, '{at}'"
)
_ACTIVE = (
    "'run_3', 'running', 0, '{at}', {yes}, 0, 1, 0, 0, {no}, 'start', '{at}', NULL, "
    "{yes}, NULL, 'active', NULL, '{later}', 0, 1, 0, NULL, NULL"
)


async def test_runs_from_before_the_rollups_are_counted(empty_database_url: str) -> None:
    """An upgrade fills in when ends became known, and counts what is there."""
    words = {"at": "2026-06-01 12:00:00.000000", "later": "2026-06-01 12:00:09.000000"}
    words |= {"yes": "true", "no": "false"}
    old = [
        _SETTLED.format(run="run_1", via="callback", callback=f"'{words['at']}'", **words),
        _SETTLED.format(run="run_2", via="poll", callback="NULL", **words),
        _ACTIVE.format(**words),
    ]
    environment = {**os.environ, "TRACKER_DATABASE_URL": empty_database_url}
    command = ("-m", "alembic", "upgrade", "0002")
    done = await asyncio.to_thread(run_python, *command, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    engine = migration_engine(DatabaseUrl.parse(empty_database_url))
    async with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            await connection.exec_driver_sql("SET LOCAL timezone = 'UTC'")
        for values in old:
            await connection.exec_driver_sql(_OLD.format(values=values))
    await engine.dispose()
    await migrate.upgrade(empty_database_url)
    async with await Database.open(empty_database_url) as db:
        seen_at = {each.run.run_id: each.end_seen_at for each in await all_records(db)}
        assert [seen_at[run] and seen_at[run].second for run in sorted(seen_at)] == [0, 9, None]
        found = await assert_exact(db)
        assert {key.word for key in found if key.measure == "callback"} == {"came", "missed"}


def long_text() -> str:
    """255 characters of four bytes, which do not compress."""
    return "".join(map(chr, random.Random(7).sample(range(0x10000, 0x1F000), 255)))


async def test_keys_too_long_for_an_index_stop_no_compaction(
    writer: TestWriter, db: Database
) -> None:
    """PostgreSQL's index takes no three ids of that length in one row: those changes stay, and
    count; the others are compacted, before and after a recount."""
    long = dict.fromkeys(("workspace_id", "technique_id"), long_text())
    ended = {"charged_cost": Decimal(1), "completed_at": NOW, "created_at": NOW}
    reserved = RESERVED | {"tags": {"campaign": long_text()}}
    for run_id, facts_shown in (("run_1", long), ("run_2", {})):
        await writer.submit(of_start(seen(run_id, facts=facts_shown), **reserved))
        await writer.submit(seen(run_id, RunStatus.COMPLETED, facts=facts_shown | ended))
    for work in (rollups.compact, rollups.recount, rollups.compact):
        await work(db)
        await assert_exact(db)
        assert await rows_in(db, run_tallies) > 10
        assert 0 < await rows_in(db, run_tally_changes) < 10
