"""Starts in doubt: they are looked for, sent again where that is safe, or left to a person.

FLORA does not know a key that is still being used, and forgets it after two hours. So a start in
doubt is not sent again before FLORA must be done with it (`doubt`), nor after its key may be
forgotten, nor while the history shows a run that may be its own. What FLORA says is in use (409,
422) is never sent again: its run is looked for.
"""

import math
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import structlog

from tracker.core.clock import Clock, boot_seconds
from tracker.core.errors import FloraError, SettingsError, StartError
from tracker.polling.workspaces import Workspace, WorkspaceIds, Workspaces
from tracker.starting.held_start import HELD_FOR, HeldStart, holding
from tracker.starting.matching import HistoryRead, Originals
from tracker.starting.sending import NO_ANSWER, Sender
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow, StartState

KEY_KEPT: Final = timedelta(minutes=115)
"""So long FLORA surely remembers a key: two hours, the shorter of its two accounts, less a
margin."""
LOOK_SECONDS: Final = 20.0
"""How long FLORA is asked about the starts of one technique."""
LOOK_WAITS: Final = (timedelta(seconds=1), timedelta(minutes=2))
"""The shortest and the longest wait between two reads of the history for one start; in between it
grows with the time since its last sending."""
LISTED_WITHIN: Final = timedelta(minutes=1)
"""A run is in the history after this: where FLORA knows a key, its run is looked for so long at
least."""

