"""Promises that hold after every step, as assertions on one snapshot of the database."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from tests.stateful.callbacks import Callback
from tests.stateful.flora import WORKSPACE, ModelFlora, ModelRun
from tests.store.test_rollups import Counts, summed
from tracker.core.observation import Observation, Source, merge
from tracker.core.record import Record
from tracker.core.rollup import RollupKey
from tracker.core.run import Precedence, RunState, Tracking
from tracker.store.engine import Database
from tracker.store.queries.runs import RUN_COLUMNS, records
from tracker.store.schema import deliveries, run_events, runs, starts
from tracker.store.writing.rollups import ROLLUPS

_STANDINGS = {
    "pending": (Precedence.PENDING,),
    "running": (Precedence.PENDING, Precedence.RUNNING),
    "completed": (Precedence.PENDING, Precedence.RUNNING, Precedence.COMPLETED),
    "failed": (Precedence.PENDING, Precedence.RUNNING, Precedence.FAILED),
}
"""The states that the API alone may give a run, by its status at FLORA."""


@dataclass(slots=True)
class Memory:
    """All requests and answers so far, and the state after the previous step.

    `keys` are the keys that were sent, `started` the runs that were answered to a key, `tracked`
    the runs that a client tracked.
    """

    callbacks: dict[str, Callback] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    started: dict[str, str] = field(default_factory=dict)
    tracked: set[str] = field(default_factory=set)
    starts: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The database at one moment."""

    records: dict[str, Record]
    events: dict[str, list[Observation]]
    deliveries: dict[str, Any]
    starts: dict[str, Any]
    rollups: Counts


async def snapshot(db: Database) -> Snapshot:
    """Read everything in one transaction."""
    key = [ROLLUPS.c[name] for name in RollupKey._fields]
    sums = [func.sum(ROLLUPS.c.runs), func.sum(ROLLUPS.c.amount)]
    async with db.read() as connection:
        query = select(*RUN_COLUMNS).order_by(runs.c.run_id)
        stored = await connection.run_sync(records, (await connection.execute(query)).all())
        timeline = select(run_events.c.run_id, run_events.c.detail).order_by(run_events.c.id)
        observations: dict[str, list[Observation]] = {}
        for run_id, detail in await connection.execute(timeline):
            observations.setdefault(run_id, []).append(Observation.from_json(detail))
        delivery_rows = (await connection.execute(select(deliveries))).all()
        start_rows = (await connection.execute(select(starts))).all()
        counts = (await connection.execute(select(*key, *sums).group_by(*key))).all()
    return Snapshot(
        records={record.run.run_id: record for record in stored},
        events=observations,
        deliveries={row.delivery_id: row for row in delivery_rows},
        starts={row.idempotency_key: row for row in start_rows},
        rollups={RollupKey(*row[:7]): (int(row[7]), int(row[8])) for row in counts if any(row[7:])},
    )


def check(now: Snapshot, flora: ModelFlora, memory: Memory, *, holder: str) -> None:
    """Check all promises. `holder` is the live process, which is idle."""
    _no_start_is_paid_twice(now, flora, memory)
    _exactly_the_acknowledged_callbacks_are_stored(now, memory)
    applied: dict[str, set[str]] = {}
    for delivery in now.deliveries.values():
        if delivery.outcome == "applied":
            applied.setdefault(delivery.run_id, set()).add(
                memory.callbacks[delivery.delivery_id].status
            )
    assert applied.keys() <= now.records.keys(), "a delivery is applied, and its run is not there"
    for run_id, record in now.records.items():
        truth = flora.runs.get(run_id)
        reported = applied.get(run_id, set())
        assert truth is not None or reported or run_id in memory.tracked, f"no source for {run_id}"
        _the_end_has_a_source(record, truth, reported)
        _runs_only_progress(record, memory.records.get(run_id))
        assert record.lease_holder != holder, f"{run_id} is still claimed"
        if truth is not None:
            assert record.tracking is not Tracking.LOST, f"FLORA knows {run_id}"
            if record.run.settled:
                assert_true(record, truth)
        observations = now.events[run_id]
        assert merged(observations) == record.run, (
            f"the timeline of {run_id} does not merge to its row"
        )
        assert len(observations) >= memory.events[run_id]
        memory.events[run_id] = len(observations)
    assert memory.records.keys() <= now.records.keys(), "a run is gone"
    assert now.rollups == summed(now.records.values())
    memory.records, memory.starts = now.records, now.starts


def merged(observations: list[Observation]) -> RunState | None:
    """The run that these observations merge to."""
    run = None
    for observation in observations:
        run = merge(run, observation)
    return run


