"""Starts whose caller is gone: their runs are found in the history, and nothing is sent."""

import time
from datetime import timedelta
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import FloraError
from tracker.store import starts
from tracker.store.engine import Database
from tracker.store.starts import StartState
from tracker.tracking.ledger import HELD_FOR, HeldStart, holding
from tracker.tracking.originals import Originals
from tracker.tracking.workspaces import Workspace, Workspaces

IN_DOUBT_FOR: Final = timedelta(minutes=15)
"""How long a start is looked for before it counts as unresolved."""
LOOK_SECONDS: Final = 20.0
"""How long FLORA is asked about one start."""

log = structlog.get_logger(__name__)


class Recovery:
    """Brings starts to an end that a crash or a caller's time-out left open."""

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        originals: Originals,
        process: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._originals = originals
        self._process = process
        self._clock = clock

    async def recover(self) -> int:
        """Look once for each open start; returns how many became a run. Raises `StoreUnavailable`.

        One that never left is free to be used again; one that stays in doubt becomes unresolved.
        """
        found = 0
        for row in await starts.open_starts(self._database, self._clock() - HELD_FOR):
            workspace = self._workspaces.at(row.workspace_slot)
            if workspace is None or workspace.client is None:
                continue
            async with holding(self._database, row, self._process, self._clock) as held:
                if held is not None:
                    found += await self._end(workspace, held)
        return found

    async def _end(self, workspace: Workspace, held: HeldStart) -> bool:
        """Bring one start to an end; whether it became a run."""
        row = held.row
        if row.state is StartState.STORED:
            await held.note(StartState.REFUSED, {"message": NEVER_SENT})
        if row.state is not StartState.SENT:
            return False
        try:
            original = await self._originals.find(
                workspace, row, give_up=time.monotonic() + LOOK_SECONDS
            )
        except FloraError as error:
            log.warning("start.recovery_failed", key=held.key, error=str(error))
            return False
        if original is not None:
            await self._originals.adopt(workspace, row, original)
            return True
        if self._clock() - (row.sent_at or row.created_at) >= IN_DOUBT_FOR:
            await held.note(StartState.UNRESOLVED, row.error or {"message": NOT_TOLD})
            log.error("start.unresolved", key=held.key, technique_id=row.technique_id)
        return False


NEVER_SENT: Final = "the process ended before the start was sent; the key may be used again"
NOT_TOLD: Final = "FLORA gave no answer, and the history shows no run that must be this start's"
