"""Starts in doubt: they are found, sent again if that is safe, or left to a person.

FLORA does not know a key that is still being used, and forgets it after two hours. So a start in
doubt is not sent again before FLORA must be done with it (`doubt`), nor after its key may be
forgotten, nor while the history shows a run that may be its own. Once no callback can tell any more
whose that run is, a person decides. A key that FLORA says is in use (409, 422) is never sent again:
its run is searched for.

A run in the history belongs to no start by itself: colleagues start the same technique. It is
matched with a start only if FLORA says, by 409 or 422, that the start's key is in use, and exactly
one run of the technique that became known since the first sending is not accounted for. What is
compared are the times at which runs became known here. FLORA's creation times are compared with
each other alone: its clock may differ from ours and from the header `Date`, and be set.
"""

import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from tracker.core.errors import FloraError, FloraRefusal, SettingsError, StartError
from tracker.core.log import get_logger
from tracker.core.observation import Observation
from tracker.flora.client import HistoryPage
from tracker.polling.history import HistoryWalk, WalkedPage, oldest
from tracker.starting.sending import HELD_FOR, NO_ANSWER, HeldStart, StartSender, holding
from tracker.store.clock import SharedClock
from tracker.store.queries import starts
from tracker.store.queries.starts import SentClock, StartRow, StartState
from tracker.workspaces import Service, Workspace

KEY_KEPT: Final = timedelta(minutes=115)
"""How long FLORA surely remembers a key: two hours, the shorter of its two accounts, less a
margin."""
SEARCH_SECONDS: Final = 300.0
"""How long the history may be read for the starts of one technique: a large batch fills a hundred
pages."""
SEND_SECONDS: Final = 20.0
"""How long a start may wait until it is sent again."""
SEARCH_WAITS: Final = (timedelta(seconds=1), timedelta(minutes=2))
"""The shortest and the longest wait between two reads of the history for one start; in between it
grows with the time since the start was last sent."""
LISTED_WITHIN: Final = timedelta(minutes=1)
"""How late a run may appear in the history: before, the only run that may be a start's may still be
another's."""
CALLBACKS_WITHIN: Final = timedelta(minutes=15)
"""How long after the end of a run its callback may tell whose it is: FLORA tries for six minutes.
What other starts became is stored by then, too."""
READ_BELOW: Final = timedelta(hours=2)
"""How far the history is read below the runs that were known before a start: FLORA's clock may have
been set back by an hour, and the list is only roughly sorted by creation."""
FIRST_READ: Final = timedelta(days=3)
"""How far the history is read where none was known before a start: FLORA's clock differs from ours
and from `Date` by less."""
PAGE_SECONDS: Final = 20.0
"""How long FLORA may take for a page."""
MOST_SHOWN: Final = 5
"""How many runs that a start may have become its last message names."""
_MAY_BE: Final = "; it may have become "

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRead:
    """The runs of a technique, or that may be, down to those that were surely known before some
    time, by id; `begun` is when the read began, by `SharedClock.seconds`."""

    begun: float
    runs: dict[str, Observation]


