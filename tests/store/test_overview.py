"""What the overview and the views say of a handful of runs whose story is known."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import insert, text, update

from tests.store.making import NOW, TestWriter, callback, quarantined, seen, started
from tracker.core.observation import Source
from tracker.core.rollup import EDGES, lag_of, quantile
from tracker.core.run import RunStatus
from tracker.store.engine import Database
from tracker.store.queries import overview, sweeps
from tracker.store.queries.overview import StateCount
from tracker.store.schema import runs, starts, techniques
from tracker.store.writing import rollups

SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)
DONE = RunStatus.COMPLETED
TECH = {"technique_id": "tech_1", "workspace_id": "ws_1"}


@pytest.fixture
async def told(writer: TestWriter, db: Database) -> Database:
    """Five runs: a callback that came, one that was missed, a late one, an adopted run, and one
    that goes on; the last changes of rollups are not compacted."""
    cats = {"technique_id": "tech_1", "name": "Cats", "inputs": [], "outputs": []}
    await db.write(lambda c: c.execute(insert(techniques).values(synced_at=NOW, **cats)).rowcount)
    ended = {"completed_at": NOW - 2 * SECOND, "charged_cost": Decimal("0.125")} | TECH
    failed = {"completed_at": NOW - 45 * SECOND} | TECH
    old = {"completed_at": NOW - 50 * HOUR, "charged_cost": Decimal(3), "technique_id": "tech_2"}
    for number in range(1, 5):
        await writer.submit(started(f"run_{number}", at=NOW - HOUR, facts=TECH))
    await writer.submit(callback("run_1", at=NOW - SECOND))
    await writer.submit(seen("run_1", DONE, at=NOW, facts=ended))
    await writer.submit(seen("run_2", RunStatus.FAILED, at=NOW, facts=failed))
    await rollups.compact(db)
    await writer.submit(seen("run_3", DONE, at=NOW, facts=ended))
    await writer.submit(callback("run_3", at=NOW + SECOND))
    await writer.submit(
        seen("run_5", DONE, source=Source.HISTORY, at=NOW, facts=old | {"technique_name": "Dogs"})
    )
    await writer.submit(seen("run_5", DONE, at=NOW + SECOND, facts=old))
    return db


async def rows(db: Database, view: str, order: str = "1, 2, 3") -> list[dict[str, Any]]:
    """All rows of a view, as any client reads them."""
    async with db.read() as connection:
        found = await connection.execute(text(f"SELECT * FROM {view} ORDER BY {order}"))
        return [dict(row) for row in found.mappings()]


async def test_states(told: Database) -> None:
    """Each run is in one state, and both ways of asking agree."""
    assert await overview.states(told) == [
        StateCount("completed", "settled", 3),
        StateCount("failed", "settled", 1),
        StateCount("pending", "active", 1),
    ]
    shown = await rows(told, "v_run_states")
    assert sum(row["runs"] for row in shown) == 5
    assert {(row["technique_name"], row["workspace_id"]) for row in shown} == {
        ("Cats", "ws_1"),
        (None, None),
    }


async def test_ends(told: Database) -> None:
    """Ends stand in the hour in which they became known; adopted runs are told apart."""
    hours = await overview.ends_by_hour(told, now=NOW + HOUR, hours=3)
    assert [each.hour.hour for each in hours] == [11, 12, 13]
    assert [each.by_source for each in hours] == [{"callback": 1}, {"poll": 2}, {}]
    assert [each.by_status for each in hours] == [
        {"completed": 1},
        {"completed": 1, "failed": 1},
        {},
    ]
    assert [each.adopted for each in hours] == [0, 1, 0]
    assert hours[1].hour == NOW.replace(minute=0, second=0, microsecond=0)
    shown = {row["ended_via"]: row for row in await rows(told, "v_ends_hourly")}
    assert {via: row["ends"] for via, row in shown.items()} == {
        "callback": 1,
        "poll": 2,
        "history": 1,
    }
    assert (shown["poll"]["completed"], shown["poll"]["failed"]) == (1, 1)
    assert (shown["history"]["adopted"], shown["history"]["seen_count"]) == (1, 0)
    assert shown["history"]["seen_p50"] is None
    assert (shown["poll"]["seen_p50"], shown["poll"]["seen_p95"]) == (2, 45)
    assert shown["poll"]["seen_avg"] == 23.5
    assert (shown["callback"]["seen_p50"], shown["callback"]["settled_avg"]) == (1, 2)


async def test_callbacks(told: Database) -> None:
    """Of three that were expected one came, one came late and one has not come."""
    health = await overview.callback_health(told, now=NOW, hours=2)
    assert (health.came, health.late, health.missed) == (1, 1, 1)
    assert (health.expected, health.miss_rate) == (3, 1 / 3)
    assert (await overview.callback_health(told, now=NOW + 99 * HOUR)).miss_rate is None
    (day,) = await rows(told, "v_callback_health")
    assert day["expected"] == 3
    assert day["miss_rate"] == pytest.approx(1 / 3)


async def test_lags(told: Database) -> None:
    """How long it took from FLORA's end until it was known; the adopted run has no part in it."""
    lag = await overview.lags(told, now=NOW, hours=2)
    assert lag.runs == 3
    shown = await rows(told, "v_lags_hourly", "lag, le_seconds")
    assert [(r["le_seconds"], r["runs"]) for r in shown if r["lag"] == "seen"] == [
        (1, 1),
        (2, 1),
        (45, 1),
    ]
    settled = [(r["le_seconds"], r["runs"]) for r in shown if r["lag"] == "settled"]
    assert (sum(runs for _, runs in settled), settled[-1]) == (3, (45, 1))


