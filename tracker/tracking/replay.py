"""A quarantined callback is read again: after an upgrade, or when a setting has been corrected.

Its bytes were authentic when they came, so the signature is not asked for again (its time would be
long over). What is asked again is whether the body is understood, and whether it speaks of the
workspace whose secret signed it. One that still fails stays as it is, and says why.
"""

from dataclasses import dataclass, replace

from tracker.core.clock import Clock
from tracker.core.entry import DeliveryOutcome, Replayed
from tracker.core.errors import TrackerError
from tracker.sources import callback
from tracker.store import read
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.store.read import DeliveryRow
from tracker.tracking.workspaces import Workspaces


class UnknownDelivery(TrackerError):
    """No callback of that id ever came here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay did. `reason` tells why the delivery is still quarantined; `already` that it
    had been applied before, so that nothing was done."""

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome
    reason: str | None = None
    already: bool = False


class Replayer:
    """Reads stored callbacks again."""

    def __init__(
        self, *, database: Database, door: Door, workspaces: Workspaces, clock: Clock
    ) -> None:
        self._database = database
        self._door = door
        self._workspaces = workspaces
        self._clock = clock

    async def replay(self, delivery_id: str) -> Replay:
        """Read one again, and apply it if it is understood now; returns after the commit.

        Raises `UnknownDelivery` and `StoreUnavailable`.
        """
        row = await read.get_delivery(self._database, delivery_id)
        if row is None or row.body is None:
            raise UnknownDelivery(f"no delivery {delivery_id} is kept here")
        if row.outcome is DeliveryOutcome.APPLIED:
            return Replay(
                delivery_id=delivery_id, run_id=row.run_id, outcome=row.outcome, already=True
            )
        entry, reason = self._read(row, row.body)
        if entry is None:
            return Replay(
                delivery_id=delivery_id, run_id=row.run_id, outcome=row.outcome, reason=reason
            )
        passed = await self._door.put(entry)
        return Replay(
            delivery_id=delivery_id,
            run_id=entry.observation.run_id,
            outcome=DeliveryOutcome.APPLIED,
            already=passed.repeated,
        )

    def _read(self, row: DeliveryRow, body: bytes) -> tuple[Replayed | None, str | None]:
        """The entry that the delivery makes now; or `None`, and why there is none."""
        signer = self._signer(row)
        again = callback.read(body, at=self._clock(), webhook_id=None, workspace_id=signer)
        seen = again.observation
        if seen is None:
            return None, again.delivery.reason
        named = seen.workspace_id
        if signer is None and named is not None and self._workspaces.of(named) is None:
            return None, f"it speaks of workspace {named}, which is not configured here"
        # The id may have stood in a header, which is not kept; when it came does not change.
        delivery = replace(again.delivery, delivery_id=row.delivery_id, received_at=row.received_at)
        return Replayed(delivery=delivery, observation=seen), None

    def _signer(self, row: DeliveryRow) -> str | None:
        """The workspace whose secret signed it, as long as one of that id is configured.

        Where none is, the id was a mistake in the settings, or nobody knew one when it came.
        """
        known = {workspace.workspace_id for workspace in self._workspaces}
        return row.workspace_id if row.workspace_id in known else None