@dataclass(frozen=True, slots=True)
class DoubtTimes:
    """The times of a start in doubt. `doubt` is how long FLORA may be at work on a request.

    They are measured in `SharedClock.seconds` where it is known when it was sent by these, else by
    the clock as it is set now.
    """

    row: StartRow
    clock: SharedClock
    doubt: timedelta

    @property
    def sent(self) -> SentClock | None:
        return self.row.sent_by(self.clock.boot)

    @property
    def first_sent(self) -> datetime:
        """When it was first sent, rather too early, by the clock as it is set now."""
        by_clock, sent = self.row.first_sent, self.sent
        return by_clock if sent is None else min(by_clock, self.clock.at(sent.seconds))

    @property
    def window(self) -> timedelta:
        """How long FLORA may be at work on the last request, or be about to list its run."""
        return max(self.doubt, LISTED_WITHIN) if self.row.is_known_to_flora else self.doubt

    @property
    def listed_by(self) -> timedelta:
        """After this long a run of the last request is listed: what comes later is another's."""
        return self.window + LISTED_WITHIN

    def passed(self, until: float) -> timedelta:
        """How long it has surely been from the last sending until then, by `SharedClock.seconds`.

        Without these the clock shows it, but not for longer than since it was last set.
        """
        if (sent := self.sent) is not None:
            return timedelta(seconds=until - sent.seconds)
        by_clock = (self.clock.at(until) - self.row.last_sent).total_seconds()
        return timedelta(seconds=min(by_clock, until - self.clock.jumped_at))

    @property
    def is_ahead(self) -> bool:
        """Whether it was sent at what is the future since the clock was set back, and it is not
        known how long ago that was."""
        return self.sent is None and self.row.last_sent > self.clock() + starts.SET_BACK

    def is_forgotten(self, flora_ahead: timedelta | None) -> bool:
        """Whether FLORA may have forgotten the key; assumed if the age of the start is unknown.

        A virtual machine that is paused counts no seconds, so the clock may be right where it shows
        a longer time; not where FLORA's, which is `flora_ahead` of it now, shows a shorter one.
        """
        age, sent = self.clock() - self.first_sent, self.sent
        if sent is not None and sent.flora_ahead is not None and flora_ahead is not None:
            age = min(age, age + flora_ahead - timedelta(seconds=sent.flora_ahead))
        age = max(age, self.passed(self.clock.seconds()))
        return age >= KEY_KEPT or self.is_ahead

    def is_due(self, searched: float | None) -> bool:
        """Whether the history may help now, and was not read for it a moment ago (`searched`)."""
        if self.is_ahead:
            return True
        now = self.clock.seconds()
        passed = self.passed(now)
        # From then on the run of a known key is listed; of another key, FLORA is done with the
        # request. Until then only a callback helps.
        if passed < (LISTED_WITHIN if self.row.is_known_to_flora else self.doubt):
            return False
        if searched is None:
            return True
        since = timedelta(seconds=now - searched)
        if any(passed - since < end <= passed for end in (self.window, self.listed_by)):
            return True
        least, most = SEARCH_WAITS
        return since >= min(max(passed / 6, least), most)

    def evidence_is_over(self, possible: Sequence[Observation | None]) -> bool:
        """Whether FLORA knows it and shows no run that it may have become, or it may have become
        one of these and their callbacks come no more; `None` is one that is not listed any more."""
        if not possible:
            return self.row.is_known_to_flora
        passed = self.passed(self.clock.seconds())
        return passed >= CALLBACKS_WITHIN and all(map(_callback_is_over, possible))


