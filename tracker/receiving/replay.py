"""A quarantined callback is applied again, after an upgrade or when a setting has been corrected,
or acknowledged: someone has seen it, and nothing is to be done.

Its signature was verified on receipt and is not checked again (its time would be too old). The
delivery waits once more, and is applied or quarantined like every other. One whose run has been
removed by retention stays quarantined, because it would bring the run back.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection

from tracker.core.errors import StoreUnavailable, TrackerError
from tracker.core.log import get_logger
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.flora.callback import delivery_of
from tracker.receiving.apply import Applier, parse_stored
from tracker.store.queries import audit, deliveries
from tracker.store.queries.audit import Action
from tracker.store.queries.deliveries import DeliveryRow, get_delivery
from tracker.store.queries.runs import get_run
from tracker.store.writing import retention
from tracker.store.writing.retention import AROUND, ListedRun
from tracker.workspaces import Service

APPLIED_BEFORE: Final = "it had been applied before"
ACKNOWLEDGED_AT_ONCE: Final = 500
"""Deliveries that one transaction acknowledges."""
CHECKS: Final = 100
CHECK_SECONDS: Final = 0.05
"""How often it is checked whether another process has applied the delivery."""

log = get_logger(__name__)


class UnknownDelivery(TrackerError):
    """No callback of that id is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The result of a replay.

    `already` is true if the delivery had been applied before, so that nothing was done. `reason` is
    why, or why it is still quarantined.
    """

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome | str
    reason: str | None = None
    already: bool = False


@dataclass(kw_only=True, eq=False)
class Replayer(Service):
    """Applies stored callbacks again, or marks them as seen."""

    applier: Applier

    async def replay(self, delivery_id: str) -> Replay:
        """Apply a delivery that is waiting, or quarantined and understood now; returns after the
        commit.

        Raises `UnknownDelivery` and `StoreUnavailable`.
        """
        row = await self._row(delivery_id)
        if row.outcome is DeliveryOutcome.APPLIED:
            kept = row.run_id is None or await get_run(self.database, row.run_id)
            gone = "" if kept else "; its run has been deleted"
            return _replay(row, reason=f"{APPLIED_BEFORE}{gone}", already=True)
        if row.outcome is DeliveryOutcome.QUARANTINED:
            if row.body is None:
                return _replay(row, reason="its body was removed by retention")
            again = self._parse_again(row, row.body)
            reason = await self._why_not(again)
            detail = {
                "delivery_id": delivery_id,
                "run_id": again.run_id,
                "still_quarantined": reason,
            }
            entry = audit.entry(Action.REPLAY, self.clock(), **detail)
            log.info("delivery.replayed", actor=entry["actor"], **detail)
            if reason is not None:
                await audit.write(self.database, entry)
                return _replay(row, reason=reason)
            if not await self.database.write(partial(_requeue, again, entry)):
                row = await self._row(delivery_id)  # another process was quicker
                if row.outcome is DeliveryOutcome.APPLIED:
                    return _replay(row, reason=APPLIED_BEFORE, already=True)
        for _ in range(CHECKS):
            await self.applier.drain()
            row = await self._row(delivery_id)
            if row.outcome is not DeliveryOutcome.WAITING:
                return _replay(row, reason=row.reason)
            await asyncio.sleep(CHECK_SECONDS)
        raise StoreUnavailable(f"delivery {delivery_id} waits, and was not applied in time")

    async def acknowledge(self, delivery_ids: Sequence[str]) -> list[str]:
        """Mark quarantined deliveries as seen: they stay, can be replayed, and are not counted as
        problems any more. Returns the ids of those that were not acknowledged before.

        Raises `StoreUnavailable`.
        """
        done: list[str] = []
        for first in range(0, len(delivery_ids), ACKNOWLEDGED_AT_ONCE):
            some = delivery_ids[first : first + ACKNOWLEDGED_AT_ONCE]
            entry = audit.entry(Action.ACKNOWLEDGE, self.clock())
            done += await self.database.write(partial(_acknowledge, some, entry))
        return done

    async def _row(self, delivery_id: str) -> DeliveryRow:
        row = await get_delivery(self.database, delivery_id)
        if row is None:
            raise UnknownDelivery(f"there is no delivery {delivery_id}")
        return row

    def _parse_again(self, row: DeliveryRow, body: bytes) -> Delivery:
        """The delivery as it is parsed now; its id may come from a header, which is not kept."""
        signer = row.workspace_id if self.workspaces.has(row.workspace_id) else None
        again = delivery_of(body, at=row.received_at, signers=[signer])
        return replace(again, delivery_id=row.delivery_id)

    async def _why_not(self, delivery: Delivery) -> str | None:
        parsed = parse_stored(self.workspaces, delivery)
        seen = parsed.observation
        if seen is None:
            return parsed.reason
        # A callback comes when its run ends, or soon after.
        listed = ListedRun(seen.run_id, seen.workspace_id, delivery.received_at - AROUND)
        if await retention.find_removed(self.database, [listed]):
            return (
                f"it is as old as runs that retention has removed, and run {seen.run_id} is not "
                "kept here; `tracker runs track` reads it again"
            )
        return None


def _acknowledge(
    delivery_ids: Sequence[str], entry: Mapping[str, Any], connection: Connection
) -> list[str]:
    marked = deliveries.acknowledge(connection, delivery_ids, entry["at"])
    for delivery_id in marked:
        audit.note(connection, {**entry, "detail": {"delivery_id": delivery_id}})
    return marked


def _requeue(delivery: Delivery, entry: Mapping[str, Any], connection: Connection) -> bool:
    if not deliveries.requeue(connection, delivery):
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
