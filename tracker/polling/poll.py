"""Polling what is due, with as few requests as possible.

A round claims due runs in each workspace and reads them (`tracker.polling.reading`). Callers
that poll repeatedly let due runs coalesce first, so that they share history pages. If more is due
than one round reads, a share of it goes to the runs whose callbacks came last: a backlog does not
delay fresh ends.

Settled runs are read again in rounds of their own, because FLORA's bill, and sometimes the outputs,
come after the end. These rounds share pages as far as possible, and never take the place of a read
that brings a fresh end.

`Contacts` says whether FLORA answers, and asks it where nothing else does.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import zip_longest
from typing import Any, Final, Self

from tracker.core.contact import ContactState, joined
from tracker.core.errors import FloraError, KeyRefused, OtherWorkspace, RateLimited
from tracker.core.log import get_logger
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import RunState
from tracker.core.schedule import LEARNED_FROM, Durations, Policy
from tracker.core.waiting import cancel, repeat, run_all
from tracker.polling.reading import Backoff, PollReport, PollRound, RunReader, SingleRead
from tracker.store import coordination
from tracker.store.coordination import Due
from tracker.store.engine import Database
from tracker.store.queries import runs
from tracker.store.queries import workspaces as stored
from tracker.store.writing.writer import Writer
from tracker.workspaces import Service, Workspace

CLAIM: Final = 100
"""Due runs that one round claims: as many as one history page can show."""
FRESH: Final = 25
"""Runs that are claimed besides if more are due: those whose callbacks came last."""
RECHECK_CLAIM: Final = 1000
"""Settled runs that one round claims: pages that are read for some of them serve all."""
BRING_NEAR_EVERY: Final = 300.0
"""Seconds between two searches for runs whose next poll lies further ahead than any wait."""
LEASE: Final = timedelta(seconds=30)
"""How long a claim lasts if it is not released, because its process died."""
RENEW_AFTER: Final = 10.0
"""Seconds after which a round that still goes on (FLORA is slow) renews its claims."""
KEPT_FOR: Final = 300.0
"""For how many seconds learned durations are used without reading them again."""
FEW_KEPT_FOR: Final = 5.0
"""The same if too few runs are known to learn from: a sweep may bring the rest at any moment."""
SECONDS_A_READ: Final = 1.0
"""Seconds of pause after each shared read."""
LONGEST_PAUSE: Final = 10.0
"""The longest pause, however many pages were read."""

log = get_logger(__name__)


@dataclass(kw_only=True, eq=False)
class Poller(Service):
    """Reads due runs."""

    writer: Writer
    durations: "DurationBook"
    coalescer: "Coalescer"
    policy: Policy
    lease: timedelta = LEASE
    renew_after: float = RENEW_AFTER

    def __post_init__(self) -> None:
        self.backoff = Backoff(self.clock.seconds)
        self.page_backoff = Backoff(self.clock.seconds)
        self._brought_near_at = -math.inf

    async def poll_due(self, *, coalesce: bool = False) -> PollReport:
        """One round: claim what is due in each workspace and read it. Raises `StoreUnavailable`.

        `coalesce`, for callers that poll repeatedly, leaves due runs until they have coalesced. A
        workspace without a key, with a refused one, or in which FLORA has just failed is left out.
        """
        return await self._in_each(partial(self._poll, coalesce=coalesce))

    async def recheck_due(self, *, once_per: timedelta | None = None) -> PollReport:
        """One round: read the settled runs again whose cost or outputs are due for it.

        With `once_per`, for callers that do so repeatedly, one process at a time does it for each
        workspace, and the others leave it out for so long. Raises `StoreUnavailable`.
        """
        return await self._in_each(partial(self._recheck, once_per=once_per))

    async def _bring_near(self) -> None:
        """Make what is due too far ahead due now, at first and now and then."""
        if self.clock.seconds() - self._brought_near_at < BRING_NEAR_EVERY:
            return
        brought = await coordination.reset_far_schedules(self.database, self.policy, self.clock())
        self._brought_near_at = self.clock.seconds()
        if brought:
            cause = "the clock was set back, or the waits were shortened"
            log.warning("poll.brought_near", runs=brought, cause=cause)

    async def next_due_at(self, *, coalesce: bool = False) -> datetime | None:
        """When the next run that can be read is due, UTC; in the past if one is due already.

        With `coalesce`, not before the due runs have coalesced.
        """
        now = self.clock()
        times: list[datetime | None] = []
        for workspace in self.workspaces.keyed:
            if workspace.require_client().breaker.blocked:
                continue
            if wait := self.backoff.left(workspace.place):
                times.append(now + timedelta(seconds=wait))
                continue
            among = self.workspaces.claimable(workspace)
            due = await coordination.next_due_at(self.database, among, now=now)
            pause = self.coalescer.left(workspace.place) if coalesce else 0.0
            # If lists carry no details, known ends are read singly all the time.
            if due and pause and workspace.lists_carry_details:
                due = max(due, self.clock() + timedelta(seconds=pause))
            times.append(due)
        return min((moment for moment in times if moment), default=None)

    def readable(self) -> list[Workspace]:
        """The workspaces with a key that FLORA takes, without those that are backed off."""
        return [
            one
            for one in self.workspaces.keyed
            if not (one.require_client().breaker.blocked or self.backoff.left(one.place))
        ]

    async def read_now(self, record: Record) -> Record:
        """Read one run at once, even if it is claimed; what is known of it afterwards.

        Without a key, or with a refused one, it stays due. Raises `StoreUnavailable`.
        """
        return record if record.run.settled else await self.read_again(record)

    async def read_again(self, record: Record) -> Record:
        """As `read_now`, and a settled run too: FLORA may show new links."""
        workspace = self.workspaces.reader_of(record.run.workspace_id)
        if workspace is None or workspace.client is None:
            return record
        try:
            found = await self._reader(workspace).read(record)
        except (KeyRefused, RateLimited, OtherWorkspace) as refusal:
            return replace(record, last_error=str(refusal))
        results = await self.writer.submit_all(found.entries)
        return results[-1].after or record

    async def read_unwritten(self, run: RunState) -> SingleRead:
        """Read a run that may not be stored; nothing is written.

        Raises `SettingsError` without a key, and `KeyRefused`, `RateLimited` and `OtherWorkspace`.
        """
        workspace = await self.workspaces.pick(run.workspace_id)
        record = Record(run=run, source=Source.TRACK, first_seen_at=self.clock())
        return await self._reader(workspace).read(record)

    async def release(self) -> None:
        """Give back everything that this process has claimed."""
        await coordination.release(self.database, self.process)

    def _reader(self, workspace: Workspace) -> RunReader:
        return RunReader(
            database=self.database,
            workspaces=self.workspaces,
            clock=self.clock,
            process=self.process,
            workspace=workspace,
            readable=self.readable,
        )

    async def _in_each(
        self, poll: Callable[[Workspace], Coroutine[Any, Any, PollReport]]
    ) -> PollReport:
        await self._bring_near()
        report = PollReport()
        for one in await run_all([poll(workspace) for workspace in self.readable()]):
            report.add(one)
        return report

    async def _poll(self, workspace: Workspace, *, coalesce: bool) -> PollReport:
        began = self.clock.seconds()
        pausing = coalesce and self.coalescer.left(workspace.place) > 0
        if pausing and workspace.lists_carry_details:
            return PollReport()
        due, full = await self._claim_in_order(workspace, Due.ENDS if pausing else Due.POLLS)
        if not due:
            return PollReport()
        poll_round = await self._read(workspace, due, full=full)
        report = poll_round.report
        if not pausing:
            complete = not poll_round.remaining or poll_round.broken_off
            self.coalescer.add(
                workspace.place, poll_round.shared_reads, began=began, complete=complete
            )
        # Pages that were read have most likely answered for runs that were not claimed, too.
        report.at_once = report.more and (bool(poll_round.remaining) or not report.pages)
        return report

    async def _recheck(self, workspace: Workspace, *, once_per: timedelta | None) -> PollReport:
        now, among = self.clock(), self.workspaces.claimable(workspace)
        if not await coordination.recheck_is_due(self.database, among, now=now):
            return PollReport()
        name, holder = f"recheck:{workspace.place}", self.process
        if once_per and not await coordination.take_lease(
            self.database, name, holder, now, once_per
        ):
            return PollReport()
        due = await self._claim(workspace, Due.BILLS, limit=RECHECK_CLAIM)
        full = len(due) == RECHECK_CLAIM
        return (await self._read(workspace, due, full=full, recheck=True)).report

    async def _read(
        self, workspace: Workspace, due: Sequence[Record], *, full: bool, recheck: bool = False
    ) -> PollRound:
        """Read what was claimed, in a round, and give back the rest. `full`: more may be due."""
        poll_round = PollRound(
            reader=self._reader(workspace),
            writer=self.writer,
            page_backoff=self.page_backoff,
            due=due,
            recheck=recheck,
        )

        async def renew() -> None:
            await asyncio.sleep(self.renew_after)
            until = self.clock() + self.lease
            await coordination.renew(self.database, self.process, list(poll_round.remaining), until)

        renewing = asyncio.create_task(repeat("poll claims", renew))
        try:
            await self.durations.learn(record.run.technique_id for record in due)
            await poll_round.read_pages()
            await poll_round.read_singly()
        finally:
            renewing.cancel()
            # What was not read (too many for one round, FLORA down, a shutdown) is due as before.
            if poll_round.remaining:
                await coordination.release(self.database, self.process, list(poll_round.remaining))
        report = poll_round.report
        if not poll_round.broken_off:
            self.backoff.succeeded(workspace.place)
            report.more = full or bool(poll_round.remaining)
            return poll_round
        report.trouble = poll_round.error
        paused = workspace.require_client().request_limit.state().paused
        log.warning(
            "poll.flora_down",
            workspace_id=workspace.name,
            error=poll_round.error,
            rest_seconds=self.backoff.failed(workspace.place, least=paused),
        )
        return poll_round

    async def _claim(self, workspace: Workspace, which: Due, *, limit: int) -> list[Record]:
        return await coordination.claim_due(
            self.database,
            holder=self.process,
            now=self.clock(),
            lease=self.lease,
            limit=limit,
            workspaces=self.workspaces.claimable(workspace),
            which=which,
        )

    async def _claim_in_order(self, workspace: Workspace, which: Due) -> tuple[list[Record], bool]:
        """Claim due runs, in the order in which they are to be read, and whether more may be due.
        If there are many, every other run is a fresh end."""
        due = await self._claim(workspace, which, limit=CLAIM)
        full = len(due) == CLAIM
        fresh = []
        if full:
            fresh = await self._claim(workspace, Due.NEWEST_ENDS, limit=FRESH)
        fresh += [record for record in reversed(due) if record.run.precedence.ended]
        fresh = fresh[:FRESH]
        fresh_ids = {record.run.run_id for record in fresh}
        others = [record for record in due if record.run.run_id not in fresh_ids]
        alternating = zip_longest(fresh, others)
        return [record for pair in alternating for record in pair if record is not None], full


class DurationBook:
    """The durations of techniques, read from ended runs and kept for a few minutes.

    The writer calls `of` in a transaction, without waiting; so `learn` is called before
    observations of a technique are submitted.
    """

    def __init__(self, database: Database, *, seconds: Callable[[], float]) -> None:
        self._database = database
        self._seconds = seconds
        self._known: dict[str, Durations] = {}
        self._kept_until: dict[str, float] = {}

    def of(self, technique_id: str | None) -> Durations | None:
        """The durations of a technique; `None` if none are known yet."""
        return self._known.get(technique_id or "")

    async def learn(self, technique_ids: Iterable[str | None]) -> None:
        """Read the durations of these techniques, unless they were read recently."""
        now = self._seconds()
        wanted = {one for one in technique_ids if one and self._kept_until.get(one, now) <= now}
        for technique_id, found in (await runs.durations_of(self._database, wanted)).items():
            kept_for = KEPT_FOR if found.count >= LEARNED_FROM else FEW_KEPT_FOR
            self._known[technique_id], self._kept_until[technique_id] = found, now + kept_for


class Coalescer:
    """Pauses after shared reads, by a workspace's place, so that due runs coalesce.

    A history page costs the same for one run as for a hundred. So each read that due runs shared,
    or could have, is followed by `SECONDS_A_READ` of pause, in which more runs become due: a single
    end is read at once, and among hundreds of runs, ends wait up to `LONGEST_PAUSE` and are read
    together. A sweep reads the same pages, and counts like a round.

    With 1,000 runs on ten pages that end within a minute, 10 s cost 0.07 reads a run (0.09 with a
    sweep) and a median wait of 5 s; 5 s cost 0.14 reads and 2 s; no pause 0.6 reads and half a
    second (`python -m bench.economy`).
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._ends: dict[str, float] = {}
        self._reads: dict[str, int] = {}

    def left(self, place: str) -> float:
        """The seconds that are left of the pause, if any."""
        return max(0.0, self._ends.get(place, -math.inf) - self._seconds())

    def add(self, place: str, reads: int, *, began: float, complete: bool) -> None:
        """Count the shared reads of a round that began at `began`, in `seconds`.

        The pause follows the first round that leaves nothing behind, for all reads until then.
        """
        reads += self._reads.pop(place, 0)
        if not complete:
            self._reads[place] = reads
            return
        self._ends[place] = began + min(reads * SECONDS_A_READ, LONGEST_PAUSE)


