"""Observations of runs are written in groups, and answered only after their commit."""

import asyncio
from datetime import timedelta

from sqlalchemy import func, select

from tests.store.making import (
    NOW,
    TestWriter,
    callback,
    ids,
    open_writer,
    seen,
    started,
)
from tests.support.started import of_start
from tracker.core.errors import StoreError, StoreUnavailable
from tracker.core.observation import Source
from tracker.core.record import FailedRead
from tracker.core.run import Output, RunStatus, Tracking
from tracker.store.engine import Database
from tracker.store.queries.runs import events, get_run, get_runs
from tracker.store.schema import runs
from tracker.store.writing.writer import WriteOutcome


async def test_what_waits_is_committed_together(db: Database, other_db: Database) -> None:
    """Two hundred reads at the same moment cost a handful of commits, and all are on disk."""
    commits: list[WriteOutcome] = []
    async with open_writer(db, on_commit=[commits.append]) as writer:
        passed = await asyncio.gather(*(writer.submit(seen(run)) for run in ids("run", 200)))
    assert len(commits) <= 5
    assert sum(len(commit.results) for commit in commits) == 200
    assert all(each.after and each.after.run.run_id for each in passed)
    async with other_db.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(runs))).scalar() == 200


async def test_a_callback_makes_its_run_known_and_due(writer: TestWriter, db: Database) -> None:
    """A callback for a run that nobody registered creates it, ended and to be read at once."""
    passed = await writer.submit(callback("run_1"))
    record = await get_run(db, "run_1")
    assert record is not None
    assert record == passed.after
    assert passed.before is None
    assert (record.run.status, record.tracking) == (RunStatus.COMPLETED, Tracking.ACTIVE)
    assert (record.source, record.ended_via) == (Source.CALLBACK, Source.CALLBACK)
    assert (record.callback_at, record.next_check_at) == (NOW, NOW)
    assert [event.source for event in await events(db, "run_1")] == [Source.CALLBACK]


async def test_entries_for_one_run_are_applied_in_order(writer: TestWriter, db: Database) -> None:
    """A batch may hold a run's whole life; each answer shows the state before and after it."""
    output = Output("o1", "imageUrl", "https://x/1.png")
    passed = await writer.submit_all(
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


async def test_outputs_are_replaced_as_a_whole(writer: TestWriter, db: Database) -> None:
    """A higher observation's outputs take the place of a lower one's, however many there were."""
    few = (Output("o1", "text", "final"),)
    many = tuple(Output(f"o{n}", "imageUrl", f"https://x/{n}") for n in range(3))
    await writer.submit(seen("run_1", RunStatus.RUNNING, facts={"outputs": many}))
    await writer.submit(seen("run_1", RunStatus.COMPLETED, facts={"outputs": few}))
    record = await get_run(db, "run_1")
    assert record is not None
    assert record.run.outputs == few


async def test_a_observation_without_news_leaves_no_event(writer: TestWriter, db: Database) -> None:
    """A read that shows what is known already is counted on the run and nowhere else."""
    await writer.submit(seen("run_1", RunStatus.RUNNING, reads=1))
    passed = await writer.submit(seen("run_1", RunStatus.RUNNING, at=NOW + timedelta(1), reads=1))
    assert not passed.changed
    assert len(await events(db, "run_1")) == 1
    record = await get_run(db, "run_1")
    assert record is not None
    assert (record.checks, record.polls) == (2, 2)


async def test_an_unseen_run_is_counted_only_where_it_is_known(
    writer: TestWriter, db: Database
) -> None:
    """A read that fails is noted on its run; about a run never heard of it says nothing."""
    await writer.submit(started("run_1"))
    at = NOW + timedelta(seconds=40)
    await writer.submit_all(
        [
            FailedRead(run_id="run_1", at=at, error="FLORA answered 404", missing=True),
            FailedRead(run_id="run_unknown", at=at, error="FLORA answered 404", missing=True),
        ]
    )
    record = await get_run(db, "run_1")
    assert record is not None
    assert (record.missing, record.missing_since) == (1, at)
    assert record.last_error == "FLORA answered 404"
    assert await get_run(db, "run_unknown") is None


async def test_a_refused_entry_does_not_take_its_neighbours_along(
    writer: TestWriter, db: Database
) -> None:
    """Where the database refuses one entry of a batch, that one fails and all others are stored."""
    entries = [seen(run) for run in ids("run", 20)]
    entries[13] = seen("run_bad", facts={"progress": 400.0})
    answers = await asyncio.gather(
        *(writer.submit(entry) for entry in entries), return_exceptions=True
    )
    failed = [number for number, each in enumerate(answers) if isinstance(each, Exception)]
    assert failed == [13]
    assert isinstance(answers[13], StoreError)
    assert not isinstance(answers[13], StoreUnavailable)
    assert len(await get_runs(db, ids("run", 20))) == 19
    assert await get_run(db, "run_bad") is None


async def test_text_that_no_database_holds_is_made_fit(writer: TestWriter, db: Database) -> None:
    """NUL and halves of surrogate pairs are replaced in ids, facts and events."""
    passed = await writer.submit(
        seen(
            "run_\0",
            RunStatus.COMPLETED,
            source=Source.CALLBACK,
            facts={"technique_name": "a\0b\udfffc"},
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


async def test_inputs_of_any_shape_are_kept(writer: TestWriter, db: Database) -> None:
    """What a run was started with is someone's JSON: odd numbers and odd text included."""
    odd = [{"id": "n", "value": 2**70, "nul\0": "a\0", "inf": float("inf"), "deep": [[None]]}]
    await writer.submit(of_start(started("run_1"), inputs=odd))
    record = await get_run(db, "run_1")
    assert record is not None
    expected = {"id": "n", "value": float(2**70), "nul\ufffd": "a\ufffd", "inf": None}
    assert record.inputs == [expected | {"deep": [[None]]}]


async def test_a_caller_that_goes_away_breaks_nothing(writer: TestWriter, db: Database) -> None:
    """A cancelled caller's entry is stored all the same, and its neighbours are answered."""
    calls = [asyncio.ensure_future(writer.submit(seen(run))) for run in ids("run", 10)]
    await asyncio.sleep(0)
    calls[3].cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(each, asyncio.CancelledError) for each in answers) == 1
    await writer.submit(seen("run_after"))
    assert len(await get_runs(db, [*ids("run", 10), "run_after"])) == 11


async def test_a_hook_that_fails_is_no_callers_fault(db: Database) -> None:
    """What someone else does after a commit cannot take the commit back."""

    def fails(_: WriteOutcome) -> None:
        raise RuntimeError("not today")

    told: list[WriteOutcome] = []
    async with open_writer(db, on_commit=[fails, told.append]) as writer:
        passed = await writer.submit(callback("run_1"))
    assert passed.after is not None
    assert [outcome.changed_runs for outcome in told] == [["run_1"]]