AHEAD: Final = timedelta(minutes=5)
"""A start that was sent further ahead than this was sent before the clock was set back. Less than
that is within the margin of `KEY_KEPT`."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Group:
    """Starts in doubt of one technique, for which the history is read once."""

    workspace: Workspace
    technique_id: str
    rows: list[StartRow]


class Recovery:
    """Brings starts in doubt to an end. `doubt` is TRACKER_START_DOUBT."""

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        ids: WorkspaceIds,
        originals: Originals,
        sender: Sender,
        process: str,
        doubt: timedelta,
        clock: Clock,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._ids = ids
        self._originals = originals
        self._sender = sender
        self._process = process
        self._doubt = doubt
        self._clock = clock
        self._looked: dict[tuple[str, str], datetime] = {}
        self._jumped_at = -math.inf

    def clock_jumped(self) -> None:
        """The clock was set: how long ago a start was sent is not known for a while."""
        self._jumped_at = boot_seconds()

    async def recover(self) -> int:
        """Do what is due for each open start; how many became a run. Raises `StoreUnavailable`.

        Nothing is done right after the clock was set: first those who are sending hold their starts
        anew.
        """
        if boot_seconds() - self._jumped_at < HELD_FOR.total_seconds():
            return 0
        rows = [row for row in await starts.open_starts(self._database) if not self._is_held(row)]
        keys = {(row.workspace_slot, row.idempotency_key) for row in rows}
        self._looked = {key: at for key, at in self._looked.items() if key in keys}
        if not rows:
            return 0
        by_id = await self._configured()
        groups: dict[tuple[str, str], _Group] = {}
        for row in rows:
            workspace = by_id.get(row.workspace_slot)
            if workspace is not None:
                key = (row.workspace_slot, row.technique_id)
                groups.setdefault(key, _Group(workspace, row.technique_id, [])).rows.append(row)
        return sum([await self._recover(group) for group in groups.values()])

    async def look(self, workspace: Workspace, row: StartRow) -> None:
        """As `recover`, for one start."""
        if row.state in (StartState.SENT, StartState.IN_DOUBT) and not self._is_held(row):
            await self._recover(_Group(workspace, row.technique_id, [row]))

    async def _configured(self) -> dict[str, Workspace]:
        found = {}
        for workspace in self._workspaces:
            if workspace.client is None:
                continue
            try:
                found[await self._ids.of(workspace)] = workspace
            except (FloraError, SettingsError) as error:
                log.warning("start.recovery_failed", error=str(error))
        return found

    async def _recover(self, group: _Group) -> int:
        """Note the doubt in which a process left a start that died, and look for what is due."""
        due = []
        for row in group.rows:
            if row.state is StartState.SENT:
                async with holding(self._database, row, self._process, self._clock) as held:
                    if held is not None and held.row.state is StartState.SENT:
                        error = held.row.error or {"message": NO_ANSWER}
                        await held.note(StartState.IN_DOUBT, error)
                        row = held.row
            if row.state is StartState.IN_DOUBT and self._is_due(row):
                due.append(row)
        if not due:
            return 0
        for row in due:
            self._looked[row.workspace_slot, row.idempotency_key] = self._clock()
        since = min(row.in_use_since or row.created_at for row in due)
        read = None
        try:
            read = await self._originals.read(
                group.workspace,
                group.technique_id,
                since,
                give_up=time.monotonic() + LOOK_SECONDS,
            )
        except FloraError as error:
            log.warning("start.recovery_failed", technique_id=group.technique_id, error=str(error))
        found = 0
        for row in due:
            async with holding(self._database, row, self._process, self._clock) as held:
                if held is not None and held.row.state is StartState.IN_DOUBT:
                    found += await self._end(group.workspace, held, read)
        return found

    async def _end(self, workspace: Workspace, held: HeldStart, read: HistoryRead | None) -> bool:
        """Bring one start in doubt to an end, where that can be done now; whether it is a run."""
        row = held.row
        window_ends = self._window_ends(row)
        looked_after = read is not None and read.begun_at >= window_ends
        if row.is_known_to_flora:
            original = read and await self._originals.find(workspace, row, read)
            if original:
                await self._originals.adopt(row.workspace_slot, row, original)
                log.info("start.found", key=held.key, run_id=original.run_id)
                return True
            if looked_after or self._is_forgotten(row):
                await self._leave_to_a_person(held)
            return False
        if self._is_forgotten(row):
            await self._leave_to_a_person(held)
            return False
        if read is None or not looked_after:
            return False
        if await self._originals.unaccounted(workspace, row, read):
            return False
        if boot_seconds() - self._jumped_at < self._doubt.total_seconds():
            return False  # FLORA may be at work on it all the same
        log.info("start.sent_again", key=held.key, technique_id=row.technique_id)
        try:
            await self._sender.send(workspace, held, deadline=LOOK_SECONDS)
        except (FloraError, StartError) as error:
            log.warning("start.recovery_failed", key=held.key, error=str(error))
            return False
        return True

    async def _leave_to_a_person(self, held: HeldStart) -> None:
        await held.note(StartState.UNRESOLVED, held.row.error or {"message": NO_ANSWER})
        log.error(
            "start.unresolved",
            key=held.key,
            technique_id=held.row.technique_id,
            advice="tracker starts resolve",
        )

    def _is_held(self, row: StartRow) -> bool:
        return row.is_held(self._clock())

    def _window_ends(self, row: StartRow) -> datetime:
        """Until when FLORA may still be at work on the last request."""
        window = max(self._doubt, LISTED_WITHIN) if row.is_known_to_flora else self._doubt
        return (row.sent_at or row.created_at) + window

    def _is_forgotten(self, row: StartRow) -> bool:
        """Whether FLORA may have forgotten the key: certainly where the clock was set back, so that
        how long ago it was sent is not known."""
        age = self._clock() - (row.in_use_since or row.created_at)
        return age >= KEY_KEPT or self._is_ahead(row)

    def _is_ahead(self, row: StartRow) -> bool:
        """Whether it was sent in what is the future since the clock was set back."""
        return (row.sent_at or row.created_at) > self._clock() + AHEAD

    def _is_due(self, row: StartRow) -> bool:
        """Whether the history can tell something now, and was not asked just before."""
        now = self._clock()
        if self._is_ahead(row):
            return True
        if not row.is_known_to_flora and now < self._window_ends(row):
            return False  # until then only a callback tells
        looked = self._looked.get((row.workspace_slot, row.idempotency_key))
        if looked is None or looked > now or looked < self._window_ends(row) <= now:
            return True
        least, most = LOOK_WAITS
        return now - looked >= min(max((now - (row.sent_at or now)) / 6, least), most)
