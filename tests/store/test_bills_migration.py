"""What is stored already when bills are told apart from quotes: migration 0010."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update

from tests.store.making import open_writer, seen
from tests.store.test_rollups import assert_exact
from tests.store.upgrading import OldWriters
from tracker.core.clock import utc_now
from tracker.core.run import RunStatus
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.schema import run_events, runs, sweeps

# The revision does not change any more; that it is done without an error, test_migrations.py tests.
pytestmark = pytest.mark.thorough

BEFORE = "0009"
SEEN_AT_THE_END, SEEN_FAILED, SEEN_RUNNING = 5 << 27, 4 << 27, 1 << 27
"""Whose word the stored cost was: the digit of `ranks` that stands for `charged_cost`."""


def a_run(run_id: str, status: str, ranks: int, *, ended: datetime | None, **more: Any) -> Any:
    """A row as the version before wrote it."""
    settled = ended is not None
    now = utc_now()
    return {
        "run_id": run_id,
        "status": status,
        "standing": {"running": 1, "failed": 4, "completed": 5}[status],
        "ranks": ranks,
        "details": 2 if settled else 0,
        "charged_cost": 0.25,
        "tracking": "settled" if settled else "active",
        "next_check_at": None if settled else now,
        "ended_via": "poll" if settled else None,
        "completed_at": ended,
        "end_seen_at": ended,
        "settled_at": ended,
        "progress": 0.0,
        "created_at": ended or now,
        "created_at_known": True,
        "output_count": 0,
        "conflict": False,
        "source": "start",
        "first_seen_at": ended or now,
        "callback_expected": False,
        "looks": 0,
        "checks": 1,
        "missing": 0,
        "error_code": None,
        "error_message": None,
    } | more


@pytest.fixture
async def upgraded(empty_database_url: str) -> Any:
    """A database of the version before with a run of each kind, brought up to date."""
    now = utc_now()
    recent, old = now - timedelta(days=2), now - timedelta(days=30)
    moderated = {"error_code": "GPU_PROVIDER_ERROR", "error_message": "Rejected by safety system"}
    rows = [
        a_run("running", "running", SEEN_RUNNING, ended=None),
        a_run("failed", "failed", SEEN_FAILED, ended=recent, error_code="MODEL_TIMEOUT"),
        a_run("failed_long_ago", "failed", SEEN_FAILED, ended=old, **moderated),
        a_run("billed", "completed", SEEN_AT_THE_END, ended=recent),
        a_run("billed_long_ago", "completed", SEEN_AT_THE_END, ended=old),
        a_run("quoted", "completed", SEEN_RUNNING, ended=recent),
        a_run("quoted_long_ago", "completed", SEEN_RUNNING, ended=old),
        a_run("without", "completed", 0, ended=recent, charged_cost=None),
    ]
    await migrate.upgrade(empty_database_url, BEFORE)
    async with await Database.open(empty_database_url) as db:
        tables = (await OldWriters.knowing(db))._tables

        def work(connection: Any) -> None:
            connection.execute(insert(tables["runs"]), rows)
            for at in (old, recent):
                swept = {"started_at": at, "finished_at": at, "through": at, "workspace_id": "ws_1"}
                counts = dict.fromkeys(("pages", "items", "discovered", "repaired"), 0)
                connection.execute(insert(tables["sweeps"]), swept | counts | {"unreadable": 0})
            key = "measure, since, workspace_id, technique_id, status, word, bucket"
            connection.execute(
                text(
                    f"INSERT INTO run_tallies ({key}, runs, amount) "
                    f"SELECT {key}, count(*), sum(amount) FROM run_facts GROUP BY {key}"
                )
            )

        await db.write(work)
    await migrate.upgrade(empty_database_url, history_since=timedelta(days=7))
    async with await Database.open(empty_database_url) as db:
        yield db


async def test_stored_quotes_become_quotes(upgraded: Database) -> None:
    """What was shown before an end, or of a failed run, is no bill; what the ended run showed
    stays, and is not called final."""
    found = await read.get_runs(
        upgraded, ["running", "failed", "failed_long_ago", "billed", "billed_long_ago", "quoted"]
    )
    for run_id, record in found.items():
        quote, cost = record.run.quoted_cost, record.run.charged_cost
        assert (cost is not None) is run_id.startswith("billed"), run_id
        assert (quote is not None) is not run_id.startswith("billed"), run_id
        assert not record.cost_final
    async with upgraded.read() as connection:
        advice = (
            await connection.execute(
                select(runs.c.run_id, runs.c.retry_advice).where(runs.c.retry_advice.is_not(None))
            )
        ).all()
    assert dict(map(tuple, advice)) == {
        "failed": "retry_now",
        "failed_long_ago": "change_input",
    }


async def test_recent_costs_are_read_again(upgraded: Database) -> None:
    """Of the last `TRACKER_HISTORY_SINCE`: the next sweep goes back so far, and what it does not
    show is read alone; what a read then shows is final."""
    now = utc_now()
    async with upgraded.read() as connection:
        due = await connection.execute(
            select(runs.c.run_id, runs.c.recheck_at).where(runs.c.recheck_at.is_not(None))
        )
        times = {row.run_id: row.recheck_at for row in due}
        through = (
            await connection.execute(select(sweeps.c.through).order_by(sweeps.c.started_at))
        ).scalars()
        assert [at is None for at in through] == [False, True]
    assert times.keys() == {"failed", "billed", "quoted", "without"}
    assert all(timedelta(minutes=50) < at - now < timedelta(minutes=61) for at in times.values())
    async with open_writer(upgraded) as writer:
        read_again = seen("billed", RunStatus.COMPLETED, at=now, facts={"charged_cost": 1})
        passed = await writer.submit(read_again)
    assert passed.after is not None
    assert (passed.after.run.charged_cost, passed.after.cost_final) == (1, True)


async def test_what_is_counted_follows(upgraded: Database) -> None:
    """The rollups are exact, the costs that became quotes taken off."""
    found = await assert_exact(upgraded)
    costs = {key.word: [0, 0] for key in found if key.measure == "cost"}
    for key, (count, amount) in found.items():
        if key.measure == "cost":
            costs[key.word][0] += count
            costs[key.word][1] += amount
    assert costs == {"open": [6, 500_000_000], "unpriced": [1, 0]}
    assert sum(amount for key, (_, amount) in found.items() if key.measure == "quote") == 10**9


async def test_it_may_be_done_again(upgraded: Database, empty_database_url: str) -> None:
    """An upgrade that was broken off begins again: nothing is converted twice."""
    before = await read.get_runs(upgraded, ["failed", "billed", "quoted"])

    def back(connection: Any) -> None:
        connection.execute(text("UPDATE alembic_version SET version_num = '0008'"))

    if upgraded.dialect == "sqlite":
        return  # one transaction there, so that it is never half
    await upgraded.write(back)
    await migrate.upgrade(empty_database_url)
    after = await read.get_runs(upgraded, ["failed", "billed", "quoted"])
    assert {name: one.run for name, one in after.items()} == {
        name: one.run for name, one in before.items()
    }
    await assert_exact(upgraded)


async def test_what_an_old_process_still_writes_is_a_quote(db: Database) -> None:
    """While it is being replaced, a process of the version before stores a start's cost as charged;
    new code takes it for what it is."""
    async with open_writer(db) as writer:
        await writer.submit(seen("run_1", RunStatus.RUNNING))

        def old_write(connection: Any) -> None:
            connection.execute(update(runs).values(charged_cost=0.25, precedences=SEEN_RUNNING))

        await db.write(old_write)
        (record,) = (await read.get_runs(db, ["run_1"])).values()
        assert (record.run.charged_cost, float(record.run.quoted_cost or 0)) == (None, 0.25)
        passed = await writer.submit(seen("run_1", RunStatus.COMPLETED))
        assert passed.after is not None
        assert passed.after.run.charged_cost is None
    async with db.read() as connection:
        assert (await connection.execute(select(run_events.c.id))).all()
