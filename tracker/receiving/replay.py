"""A quarantined callback is applied again: after an upgrade, or when a setting has been corrected.

Its bytes were authentic when they came, so the signature is not asked for again (its time would be
long over). It only waits once more, and whoever applies it decides as for every other delivery: one
that is still not understood, or that speaks of another workspace's run, is quarantined again and
says why. One whose run has been removed by retention stays as it is: it would bring that back.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import structlog
from sqlalchemy import Connection

from tracker.core.clock import Clock
from tracker.core.errors import StoreUnavailable, TrackerError
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.polling.workspaces import Workspaces
from tracker.receiving import callback
from tracker.receiving.apply import Applier, Reader
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries import runs as read
from tracker.store.queries.audit import Action
from tracker.store.queries.runs import DeliveryRow
from tracker.store.writing import delivery_rows, retention
from tracker.store.writing.prune import AROUND
from tracker.store.writing.retention import Sighting

APPLIED_BEFORE: Final = "it had been applied before"
LOOKS: Final = 100
LOOK_AGAIN: Final = 0.05
"""How often, and how many seconds apart, it is looked whether another process has applied it."""

log = structlog.get_logger(__name__)


class UnknownDelivery(TrackerError):
    """No callback of that id ever came here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay did. `already` tells that it had been applied before, so that nothing was done;
    `reason` why that is so, or why the delivery is still quarantined."""

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome
    reason: str | None = None
    already: bool = False


class Replayer:
    """Applies stored callbacks again."""

    def __init__(
        self, *, database: Database, applier: Applier, workspaces: Workspaces, clock: Clock
    ) -> None:
        self._database = database
        self._applier = applier
        self._clock = clock
        self._reader = Reader(workspaces)

    async def replay(self, delivery_id: str) -> Replay:
        """Apply one again, if it is understood now; returns after the commit.

        One that waits to be applied is applied. Raises `UnknownDelivery` and `StoreUnavailable`.
        """
        row = await self._row(delivery_id)
        if row.outcome is DeliveryOutcome.APPLIED:
            return _replay(row, reason=await self._applied_before(row), already=True)
        if row.outcome is DeliveryOutcome.QUARANTINED:
            if row.body is None:
                return _replay(row, reason="its body was removed by retention")
            again = self._read_again(row, row.body)
            reason = await self._why_not(again)
            detail = {
                "delivery_id": delivery_id,
                "run_id": again.run_id,
                "still_quarantined": reason,
            }
            entry = audit.entry(Action.REPLAY, self._clock(), **detail)
            log.info("delivery.replayed", actor=entry["actor"], **detail)
            if reason is not None:
                await audit.write(self._database, entry)
                return _replay(row, reason=reason)
            if not await self._database.write(partial(_requeue, again, entry)):
                row = await self._row(delivery_id)  # someone else was quicker
                if row.outcome is DeliveryOutcome.APPLIED:
                    return _replay(row, reason=APPLIED_BEFORE, already=True)
        for _ in range(LOOKS):
            await self._applier.drain()
            row = await self._row(delivery_id)
            if row.outcome is not DeliveryOutcome.WAITING:
                return _replay(row, reason=row.reason)
            await asyncio.sleep(LOOK_AGAIN)
        raise StoreUnavailable(f"delivery {delivery_id} waits, and was not applied in time")

    async def _row(self, delivery_id: str) -> DeliveryRow:
        row = await read.get_delivery(self._database, delivery_id)
        if row is None:
            raise UnknownDelivery(f"no delivery {delivery_id} is kept here")
        return row

    async def _applied_before(self, row: DeliveryRow) -> str:
        kept = row.run_id is None or await read.get_run(self._database, row.run_id)
        return APPLIED_BEFORE if kept else f"{APPLIED_BEFORE}; its run is not kept here any more"

    def _read_again(self, row: DeliveryRow, body: bytes) -> Delivery:
        """The delivery as it reads now. Its id may have stood in a header, which is not kept; when
        it came does not change."""
        signer = self._reader.signer(row.workspace_id)
        again = callback.delivery(body, at=row.received_at, webhook_id=None, signers=[signer])
        return replace(again, delivery_id=row.delivery_id)

    async def _why_not(self, delivery: Delivery) -> str | None:
        """Why it stays in quarantine; `None` where it is worth a try."""
        said = self._reader.read(delivery)
        seen = said.observation
        if seen is None:
            return said.reason
        # A callback comes when its run ends, or soon after.
        began = delivery.received_at - AROUND
        sighting = Sighting(seen.run_id, seen.workspace_id, began)
        if await retention.removed(self._database, [sighting]):
            return (
                f"it is as old as runs that retention has removed, and run {seen.run_id} is not "
                "kept here; `tracker runs track` reads it anew"
            )
        return None


def _requeue(delivery: Delivery, entry: Mapping[str, Any], connection: Connection) -> bool:
    if not delivery_rows.requeue(connection, delivery):
        return False
    audit.note(connection, entry)
    return True


def _replay(row: DeliveryRow, *, reason: str | None, already: bool = False) -> Replay:
    return Replay(
        delivery_id=row.delivery_id,
        run_id=row.run_id,
        outcome=row.outcome,
        reason=reason,
        already=already,
    )
