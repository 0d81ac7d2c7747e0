"""A made-up day of runs for the screenshots, stored through the writer.

The same seed gives the same day; it always ends now.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Final

from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, Entry, Observed, StartFacts
from tracker.core.run import Output, RunError, RunStatus
from tracker.receiving.receive import SignedDelivery
from tracker.services import Services
from tracker.simulator.catalogue import SimulatedTechnique, load_catalogue
from tracker.store.queries import sweeps
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.sweeps import Interval

BUSIEST: Final = 34
"""Runs in the busiest hour."""
WAYS: Final = (("callback", 0.84), ("poll", 0.11), ("history", 0.05))
BILL_CHECKED_AFTER: Final = timedelta(seconds=90)
ERRORS: Final = (
    ("provider_error", "The model provider did not answer."),
    ("safety_blocked", "The prompt was refused by the safety filter."),
    ("model_timeout", "The model took too long."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Life:
    """One run, from its start to the poll of its details."""

    run_id: str
    technique: SimulatedTechnique
    workspace_id: str
    began: datetime
    ended: datetime
    via: str
    known: datetime
    read: datetime
    failed: bool
    error: tuple[str, str]


async def store_a_day(services: Services, *, now: datetime, seed: int) -> int:
    """Fill an empty tracker with the last day; the number of runs."""
    dice = random.Random(seed)
    workspace = next(iter(services.workspaces)).workspace_id or "ws_simulator"
    lives = list(_lives(dice, now, workspace))
    for life in lives:
        for entry in _entries(life):
            if isinstance(entry, Delivery):
                await services.inbox.enqueue(SignedDelivery(entry, "default", 1))
                await services.applier.drain()
            else:
                await services.writer.submit(entry)
    for delivery in _strange(now):
        await services.inbox.enqueue(SignedDelivery(delivery, "default", 1))
    await services.applier.drain()
    for minutes in range(240, 2, -5):
        at = now - timedelta(minutes=minutes)
        number = await sweeps.begin(services.database, workspace, at)
        failed = minutes == 90
        await sweeps.finish(
            services.database,
            number,
            at=at + timedelta(seconds=dice.uniform(0.3, 2)),
            pages=dice.randint(1, 2),
            items=dice.randint(60, 180),
            discovered=dice.choice((0, 0, 0, 1)),
            repaired=dice.choice((0, 0, 1, 2)),
            through=None if failed else at,
            error="FLORA answered 503 service_unavailable: try again later" if failed else None,
        )
    first, gap = now - timedelta(days=7), now - timedelta(days=2, hours=5)
    last = now - timedelta(minutes=5)
    read = partial(coverage.add, services.database, workspace, "technique")
    await read(
        Interval(from_at=first, to_at=gap, read_at=now),
        Interval(
            from_at=gap + timedelta(hours=1),
            to_at=last,
            read_at=now,
            error="FLORA answered 400 input_validation_error: The list cannot be read.",
            failures=2,
            retry_at=now + timedelta(minutes=8),
        ),
    )
    return len(lives)


def _lives(dice: random.Random, now: datetime, workspace: str) -> Iterator[_Life]:
    techniques = list(load_catalogue().values())
    popular = [1 / (1 + position) for position in range(len(techniques))]
    dice.shuffle(techniques)
    for hour in range(24, 0, -1):
        clock = (now - timedelta(hours=hour)).hour
        busy = 0.12 + max(0.0, math.sin((clock - 6) / 15 * math.pi)) if 6 <= clock <= 21 else 0.08
        for _ in range(round(BUSIEST * busy * dice.uniform(0.75, 1.2))):
            began = now - timedelta(hours=hour) + timedelta(seconds=dice.uniform(0, 3400))
            ended = began + timedelta(seconds=min(dice.lognormvariate(3.2, 0.6), 150))
            via = dice.choices([way for way, _ in WAYS], [share for _, share in WAYS])[0]
            wait = {
                "callback": dice.lognormvariate(-0.6, 0.5),
                "poll": dice.uniform(4, 30),
                "history": dice.uniform(30, 240),
            }[via]
            known = ended + timedelta(seconds=wait)
            if known > now - timedelta(minutes=3):
                continue
            yield _Life(
                run_id=f"run_{dice.randbytes(10).hex()}",
                technique=dice.choices(techniques, popular)[0],
                workspace_id=workspace,
                began=began,
                ended=ended,
                via=via,
                known=known,
                read=known + timedelta(seconds=dice.uniform(0.1, 0.8)),
                failed=dice.random() < 0.09,
                error=dice.choice(ERRORS),
            )


def _entries(life: _Life) -> Iterator[Entry | Delivery]:
    technique = life.technique
    common: dict[str, Any] = {
        "run_id": life.run_id,
        "run_type": "technique",
        "workspace_id": life.workspace_id,
        "technique_id": technique.technique_id,
        "technique_name": technique.name,
        "created_at": life.began,
    }
    yield Observed(
        observation=Observation(
            **common, source=Source.START, at=life.began, status=RunStatus.PENDING
        ),
        start=StartFacts(
            workspace_id=life.workspace_id,
            idempotency_key=f"key-{life.run_id}",
            inputs=technique.sample_inputs(),
        ),
        callback_expected=True,
    )
    status = RunStatus.FAILED if life.failed else RunStatus.COMPLETED
    if life.via == "callback":
        yield _callback(life, status)
    error = RunError(*life.error) if life.failed else None
    outputs = () if life.failed else _outputs(technique)
    end = Observation(
        **common,
        source=Source.HISTORY if life.via == "history" else Source.POLL,
        at=life.read,
        status=status,
        progress=100,
        started_at=life.began + timedelta(seconds=1),
        completed_at=life.ended,
        charged_cost=Decimal(0 if life.failed else str(technique.run_cost)),
        error=error,
        outputs=outputs,
    )
    yield Observed(observation=end, reads=1)
    yield Observed(observation=replace(end, at=life.read + BILL_CHECKED_AFTER), reads=1)


def _outputs(technique: SimulatedTechnique) -> tuple[Output, ...]:
    return tuple(
        Output(port.id, port.type, f"https://media.example.com/{port.id}")
        for port in technique.outputs
    )


def _callback(life: _Life, status: RunStatus) -> Delivery:
    delivery_id = f"whd_{life.run_id[4:]}"
    body = {
        "id": delivery_id,
        "type": f"run.{status}",
        "api_version": "2026-06-11",
        "created_at": round(life.ended.timestamp() * 1000),
        "data": {
            "run_id": life.run_id,
            "run_type": "technique",
            "workspace_id": life.workspace_id,
            "status": status.value,
        },
    }
    return Delivery(
        delivery_id=delivery_id,
        received_at=life.known,
        body=json.dumps(body, separators=(",", ":")).encode(),
        run_id=life.run_id,
        event_type=f"run.{status}",
        api_version="2026-06-11",
        workspace_id=life.workspace_id,
        created_at=life.ended,
    )


def _strange(now: datetime) -> list[Delivery]:
    """Two callbacks in quarantine: one of an unknown kind, one of another workspace."""
    paused = {"id": "whd_5f0c", "type": "run.paused", "data": {"run_id": "run_77aa"}}
    foreign = {
        "id": "whd_9b1e",
        "type": "run.completed",
        "api_version": "2026-06-11",
        "created_at": round((now - timedelta(minutes=40)).timestamp() * 1000),
        "data": {"run_id": "run_c0ffee", "workspace_id": "ws_elsewhere", "status": "completed"},
    }
    return [
        Delivery(
            delivery_id=str(body["id"]),
            received_at=now - timedelta(minutes=minutes),
            body=json.dumps(body).encode(),
            run_id=body["data"]["run_id"],  # type: ignore[index]
            event_type=str(body["type"]),
        )
        for body, minutes in ((paused, 25), (foreign, 40))
    ]