@dataclass(kw_only=True, eq=False)
class Recovery(Service):
    """Ends the doubt about starts. `doubt` is TRACKER_START_DOUBT."""

    sender: StartSender
    doubt: timedelta
    monotonic: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._searched: dict[tuple[str, str], float] = {}
        self._unfiltered: set[str] = set()
        """The places of workspaces in which FLORA refuses to list the runs of one technique."""

    @property
    def _is_paused(self) -> bool:
        """Whether leases may seem to be over, or to last for long: they could not be moved yet
        after the clock was set; or PostgreSQL's was just set, which other processes notice later.
        """
        since = self.clock.seconds() - self.clock.jumped_at
        is_recent = self.clock.is_servers and since < HELD_FOR.total_seconds()
        return self.clock.move_failed or is_recent

    async def recover(self) -> int:
        """Do what is due for each open start; how many became a run. Raises `StoreUnavailable`.

        Nothing is done while leases may seem to be over because a clock was set.
        """
        await self.clock.check()
        if self._is_paused:
            return 0
        now = self.clock()
        rows = [row for row in await starts.open_starts(self.database) if not row.is_held(now)]
        keys = {(row.workspace_id, row.idempotency_key) for row in rows}
        self._searched = {key: at for key, at in self._searched.items() if key in keys}
        if not rows:
            return 0
        by_id = await self._configured()
        groups: dict[tuple[str, str], list[StartRow]] = {}
        for row in rows:
            groups.setdefault((row.workspace_id, row.technique_id), []).append(row)
        known = [(by_id[id_], group) for (id_, _), group in groups.items() if id_ in by_id]
        return sum([await self._recover(workspace, group) for workspace, group in known])

    async def recover_one(self, workspace: Workspace, row: StartRow) -> None:
        """Do what `recover` does, for one start."""
        is_open = row.state in (StartState.SENT, StartState.IN_DOUBT)
        if is_open and not row.is_held(self.clock()) and not self._is_paused:
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
        rows = [await self._as_left(row) for row in rows]
        due = [row for row in rows if row.state is StartState.IN_DOUBT and self._is_due(row)]
        if not due:
            return 0
        for row in due:
            self._searched[row.workspace_id, row.idempotency_key] = self.clock.seconds()
        since, technique_id = min(self._times(row).first_sent for row in due), due[0].technique_id
        read = None
        try:
            give_up = self.monotonic() + SEARCH_SECONDS
            read = await self.read_history(workspace, technique_id, since, give_up=give_up)
        except FloraError as error:
            log.warning("start.recovery_failed", technique_id=technique_id, error=str(error))
        found = 0
        for row in due:
            async with holding(self, row) as held:
                if held is not None and held.row.state is StartState.IN_DOUBT:
                    found += await self._end_doubt(workspace, held, read)
        return found

    async def _as_left(self, row: StartRow) -> StartRow:
        """The start, which is in doubt if the process that sent it has died."""
        if row.state is not StartState.SENT:
            return row
        async with holding(self, row) as held:
            if held is None or held.row.state is not StartState.SENT:
                return row
            await held.record(StartState.IN_DOUBT, held.row.error or {"message": NO_ANSWER})
            return held.row

    def _times(self, row: StartRow) -> DoubtTimes:
        return DoubtTimes(row, self.clock, self.doubt)

    def _is_due(self, row: StartRow) -> bool:
        searched = self._searched.get((row.workspace_id, row.idempotency_key))
        return self._times(row).is_due(searched)

    async def _end_doubt(
        self, workspace: Workspace, held: HeldStart, read: HistoryRead | None
    ) -> bool:
        """End the doubt about one start, if possible now; whether it became a run."""
        first_sent = self._times(held.row).first_sent
        row = replace(held.row, in_use_since=first_sent, set_back=None)
        times = self._times(row)
        if read is None:
            if times.is_forgotten(None):
                possible = await starts.possible(self.database, row, row.possible_runs or ())
                await self._leave_to_a_person(held, row.error, possible)
            return False
        passed = times.passed(read.begun)
        if row.is_known_to_flora and passed >= LISTED_WITHIN:
            run = await self._find(row, read)
            if run:
                await self.sender.adopt(row, run.run_id, run)
                log.info("start.found", key=held.key, run_id=run.run_id)
                return True
        possible = await starts.possible(self.database, row, row.possible_runs or read.runs)
        error = row.error
        if possible and passed >= times.listed_by:
            error = row.with_possible(possible)
        is_over = passed >= times.window
        shown = [read.runs.get(run_id) for run_id in possible]
        ahead = workspace.require_client().clock_offset
        if times.is_forgotten(ahead) or (is_over and times.evidence_is_over(shown)):
            await self._leave_to_a_person(held, error, possible)
            return False
        if error != row.error:
            await held.record(StartState.IN_DOUBT, error)
        if row.is_known_to_flora or possible or not is_over:
            return False  # unless it is over, FLORA may be at work on it
        return await self._send_again(workspace, held, read)

    async def read_history(
        self, workspace: Workspace, technique_id: str, since: datetime, *, give_up: float
    ) -> HistoryRead:
        """Read the history completely, down to what was known here before `since`, at least to
        three days before it where nothing was.

        FLORA is read until `monotonic` gives `give_up`. Raises `FloraError` if anything is left
        out: a start whose run it does not show is sent again.
        """
        begun = self.clock.seconds()
        known_until = await starts.newest_known(
            self.database, workspace.workspace_id, before=since - starts.SET_BACK
        )
        client = workspace.require_client()
        first = since + min(client.clock_offset or timedelta(), timedelta())
        if known_until is None:
            known_until = bottom = first - FIRST_READ
        else:  # FLORA's clock may have been ahead
            known_until = min(known_until, first)
            bottom = known_until - READ_BELOW

        async def read(cursor: str | None, limit: int) -> HistoryPage:
            return await client.history(
                cursor=cursor,
                limit=limit,
                technique_id=technique_id if filtered else None,
                deadline=min(PAGE_SECONDS, max(give_up - self.monotonic(), 0.1)),
            )

        while True:
            filtered = workspace.place not in self._unfiltered
            try:
                async with aclosing(HistoryWalk(read, strict=True).pages()) as pages:
                    found = await _read(pages, technique_id, known_until, bottom)
            except FloraRefusal as refusal:
                # A refused filter says nothing about the key: all runs are read instead.
                if not (filtered and 400 <= refusal.status < 500) or refusal.status in (401, 429):
                    raise
                log.info("start.filter_refused", status=refusal.status, code=refusal.code)
                self._unfiltered.add(workspace.place)
            else:
                return HistoryRead(begun=begun, runs=found)

    async def _find(self, row: StartRow, read: HistoryRead) -> Observation | None:
        """The run of a start whose key FLORA says is in use, in a history that lists it; `None` if
        there is none, more than one, one of unknown technique, or another start that it may be of
        as well."""
        # The rivals first: one that becomes a run meanwhile is accounted for then, or is a rival.
        rivals = await starts.rivals(
            self.database, row.workspace_id, row.technique_id, row.idempotency_key
        )
        left = await starts.possible(self.database, row, row.possible_runs or read.runs)
        run = read.runs.get(next(iter(left))) if len(left) == 1 else None
        if run is None or run.technique_id != row.technique_id:
            return None
        if any([await starts.possible(self.database, rival, left) for rival in rivals]):
            return None
        return run

    async def _send_again(self, workspace: Workspace, held: HeldStart, read: HistoryRead) -> bool:
        """Send a start of which nothing came, if that is sure; whether it became a run."""
        times = self._times(held.row)
        if times.sent is None:
            await self.clock.settle()
            if times.passed(read.begun) < times.window:
                return False
        log.info("start.sent_again", key=held.key, technique_id=held.row.technique_id)
        try:
            await self.sender.send(workspace, held, deadline=SEND_SECONDS)
        except (FloraError, SettingsError, StartError) as error:
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


async def _read(
    pages: AsyncIterator[WalkedPage], technique_id: str, known_until: datetime, bottom: datetime
) -> dict[str, Observation]:
    """The runs that may be of the technique, down to `bottom`.

    Raises `FloraUnreadable` for an item that may be newer than `known_until`.
    """
    found: dict[str, Observation] = {}
    known = False  # whether what follows was listed before
    async for page in pages:
        if page.hole is not None and not known:  # it may be the run of this start
            raise page.hole.error
        found |= {
            item.run_id: item
            for item in page.items
            if _may_be_of(technique_id, item) and not (item.created_at and item.created_at < bottom)
        }
        known = known or _reaches(known_until, page.items)
        if _reaches(bottom, page.items):
            break
    return found


def _reaches(bottom: datetime, items: Sequence[Observation]) -> bool:
    """Whether items of a list, newest first, reach down to `bottom`."""
    lowest = oldest(items)
    return lowest is not None and lowest <= bottom


def _may_be_of(technique_id: str, run: Observation) -> bool:
    """Whether a run may be of this technique: one without a technique, or with what is no id of
    one, may."""
    named = run.technique_id
    return named == technique_id or named is None or not named.startswith("tech_")