async def test_costs(told: Database) -> None:
    """Costs stand on the day of FLORA's end, by technique, in the catalogue's or the run's name."""
    (cats,) = await overview.costs(told, now=NOW)
    assert (cats.technique_name, cats.cost) == ("Cats", Decimal("0.25"))
    assert (cats.runs, cats.completed, cats.failed, cats.unpriced) == (3, 2, 1, 0)
    assert (cats.not_final, cats.quoted) == (3, Decimal(0))
    dogs, _ = await overview.costs(told, now=NOW, days=3)
    assert (dogs.technique_id, dogs.technique_name, dogs.cost) == ("tech_2", "Dogs", Decimal(3))
    shown = await rows(told, "v_cost_daily")
    assert [float(row["cost"]) for row in shown] == [3, 0.25]
    assert [(row["not_final"], float(row["quoted"])) for row in shown] == [(0, 0), (3, 0)]
    (failures,) = await rows(told, "v_failures_daily")
    assert (failures["technique_name"], failures["retry_advice"], failures["runs"]) == (
        *("Cats", "not_retryable", 1),
    )


async def test_overdue(told: Database) -> None:
    """A run whose time to be read has passed shows how long ago that was."""
    assert await overview.overdue(told, now=NOW - HOUR) == []
    (late,) = await overview.overdue(told, now=NOW + HOUR)
    assert late.run.run_id == "run_4"
    (row,) = await rows(told, "v_overdue_runs")
    assert row["run_id"] == "run_4"
    assert row["overdue_seconds"] > 0
    assert row["age_seconds"] > row["overdue_seconds"]


async def test_a_run_that_waits_for_a_retry_is_overdue(db: Database, writer: TestWriter) -> None:
    """FLORA did not answer its last read: pages, metrics and the view for dashboards show it."""
    later = datetime.now(UTC) + timedelta(hours=1)
    await writer.submit(started("run_1"))
    retry = update(runs).values(next_check_at=later, last_error="FLORA cannot be reached")
    await db.write(lambda connection: connection.execute(retry))
    (late,) = await overview.overdue(db, now=NOW)
    (row,) = await rows(db, "v_overdue_runs")
    assert late.run.run_id == row["run_id"] == "run_1"
    assert row["retrying"]
    assert row["overdue_seconds"] < 0


async def test_sweeps(db: Database) -> None:
    """The last sweep and the last complete one of each workspace, also of one without an id."""
    for workspace, errors in (("ws_1", (None, "503")), (None, (None,)), ("ws_2", ("401",))):
        for number, error in enumerate(errors):
            at = NOW + number * HOUR
            sweep = await sweeps.begin(db, workspace, at)
            counts = {"pages": 2, "items": 150, "discovered": 1, "repaired": 3}
            through = None if error else NOW - HOUR
            await sweeps.finish(db, sweep, at=at + SECOND, through=through, error=error, **counts)
    await sweeps.begin(db, "ws_2", NOW + 5 * HOUR)
    unnamed, one, two = await sweeps.sweep_health(db)
    assert (unnamed.workspace_id, one.workspace_id, two.workspace_id) == (None, "ws_1", "ws_2")
    assert (one.last_started_at, one.last_error) == (NOW + HOUR, "503")
    assert (one.complete_at, one.through) == (NOW + SECOND, NOW - HOUR)
    assert (unnamed.complete_started_at, unnamed.last_error) == (NOW, None)
    assert (two.last_finished_at, two.complete_at, two.through) == (None, None, None)
    shown = {row["workspace_id"]: row for row in await rows(db, "v_sweeps", "1")}
    assert shown["ws_1"]["complete_items"] == 150


async def test_what_is_open(writer: TestWriter, db: Database) -> None:
    """Starts without a known end and callbacks that nobody understood are listed with their
    reasons."""
    await writer.submit(quarantined("whd_1", at=NOW))
    common = {"workspace_slot": "default", "technique_id": "t", "fingerprint": "", "inputs": []}
    for state in ("stored", "sent", "refused", "unresolved"):
        error = {"code": "time_out", "message": "no answer"} if state == "unresolved" else None
        row = common | {"idempotency_key": state, "state": state, "created_at": NOW, "error": error}
        await db.write(lambda c, row=row: c.execute(insert(starts).values(**row)).rowcount)
    shown = await rows(db, "v_open_starts", "state")
    assert [row["state"] for row in shown] == ["sent", "stored", "unresolved"]
    assert (shown[2]["error_code"], shown[2]["error_message"]) == ("time_out", "no answer")
    (delivery,) = await rows(db, "v_quarantine")
    assert (delivery["delivery_id"], delivery["receipts"]) == ("whd_1", 1)
    assert (delivery["reason"], delivery["acknowledged_at"]) == ("not a JSON object", None)


def test_quantiles_of_a_histogram() -> None:
    """A quantile lies in the bucket that holds it, and no count means no quantile."""
    assert lag_of([]) == (0, None, None)
    assert quantile({1000: 10}, 0.5) == pytest.approx(0.75)  # between half a second and one
    assert quantile({1000: 1, EDGES[-1] + 1: 9}, 0.95) == 86_400
    spread = {100: 50, 60_000: 45, 120_000: 5}
    assert 45 < quantile(spread, 0.95) <= 60
    assert quantile(spread, 0.5) <= 0.1
