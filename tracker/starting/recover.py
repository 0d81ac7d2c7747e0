"""Starts in doubt: they are found, sent again if that is safe, or left to a person.

FLORA does not know a key that is still being used, and forgets it after two hours. So a start in
doubt is not sent again before FLORA must be done with it (`doubt`), nor after its key may be
forgotten, nor while the history shows a run that may be its own. Once no callback can tell any more
whose that run is, a person decides. A key that FLORA says is in use (409, 422) is never sent again:
its run is searched for.
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from tracker.core.clock import boot_seconds
from tracker.core.errors import FloraError, SettingsError, StartError
from tracker.core.log import get_logger
from tracker.core.observation import Observation
from tracker.polling.workspaces import Service, Workspace
from tracker.starting.matching import HistoryRead, StartMatcher
from tracker.starting.sending import HELD_FOR, NO_ANSWER, HeldStart, StartSender, holding
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow, StartState

KEY_KEPT: Final = timedelta(minutes=115)
"""How long FLORA surely remembers a key: two hours, the shorter of its two accounts, less a
margin."""
SEARCH_SECONDS: Final = 20.0
"""How long FLORA may take about the starts of one technique."""
SEARCH_WAITS: Final = (timedelta(seconds=1), timedelta(minutes=2))
"""The shortest and the longest wait between two reads of the history for one start; in between it
grows with the time since the start was last sent."""
LISTED_WITHIN: Final = timedelta(minutes=1)
"""How late a run may appear in the history: before, the only run that may be a start's may still be
another's."""
CALLBACKS_WITHIN: Final = timedelta(minutes=15)
"""How long after the end of a run its callback may tell whose it is: FLORA tries for six minutes.
What other starts became is stored by then, too."""
MOST_SHOWN: Final = 5
"""How many runs that a start may have become its last message names."""
_MAY_BE: Final = "; it may have become "

log = get_logger(__name__)


