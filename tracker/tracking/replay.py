"""A quarantined callback is read again: after an upgrade, or when a setting has been corrected.

Its bytes were authentic when they came, so the signature is not asked for again (its time would be
long over). What is asked again is whether the body is understood, and whether it speaks of the
workspace whose secret signed it, and of a run of that. One that still fails stays as it is, and
says why. So does one whose run has been removed by retention: it would bring that back.
"""

from dataclasses import dataclass, replace
from typing import Final

from tracker.core.clock import Clock
from tracker.core.entry import DeliveryOutcome, Replayed
from tracker.core.errors import TrackerError
from tracker.sources import callback
from tracker.store import read, retention
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.store.prune import AROUND
from tracker.store.read import DeliveryRow
from tracker.store.retention import Sighting
from tracker.tracking.belonging import not_theirs
from tracker.tracking.workspaces import Workspaces

APPLIED_BEFORE: Final = "it had been applied before"


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
        if row is None:
            raise UnknownDelivery(f"no delivery {delivery_id} is kept here")
        if row.outcome is DeliveryOutcome.APPLIED:
            return Replay(
                delivery_id=delivery_id,
                run_id=row.run_id,
                outcome=row.outcome,
                reason=await self._applied_before(row),
                already=True,
            )
        entry, reason = self._read(row)
        if entry is not None and len(self._workspaces) > 1:
            seen = entry.observation
            reason = await not_theirs(self._database, seen, {seen.workspace_id})
            entry = None if reason else entry
        if entry is not None and await self._is_removed(entry):
            reason = (
                f"it is as old as runs that retention has removed, and run "
                f"{entry.observation.run_id} is not kept here; `tracker runs track` reads it anew"
            )
            entry = None
        if entry is None:
            return Replay(
                delivery_id=delivery_id, run_id=row.run_id, outcome=row.outcome, reason=reason
            )
        passed = await self._door.put(entry)
        return Replay(
            delivery_id=delivery_id,
            run_id=entry.observation.run_id,
            outcome=DeliveryOutcome.APPLIED,
            reason=APPLIED_BEFORE if passed.repeated else None,
            already=passed.repeated,
        )

    async def _applied_before(self, row: DeliveryRow) -> str:
        kept = row.run_id is None or await read.get_run(self._database, row.run_id)
        return APPLIED_BEFORE if kept else f"{APPLIED_BEFORE}; its run is not kept here any more"

    async def _is_removed(self, entry: Replayed) -> bool:
        """Whether the run may have been removed; a callback comes when it ends, or soon after."""
        seen = entry.observation
        began = entry.delivery.received_at - AROUND
        sighting = Sighting(seen.run_id, seen.workspace_id, began)
        return bool(await retention.removed(self._database, [sighting]))

    def _read(self, row: DeliveryRow) -> tuple[Replayed | None, str | None]:
        """The entry that the delivery makes now; or `None`, and why there is none."""
        if row.body is None:
            return None, "its body was removed by retention"
        signer = self._signer(row)
        again = callback.read(row.body, at=self._clock(), webhook_id=None, workspace_id=signer)
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