# Whether FLORA answers in each workspace, the same in all processes.
#
# Each process stores what its requests have shown, and reads what the others have stored, so that
# all of them say the same about FLORA, also one that asks nothing itself. A worker asks FLORA where
# no process has asked for `PROBE_IDLE_AFTER`: few requests show its absence within a minute.

PROBE_FAILING_AFTER: Final = 15.0
"""Seconds after the last request after which a FLORA that failed is asked again."""
PROBE_IDLE_AFTER: Final = 25.0
"""The same for one that answered, by the requests of all processes."""
PROBE_SECONDS: Final = 10.0
"""How long a probe may take, repetitions included."""
KEEP_TICK: Final = 0.5
"""Seconds within which a long-running process stores a change."""
KEEP_EVERY: Final = timedelta(seconds=20)
"""How often the time of the last request is stored while nothing else changes."""


@dataclass(kw_only=True, eq=False)
class Contacts(Service):
    """The workspaces' connections to FLORA. With `background` they are stored all the time, else
    when it is closed."""

    background: bool

    def __post_init__(self) -> None:
        self._stored: Mapping[str, ContactState] = {}
        self._kept: dict[str, ContactState] = {}
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self.background:
            keeping = repeat("contacts", self._keep_next)
            self._keeping = asyncio.create_task(keeping, name="contacts")
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel(self._keeping)
        await self.keep()

    def of(self, workspace: Workspace) -> ContactState | None:
        """What is known of a workspace, by this process and what was last read; `None` if nothing
        is."""
        others = self._stored.get(workspace.place)
        own = workspace.client.state if workspace.client else None
        return joined(others, own) if others and own else own or others

    async def read(self) -> None:
        """Read what all processes have stored. Raises `StoreUnavailable`."""
        await self.workspaces.recall()
        self._stored = await stored.stored_contacts(self.database, now=self.clock())

    async def keep(self) -> None:
        """Store what this process has seen since it last did. Raises `StoreUnavailable`."""
        for workspace in self.workspaces:
            own = workspace.client.state if workspace.client else None
            if own is not None and _is_news(own, self._kept.get(workspace.place)):
                await stored.keep_contact(self.database, workspace.place, own, now=self.clock())
                self._kept[workspace.place] = own

    async def probe(self) -> None:
        """Read the newest run of each workspace where FLORA's last answer was a failure, or where
        it has not been asked for a while. Raises `StoreUnavailable`."""
        keyed = self.workspaces.keyed
        if any(self._is_due(one) for one in keyed):
            await self.read()  # another process may have asked
        await asyncio.gather(*(_probe(one) for one in keyed if self._is_due(one)))

    def _is_due(self, workspace: Workspace) -> bool:
        client, others = workspace.require_client(), self._stored.get(workspace.place)
        if client.contact.failing or client.breaker.open:
            return client.contact.idle_seconds >= PROBE_FAILING_AFTER
        if client.contact.idle_seconds < PROBE_IDLE_AFTER:
            return False
        idle = timedelta(seconds=PROBE_IDLE_AFTER)
        return others is None or self.clock() - others.asked_at >= idle

    async def _keep_next(self) -> None:
        await self.keep()
        await asyncio.sleep(KEEP_TICK)


async def _probe(workspace: Workspace) -> None:
    with suppress(FloraError):  # the client has taken note of it
        page = await workspace.require_client().history(limit=1, deadline=PROBE_SECONDS)
        workspace.attributed_page(page.items)


def _is_news(own: ContactState, kept: ContactState | None) -> bool:
    if kept is None or abs(own.asked_at - kept.asked_at) >= KEEP_EVERY:  # a clock may be set back
        return True
    # Each failed request has another reason: that is no news.
    was, now = (
        (one.answered_at is None, one.trouble and (one.trouble.trouble, one.trouble.since))
        for one in (kept, own)
    )
    return was != now