def assert_true(record: Record, truth: ModelRun) -> None:
    """A settled run has FLORA's own status, outputs, cost, error and times."""
    run = record.run
    assert (record.settled_at is not None) == run.settled == (record.next_check_at is None)
    found = {
        "status": run.status,
        "outputs": [[o.output_id, o.type, o.url] for o in run.outputs or ()],
        # Until it is final FLORA may show no bill yet, and of a failed run the quote.
        "cost": float(run.charged_cost or 0) if record.cost_final else truth.cost,
        "error": None if run.error is None else [run.error.code, run.error.message],
        "times": [_ms(run.created_at), _ms(run.started_at), _ms(run.completed_at)],
    }
    assert found == {
        "status": truth.status,
        "outputs": [list(output.values()) for output in truth.outputs],
        "cost": truth.cost,
        "error": list(truth.error.values()) or None,
        "times": [truth.created_at, truth.started_at, truth.completed_at],
    }
    assert run.workspace_id in (None, WORKSPACE)
    assert run.technique_id in (None, truth.technique_id)


def _ms(moment: datetime | None) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1000)


def _no_start_is_paid_twice(now: Snapshot, flora: ModelFlora, memory: Memory) -> None:
    """A key is one run, however often it was sent; its answer stays true."""
    paid = Counter(run.key for run in flora.runs.values() if run.key is not None)
    assert all(count == 1 for count in paid.values()), f"paid twice: {paid}"
    owned = Counter(row.run_id for row in now.starts.values() if row.run_id is not None)
    assert all(count == 1 for count in owned.values()), f"one run for two keys: {owned}"
    assert memory.starts.keys() <= now.starts.keys() <= memory.keys
    for key, row in now.starts.items():
        before = memory.starts.get(key, row)
        assert row.inputs == before.inputs
        assert before.run_id in (None, row.run_id)
        if row.state in ("stored", "refused"):
            assert key not in paid, f"{key} runs at FLORA, but is not recorded as started"
        if row.state != "started":
            continue
        # Never a run of another program, however similar.
        run, record = flora.runs[row.run_id], now.records[row.run_id]
        assert run.key == key, f"{key} has {row.run_id}, which it did not start"
        assert run.inputs == row.inputs
        assert record.source is Source.START
        assert record.inputs == row.inputs
    for key, run_id in memory.started.items():
        assert now.starts[key].run_id == run_id, f"{key} was answered with {run_id}"


def _exactly_the_acknowledged_callbacks_are_stored(now: Snapshot, memory: Memory) -> None:
    """Every callback that was answered 2xx is stored, and none without a valid signature."""
    for delivery_id, row in now.deliveries.items():
        sent = memory.callbacks.get(delivery_id)
        assert sent is not None, f"{delivery_id} is forged, and was stored"
        assert row.body == sent.body
        assert row.outcome in ("waiting", *sent.outcomes)
        assert (row.applied_at is not None) == (row.outcome == "applied")
        assert sent.acknowledged <= row.receipts <= sent.tries
    for sent in memory.callbacks.values():
        assert sent.acknowledged == 0 or sent.delivery_id in now.deliveries, (
            "acknowledged, but not stored"
        )


def _the_end_has_a_source(record: Record, truth: ModelRun | None, reported: set[str]) -> None:
    """The end comes from the API where it was read, else from an authentic callback."""
    run = record.run
    allowed = () if truth is None else _STANDINGS[truth.status]
    if truth is not None and truth.queued:
        allowed = (*allowed, Precedence.RUNNING)  # as which an unknown status counts
    if run.precedence.ended and not run.precedence.ended_at_api:
        assert run.status == ("completed" if "completed" in reported else "failed")
        assert run.status in reported
    else:
        assert run.precedence in (*allowed, Precedence.PENDING), f"no source for {run}"
    assert run.precedence.ended or not reported, "a callback had no effect"
    assert (record.callback_at is not None) == bool(reported)
    assert (
        (record.ended_via is not None) == (record.end_seen_at is not None) == run.precedence.ended
    )
    ends = reported | (
        {truth.status} if truth is not None and run.precedence.ended_at_api else set()
    )
    assert run.conflict == (len(ends) > 1)


def _runs_only_progress(record: Record, before: Record | None) -> None:
    """A run only progresses, and the facts about its receipt stay."""
    if before is None:
        return
    assert record.run.precedence >= before.run.precedence
    assert record.run.progress >= before.run.progress
    assert not before.run.settled or record.run.settled
    assert record.checks >= before.checks
    assert record.first_seen_at == before.first_seen_at
    assert record.source in (before.source, Source.START)
    # A replay may reveal an earlier callback.
    assert before.callback_at is None or record.callback_at <= before.callback_at
    for name in ("ended_via", "end_seen_at", "settled_at"):
        known = getattr(before, name)
        assert known is None or getattr(record, name) == known, f"{name} changed"
