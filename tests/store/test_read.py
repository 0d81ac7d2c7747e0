"""Readers: pages that neither skip nor repeat, timelines, durations, counts."""

from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import func, select

from tests.store.making import NOW, TestWriter, callback, ids, quarantined, seen, started
from tracker.core.errors import InvalidRequest
from tracker.core.observation import Source
from tracker.core.record import DeliveryOutcome, Observed
from tracker.core.run import Output, RunStatus, Tracking
from tracker.core.schedule import Durations
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.deliveries import get_delivery, list_deliveries
from tracker.store.queries.overview import AttentionCounts, counts
from tracker.store.queries.runs import (
    durations_of,
    events,
    get_run,
    get_runs,
    last_sources,
    list_runs,
)
from tracker.store.queries.starts import StartState
from tracker.store.schema import runs


def created(
    run_id: str, at: datetime, status: RunStatus = RunStatus.RUNNING, **facts: object
) -> Observed:
    """A run of the history, created at that moment."""
    return seen(run_id, status, source=Source.HISTORY, facts={"created_at": at, **facts})


async def all_pages(db: Database, limit: int, **wanted: str) -> list[str]:
    """The ids of all runs, read page by page."""
    found: list[str] = []
    cursor = None
    while True:
        page, cursor = await list_runs(db, cursor=cursor, limit=limit, **wanted)
        found += [record.run.run_id for record in page]
        if cursor is None:
            return found


async def test_a_whole_record_comes_back(writer: TestWriter, db: Database) -> None:
    """Every fact of a run, and every fact about its receipt, survives the database."""
    facts = {
        "run_type": "technique",
        "workspace_id": "ws_1",
        "project_id": "prj_1",
        "technique_id": "tech_1",
        "technique_name": "Größe ✓",
        "poll_url": "https://app.flora.ai/api/v1/techniques/tech_1/runs/run_1",
        "progress": 100.0,
        "created_at": NOW,
        "started_at": NOW + timedelta(microseconds=1),
        "completed_at": NOW + timedelta(seconds=9.5),
        "charged_cost": Decimal("0.123456"),
        "outputs": (Output("o2", "text", "a\nb"), Output("o1", "imageUrl", "https://x/1")),
    }
    await writer.submit(started("run_1"))
    await writer.submit(callback("run_1", at=NOW + timedelta(seconds=10)))
    passed = await writer.submit(seen("run_1", RunStatus.COMPLETED, facts=facts, reads=1))
    record = await get_run(db, "run_1")
    assert record == passed.after
    assert record is not None
    for name, value in facts.items():
        assert getattr(record.run, name) == value
    assert await get_runs(db, ["run_1", "run_2"]) == {"run_1": record}
    assert await get_run(db, "run_2") is None


@pytest.mark.parametrize("run_id", ["run_\0", "run_\ud800", "läuft", "1"])
async def test_any_text_is_looked_up_as_an_id(
    writer: TestWriter, db: Database, run_id: str
) -> None:
    """Also one that no database can hold, which is stored with U+FFFD in its place."""
    assert (await get_runs(db, [run_id]), await last_sources(db, [run_id])) == ({}, {})
    await writer.submit(started(run_id))
    (record,) = (await get_runs(db, [run_id, "run_2"])).values()
    assert record == await get_run(db, run_id)
    assert await last_sources(db, [run_id]) == {record.run.run_id: Source.START}


async def test_money_can_be_summed_by_anybody(writer: TestWriter, db: Database) -> None:
    """Ad-hoc SQL adds up costs, to the sixth decimal."""
    for run, cost in (("run_1", "0.1"), ("run_2", "0.200001"), ("run_3", "12.3")):
        facts = {"charged_cost": Decimal(cost)}
        await writer.submit(seen(run, RunStatus.COMPLETED, facts=facts))
    async with db.read() as connection:
        total = (await connection.execute(select(func.sum(runs.c.charged_cost)))).scalar_one()
    assert round(total, 6) == Decimal("12.600001")