@dataclass(kw_only=True, eq=False)
class Recovery(Service):
    """Ends the doubt about starts. `doubt` is TRACKER_START_DOUBT, `process` names this process."""

    matcher: StartMatcher
    sender: StartSender
    process: str
    doubt: timedelta

    def __post_init__(self) -> None:
        self._searched: dict[tuple[str, str], datetime] = {}
        self._jumped_at = -math.inf

    def clock_jumped(self, _: timedelta) -> None:
        """The clock was set: the age of starts is unknown for a while."""
        self._jumped_at = boot_seconds()

    async def recover(self) -> int:
        """Do what is due for each open start; how many became a run. Raises `StoreUnavailable`.

        Nothing is done directly after the clock was set: first the senders renew their leases.
        """
        if boot_seconds() - self._jumped_at < HELD_FOR.total_seconds():
            return 0
        now = self.clock()
        rows = [row for row in await starts.open_starts(self.database) if not row.is_held(now)]
        keys = {(row.workspace_slot, row.idempotency_key) for row in rows}
        self._searched = {key: at for key, at in self._searched.items() if key in keys}
        if not rows:
            return 0
        by_id = await self._configured()
        groups: dict[tuple[str, str], list[StartRow]] = {}
        for row in rows:
            groups.setdefault((row.workspace_slot, row.technique_id), []).append(row)
        known = [(by_id[slot], group) for (slot, _), group in groups.items() if slot in by_id]
        return sum([await self._recover(workspace, group) for workspace, group in known])

    async def recover_one(self, workspace: Workspace, row: StartRow) -> None:
        """Do what `recover` does, for one start."""
        if row.state in (StartState.SENT, StartState.IN_DOUBT) and not row.is_held(self.clock()):
            await self._recover(workspace, [row])

    async def _configured(self) -> dict[str, Workspace]:
        found = {}
        for workspace in self.workspaces.keyed:
            try:
                found[await self.workspaces.id_of(workspace)] = workspace
            except (FloraError, SettingsError) as error:
                log.warning("start.recovery_failed", error=str(error))
        return found

    async def _recover(self, workspace: Workspace, rows: Sequence[StartRow]) -> int:
        """Mark starts of one technique whose process died as in doubt, and end the doubt about
        those due. The history is read once for all of them."""
        due, technique_id = [], rows[0].technique_id
        for row in rows:
            if row.state is StartState.SENT:
                async with holding(self.database, row, self.process, self.clock) as held:
                    if held is not None and held.row.state is StartState.SENT:
                        error = held.row.error or {"message": NO_ANSWER}
                        await held.record(StartState.IN_DOUBT, error)
                        row = held.row
            if row.state is StartState.IN_DOUBT and self._is_due(row):
                due.append(row)
        if not due:
            return 0
        for row in due:
            self._searched[row.workspace_slot, row.idempotency_key] = self.clock()
        since = min(row.first_sent for row in due)
        read, since_jump = None, boot_seconds() - self._jumped_at
        try:
            give_up = time.monotonic() + SEARCH_SECONDS
            read = await self.matcher.read(workspace, technique_id, since, give_up=give_up)
        except FloraError as error:
            log.warning("start.recovery_failed", technique_id=technique_id, error=str(error))
        found = 0
        for row in due:
            async with holding(self.database, row, self.process, self.clock) as held:
                if held is not None and held.row.state is StartState.IN_DOUBT:
                    found += await self._end_doubt(workspace, held, read, since_jump)
        return found

    async def _end_doubt(
        self, workspace: Workspace, held: HeldStart, read: HistoryRead | None, since_jump: float
    ) -> bool:
        """End the doubt about one start, if possible now; whether it became a run.

        `since_jump` is how many seconds before the read the clock was last set.
        """
        row = held.row
        read_after = read is not None and read.begun_at >= self._window_ends(row)
        if row.is_known_to_flora:
            listed = read is not None and read.begun_at >= self._looked_for_from(row)
            run = await self.matcher.find(row, read) if read is not None and listed else None
            if run:
                await self.matcher.adopt(row, run.run_id, run)
                log.info("start.found", key=held.key, run_id=run.run_id)
                return True
        runs = {} if read is None else read.runs
        possible = await starts.possible(self.database, row, row.possible_runs or runs)
        shown = [runs.get(run_id) for run_id in possible]
        since_jump = min(since_jump, boot_seconds() - self._jumped_at)  # it was set meanwhile
        is_over = read_after and since_jump >= self.doubt.total_seconds()
        all_listed_at = self._all_listed_at(row)
        error = row.error
        if (
            possible
            and read is not None
            and read.begun_at >= all_listed_at
            and since_jump >= (all_listed_at - row.last_sent).total_seconds()
        ):
            error = row.with_possible(possible)  # what is listed later was started by someone else
        if self._is_forgotten(row) or (read_after and self._nothing_tells(row, shown)):
            await self._leave_to_a_person(held, error, possible)
            return False
        if error != row.error:
            await held.record(StartState.IN_DOUBT, error)
        if row.is_known_to_flora or possible or not is_over:
            return False  # unless it is over, FLORA may be at work on it
        log.info("start.sent_again", key=held.key, technique_id=row.technique_id)
        try:
            await self.sender.send(workspace, held, deadline=SEARCH_SECONDS)
        except (FloraError, StartError) as error:
            log.warning("start.recovery_failed", key=held.key, error=str(error))
            return False
        return True

    async def _leave_to_a_person(
        self, held: HeldStart, error: dict[str, Any] | None, possible: Collection[str]
    ) -> None:
        await held.record(StartState.UNRESOLVED, naming(error, possible))
        log.error(
            "start.unresolved",
            key=held.key,
            technique_id=held.row.technique_id,
            advice="tracker starts resolve",
        )

    def _looked_for_from(self, row: StartRow) -> datetime:
        """From when on the history helps: the run of a known key is listed then; of another key,
        FLORA is done with the request."""
        wait = LISTED_WITHIN if row.is_known_to_flora else self.doubt
        return row.last_sent + wait

    def _window_ends(self, row: StartRow) -> datetime:
        """Until when FLORA may be at work on the last request, or be about to list its run."""
        window = max(self.doubt, LISTED_WITHIN) if row.is_known_to_flora else self.doubt
        return row.last_sent + window

    def _all_listed_at(self, row: StartRow) -> datetime:
        """From when on the history lists every run that the start can have become."""
        return self._window_ends(row) + LISTED_WITHIN

    def _nothing_tells(self, row: StartRow, possible: Sequence[Observation | None]) -> bool:
        """Whether FLORA knows it and shows no run that it may have become, or it may have become
        one of these and their callbacks come no more; `None` is one that is not listed any more."""
        if not possible:
            return row.is_known_to_flora
        age = self.clock() - row.last_sent
        return age >= CALLBACKS_WITHIN and all(map(_callback_is_over, possible))

    def _is_forgotten(self, row: StartRow) -> bool:
        """Whether FLORA may have forgotten the key; assumed if the clock was set back, since the
        age of the start is unknown then."""
        age = self.clock() - row.first_sent
        return age >= KEY_KEPT or self._is_ahead(row)

    def _is_ahead(self, row: StartRow) -> bool:
        """Whether it was sent at what is the future since the clock was set back."""
        return row.last_sent > self.clock() + starts.SET_BACK

    def _is_due(self, row: StartRow) -> bool:
        """Whether the history may help now, and was not read for it a moment ago."""
        now = self.clock()
        if self._is_ahead(row):
            return True
        if now < self._looked_for_from(row):
            return False  # until then only a callback helps
        searched = self._searched.get((row.workspace_slot, row.idempotency_key))
        if searched is None or searched > now:
            return True
        if any(searched < at <= now for at in (self._window_ends(row), self._all_listed_at(row))):
            return True
        least, most = SEARCH_WAITS
        return now - searched >= min(max((now - row.last_sent) / 6, least), most)


def naming(error: dict[str, Any] | None, possible: Collection[str]) -> dict[str, Any]:
    """The last answer of a start that is left to a person, with the runs that it may have become
    in its message."""
    error = error or {"message": NO_ANSWER}
    message = str(error.get("message")).partition(_MAY_BE)[0]
    if possible:
        shown = sorted(possible)[:MOST_SHOWN]
        shown += [f"{len(possible) - MOST_SHOWN} more"] * (len(possible) > MOST_SHOWN)
        message += _MAY_BE + ", ".join(shown)
    return error | {"message": message}


def _callback_is_over(run: Observation | None) -> bool:
    """Whether the run ended so long ago that its callback comes no more."""
    if run is None or not run.precedence.ended or run.completed_at is None:
        return False
    by_flora = run.read_at + timedelta(seconds=run.clock_skew or 0.0)
    return by_flora - run.completed_at >= CALLBACKS_WITHIN
