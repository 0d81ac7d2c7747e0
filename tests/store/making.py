"""Entries, observations and writers for the store's tests."""

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import select

from tests.support.deliveries import Delivered, keep
from tests.support.started import of_start
from tests.support.waiting import eventually
from tracker.core.errors import StoreUnavailable
from tracker.core.observation import Observation, Source, merge
from tracker.core.record import Delivery, DeliveryOutcome, Entry, Observed
from tracker.core.run import Output, RunError, RunState, RunStatus
from tracker.core.schedule import Policy
from tracker.flora.callback import observation_of
from tracker.receiving.apply import Applier, ParsedDelivery
from tracker.receiving.receive import Inbox, Received, SignedDelivery
from tracker.store.engine import Database
from tracker.store.queries.runs import events
from tracker.store.schema import deliveries
from tracker.store.writing.writer import MergeRules, Writer, WriteResult
from tracker.workspaces import Workspaces

NOW = datetime(2026, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
POLICY = Policy()


RULES = MergeRules(POLICY, lambda _: None)
"""The default policy, and no durations."""


class TestWriter(Writer):
    """A writer that also stores deliveries, with the observations that they hold."""

    __test__ = False

    async def submit(self, entry: Entry | Delivered) -> WriteResult:
        if not isinstance(entry, Delivered):
            return await super().submit(entry)
        await keep(self.database, entry)
        if entry.observation is None:
            return WriteResult(before=None, after=None)
        return await super().submit(Observed(observation=entry.observation))

    async def submit_all(self, entries: Sequence[Entry | Delivered]) -> list[WriteResult]:
        seen: list[Entry] = []
        for entry in entries:
            if not isinstance(entry, Delivered):
                seen.append(entry)
                continue
            await keep(self.database, entry)
            if entry.observation is not None:
                seen.append(Observed(observation=entry.observation))
        return await super().submit_all(seen)


PATIENCE = {"deadline": 60.0}
"""What is to be stored is stored, however long the machine takes for it."""


def open_writer(db: Database, **options: Any) -> TestWriter:
    """A writer with the default policy that knows no durations."""
    return TestWriter(db, **{"rules": RULES, **PATIENCE, **options})


async def taken_again(writer: TestWriter, entry: Entry | Delivered) -> None:
    """Offer an entry until it is committed, as FLORA would: what was away may take a moment, and a
    test's writer has little patience."""

    async def taken() -> bool:
        try:
            await writer.submit(entry)
        except StoreUnavailable:
            return False
        return True

    await eventually(taken)


def callback(
    run_id: str,
    delivery_id: str | None = None,
    *,
    status: RunStatus = RunStatus.COMPLETED,
    at: datetime = NOW,
    body: bytes = b"{}",
    **facts: Any,
) -> Delivered:
    """A callback that says how a run ended."""
    return Delivered(
        delivery=Delivery(
            delivery_id=delivery_id or f"whd_{run_id}",
            received_at=at,
            body=body,
            run_id=run_id,
            event_type=f"run.{status}",
        ),
        observation=Observation(
            run_id=run_id, source=Source.CALLBACK, at=at, status=status, **facts
        ),
    )


def quarantined(delivery_id: str, *, at: datetime = NOW, body: bytes = b"?") -> Delivered:
    """A callback that nobody understands."""
    return Delivered(
        delivery=Delivery(delivery_id=delivery_id, received_at=at, body=body),
        outcome=DeliveryOutcome.QUARANTINED,
        reason="not a JSON object",
    )


def called(run_id: str, **how: Any) -> Observed:
    """What `callback` says of its run, and no delivery."""
    observation = callback(run_id, **how).observation
    assert observation is not None
    return Observed(observation=observation)


def seen(
    run_id: str,
    status: RunStatus = RunStatus.RUNNING,
    *,
    source: Source = Source.POLL,
    at: datetime = NOW,
    facts: dict[str, Any] | None = None,
    **how: Any,
) -> Observed:
    """A observation of a run by the API."""
    observation = Observation(run_id=run_id, source=source, at=at, status=status, **(facts or {}))
    return Observed(observation=observation, **how)


def started(run_id: str, *, at: datetime = NOW, facts: dict[str, Any] | None = None) -> Observed:
    """FLORA's answer to a start of ours, with a callback on its way."""
    entry = seen(
        run_id,
        RunStatus.PENDING,
        source=Source.START,
        at=at,
        facts=facts,
        callback_expected=True,
    )
    return of_start(entry, inputs=[{"id": "prompt", "type": "text", "value": "a cat"}])


async def merge_timeline(db: Database, run_id: str) -> RunState | None:
    """What the run's stored timeline amounts to."""
    run = None
    for event in await events(db, run_id):
        run = merge(run, Observation.from_json(event.detail))
    return run


async def receipts(db: Database) -> dict[str, int]:
    """How often each delivery has come, as the database has it."""
    async with db.read() as connection:
        rows = await connection.execute(select(deliveries.c.delivery_id, deliveries.c.receipts))
        return dict(rows.all())


def body_of(run_id: str, delivery_id: str | None = None, **data: Any) -> bytes:
    """A callback's bytes, of which every version knows that the run was completed."""
    return json.dumps(
        {
            "id": delivery_id or f"whd_{run_id}",
            "type": "run.completed",
            "data": {"run_id": run_id, "status": "completed"} | data,
        }
    ).encode()


def delivery(run_id: str, *, at: datetime = NOW, body: bytes | None = None) -> Delivery:
    """A callback as the receiver stores it."""
    raw = body_of(run_id) if body is None else body
    return Delivery(
        delivery_id=f"whd_{run_id}",
        received_at=at,
        body=raw,
        run_id=run_id,
        event_type="run.completed",
    )


class TestInbox(Inbox):
    """An inbox that is told nothing of secrets."""

    __test__ = False

    def store(self, one: Delivery) -> asyncio.Future[Received]:
        return self.enqueue(SignedDelivery(one, "default", 1))


def open_inbox(db: Database, **options: Any) -> TestInbox:
    """An inbox of the database."""
    return TestInbox(db, **{**PATIENCE, **options})


class TestApplier(Applier):
    """An applier without any settings: these workspaces may have signed all deliveries."""

    __test__ = False
    signers: frozenset[str] | None = None

    def parse(self, delivery: Delivery) -> ParsedDelivery:
        seen = observation_of(delivery.body, at=delivery.received_at)
        if isinstance(seen, str):
            return ParsedDelivery(None, seen)
        return ParsedDelivery(seen, signers=self.signers)


def applier_of(
    db: Database, *, at: datetime = NOW, limit: int = 500, signers: frozenset[str] | None = None
) -> TestApplier:
    """An applier that only applies when it is told to."""
    applier = TestApplier(
        db,
        workspaces=Workspaces([], database=db, clock=lambda: at),
        rules=RULES,
        clock=lambda: at,
        background=False,
        max_group=limit,
    )
    applier.signers = signers
    return applier


async def apply_all(db: Database, *, limit: int = 500, at: datetime = NOW) -> int:
    """Apply all deliveries that wait; how many that were."""
    return await applier_of(db, at=at, limit=limit).drain()


_texts = st.sampled_from(["a", "b", "Größe", "nul \0 in it", "half \ud83d of one"])
_moments = st.integers(0, 10**6).map(lambda n: NOW + timedelta(microseconds=n * 997))
_costs = st.integers(0, 10**7).map(lambda n: Decimal(n) / 10**6)
_outputs = st.lists(
    st.builds(Output, _texts, st.sampled_from(["imageUrl", "text"]), _texts), max_size=3
).map(tuple)


def observations(run_id: str) -> st.SearchStrategy[Observation]:
    """Anything that anybody might say about a run, true or not."""

    def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.none() | values

    return st.builds(
        Observation,
        run_id=st.just(run_id),
        source=st.sampled_from(Source),
        at=_moments,
        status=st.sampled_from(RunStatus),
        progress=maybe(st.sampled_from([0.0, 12.5, 100.0])),
        run_type=maybe(st.sampled_from(["technique", "generation"])),
        workspace_id=maybe(_texts),
        technique_id=maybe(_texts),
        technique_name=maybe(_texts),
        created_at=maybe(_moments),
        started_at=maybe(_moments),
        completed_at=maybe(_moments),
        charged_cost=maybe(_costs),
        error=maybe(st.builds(RunError, _texts, _texts)),
        outputs=maybe(_outputs),
    )


def as_entry(observation: Observation) -> Observed:
    """The entry that brings an observation."""
    return Observed(observation=observation)


def ids(prefix: str, count: int) -> Sequence[str]:
    """That many ids."""
    return [f"{prefix}_{number:04}" for number in range(count)]