async def test_pages_are_newest_first_and_whole(writer: TestWriter, db: Database) -> None:
    """Pages of any size hold every run once, by creation and then by id, also where times are
    equal."""
    moments = [NOW - timedelta(hours=number // 3) for number in range(25)]
    wanted = dict(zip(ids("run", 25), moments, strict=True))
    await writer.submit_all([created(run, at) for run, at in wanted.items()])
    expected = sorted(wanted, key=lambda run: (wanted[run], run), reverse=True)
    for limit in (1, 4, 25, 100):
        assert await all_pages(db, limit) == expected


async def test_pages_are_stable_while_runs_come_in(writer: TestWriter, db: Database) -> None:
    """A reader who is half-way misses nothing and sees nothing twice when newer runs start."""
    await writer.submit_all([created(run, NOW) for run in ids("run", 9)])
    first, cursor = await list_runs(db, limit=4)
    await writer.submit_all([created(run, NOW + timedelta(seconds=1)) for run in ids("new", 9)])
    rest = []
    while cursor:
        page, cursor = await list_runs(db, limit=4, cursor=cursor)
        rest += page
    found = [record.run.run_id for record in first + rest]
    assert found == list(reversed(ids("run", 9)))


async def test_listings_filter(writer: TestWriter, db: Database) -> None:
    """Status, technique, workspace and tracking narrow a listing, alone and together."""
    await writer.submit_all(
        [
            created("run_1", NOW, RunStatus.FAILED, technique_id="tech_1", workspace_id="ws_1"),
            created("run_2", NOW, technique_id="tech_1", workspace_id="ws_2"),
            created("run_3", NOW, technique_id="tech_2", workspace_id="ws_1"),
        ]
    )
    assert await all_pages(db, 1, technique_id="tech_1") == ["run_2", "run_1"]
    assert await all_pages(db, 1, workspace_id="ws_1") == ["run_3", "run_1"]
    assert await all_pages(db, 1, status="failed") == ["run_1"]
    assert await all_pages(db, 1, tracking="active") == ["run_3", "run_2"]
    assert await all_pages(db, 1, tracking="active", technique_id="tech_1") == ["run_2"]
    assert await all_pages(db, 1, status="completed") == []


FOREIGN_CURSORS = [
    "",
    "x",
    "!!!!",
    "bnVsbA",  # null
    "WyIyMDI2IiwgMV0",  # ["2026", 1]
    "WzEsMl0",  # [1,2]
    "eyJvZmZzZXQiOjIwfQ",  # FLORA's own
    "é",
    "W" * 9999,
]


async def test_a_foreign_cursor_is_refused(db: Database) -> None:
    """A cursor that was not given out here is the caller's fault, and the field is named."""
    for cursor in FOREIGN_CURSORS:
        with pytest.raises(InvalidRequest) as caught:
            await list_runs(db, cursor=cursor)
        assert [fault.field for fault in caught.value.fields] == ["cursor"]


async def test_a_timeline_is_in_order(writer: TestWriter, db: Database) -> None:
    """Events come oldest first, each with what its source saw."""
    await writer.submit(started("run_1"))
    await writer.submit_all([started("run_2"), seen("run_1", facts={"progress": 40.0})])
    await writer.submit(callback("run_1", status=RunStatus.FAILED))
    told = await events(db, "run_1")
    assert [(event.source, event.status, event.progress) for event in told] == [
        (Source.START, RunStatus.PENDING, None),
        (Source.POLL, RunStatus.RUNNING, 40.0),
        (Source.CALLBACK, RunStatus.FAILED, None),
    ]
    assert told[1].detail["progress"] == 40.0
    assert told[1].at == NOW
    assert await events(db, "run_3") == []


async def durations(db: Database, technique_id: str) -> Durations:
    """Those of one technique."""
    (found,) = (await durations_of(db, [technique_id])).values()
    return found


async def test_durations_are_those_of_the_last_completed_runs(
    writer: TestWriter, db: Database
) -> None:
    """Only completed runs whose creation is known count, and of them the last two hundred."""
    assert await durations(db, "tech_1") == Durations(count=0, p50=0, p95=0)

    def run(
        name: str, seconds: float, end: datetime, status: RunStatus, **facts: object
    ) -> Observed:
        times = {"created_at": end - timedelta(seconds=seconds), "completed_at": end}
        return seen(name, status, facts={"technique_id": "tech_1", **times, **facts})

    done = RunStatus.COMPLETED
    old = [run(name, 1000, NOW - timedelta(days=1), done) for name in ids("old", 50)]
    new = [run(name, 1 + n, NOW, done) for n, name in enumerate(ids("new", 200))]
    failed = [run("failed", 5000, NOW, RunStatus.FAILED)]
    unknown = [run("unknown", 5000, NOW, done, created_at=None)]
    foreign = [run("foreign", 5000, NOW, done, technique_id="tech_2")]
    await writer.submit_all(old + new + failed + unknown + foreign)
    found = Durations(count=200, p50=100.0, p95=190.0)
    assert await durations(db, "tech_1") == found
    assert await durations_of(db, ["tech_1", "tech_2", "tech_3"]) == {
        "tech_1": found,
        "tech_2": Durations(count=1, p50=5000.0, p95=5000.0),
        "tech_3": Durations(count=0, p50=0, p95=0),
    }
    assert await durations_of(db, []) == {}
    assert (await durations(db, "tech_\0")).count == 0


async def test_deliveries_are_listed_without_bodies(writer: TestWriter, db: Database) -> None:
    """Callbacks come newest first, by outcome or by run; one alone comes with its bytes."""
    moments = [NOW + timedelta(seconds=number) for number in range(4)]
    await writer.submit_all(
        [
            callback("run_1", "whd_1", at=moments[0], body=b"one"),
            quarantined("whd_2", at=moments[1]),
            callback("run_2", "whd_3", at=moments[2]),
            callback("run_1", "whd_4", at=moments[3]),
        ]
    )
    page, cursor = await list_deliveries(db, limit=3)
    assert [row.delivery_id for row in page] == ["whd_4", "whd_3", "whd_2"]
    assert {row.body for row in page} == {None}
    rest, end = await list_deliveries(db, limit=3, cursor=cursor)
    assert ([row.delivery_id for row in rest], end) == (["whd_1"], None)
    odd, _ = await list_deliveries(db, outcome="quarantined")
    assert [(row.delivery_id, row.outcome) for row in odd] == [
        ("whd_2", DeliveryOutcome.QUARANTINED)
    ]
    of_run, _ = await list_deliveries(db, run_id="run_1")
    assert [row.delivery_id for row in of_run] == ["whd_4", "whd_1"]
    one = await get_delivery(db, "whd_1")
    assert one is not None
    assert (one.body, one.event_type) == (b"one", "run.completed")
    assert await get_delivery(db, "whd_9") is None
    with pytest.raises(InvalidRequest):
        await list_deliveries(db, cursor="x")


async def test_counts_say_what_waits(writer: TestWriter, db: Database) -> None:
    """What is active, due, lost, quarantined, open and unresolved is counted."""
    assert await counts(db, now=NOW) == AttentionCounts(*[0] * 7, None, None)
    at = NOW - timedelta(minutes=1)
    await writer.submit_all(
        [callback("run_due", at=at), started("run_waits"), quarantined("whd_odd")]
    )
    await writer.submit(seen("run_settled", RunStatus.FAILED))
    for key in ("open", "unresolved"):
        await starts.reserve(
            db,
            starts.StartRow(
                workspace_id="default",
                idempotency_key=key,
                technique_id="tech_1",
                fingerprint="",
                inputs=[],
                created_at=NOW,
            ),
        )
    lease = timedelta(minutes=1)
    assert await starts.take(db, "default", "unresolved", "h", NOW, lease)
    state = StartState.UNRESOLVED
    await starts.mark(db, "default", "unresolved", holder="h", state=state, error={})
    assert await starts.take(db, "default", "open", "h", NOW, lease)
    await starts.mark(db, "default", "open", holder="h", state=StartState.IN_DOUBT, error={})
    found = await counts(db, now=NOW)
    assert found == AttentionCounts(
        active=2,
        due=1,
        lost=0,
        quarantined=1,
        waiting=0,
        oldest_waiting_at=None,
        open_starts=1,
        unresolved_starts=1,
        oldest_due_at=at,
    )


async def test_a_settled_run_seen_again_is_not_written(writer: TestWriter, db: Database) -> None:
    """A history page full of known, settled runs with final bills changes no row."""
    entry = seen("run_1", RunStatus.FAILED, source=Source.HISTORY)
    passed = await writer.submit(entry)
    assert passed.after is not None
    assert passed.after.tracking is Tracking.SETTLED
    final = await writer.submit(
        replace(entry, observation=replace(entry.observation, at=NOW + timedelta(minutes=1)))
    )
    assert final.after is not None
    assert final.after.cost_final
    again = await writer.submit(
        replace(entry, observation=replace(entry.observation, at=NOW + timedelta(hours=1)))
    )
    assert again.before == again.after == final.after
