"""Polling what is due, with as few requests as possible.

One page of the history reads up to a hundred runs, a single read one. So pages are read from the
newest on, for as long as some number of them shows more due runs than that; what is still open
then, and what a list shows without its details, is read alone. Who polls again and again lets due
runs gather first: `tracker.polling.poll_round` says for how long.

What is settled is read again in the same way, in rounds of its own: FLORA's bill, and sometimes the
outputs, come after the end. These rounds wait for as many runs as they can to share a page, and
never take the place of a read that brings home a fresh end.

Where more is due than one round reads, a share of it goes to the runs that were told ended last: a
backlog does not keep fresh callbacks waiting.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from itertools import zip_longest
from typing import Final, TypeVar

import structlog
from structlog.contextvars import bound_contextvars

from tracker.core.clock import Clock
from tracker.core.errors import (
    FloraError,
    KeyRefused,
    OtherWorkspace,
    RateLimited,
    StoreError,
)
from tracker.core.observation import Observation
from tracker.core.record import Entry, Record, Seen, Unseen
from tracker.core.run import Run
from tracker.core.schedule import Policy
from tracker.flora.client import FloraClient
from tracker.polling import history
from tracker.polling.history import (
    counted_before,
    leaves_open,
    listable,
    owned,
    pages_away,
    pays,
    taken_over,
    without_removed,
)
from tracker.polling.poll_round import DurationBook, Gathering, PollReport, Rests, Round, all_of
from tracker.polling.single_read import CALL_SECONDS, Reading, read_run
from tracker.polling.workspaces import Workspace, Workspaces
from tracker.store import claims
from tracker.store import claims as listed
from tracker.store.engine import Database
from tracker.store.writing.writer import Writer

CLAIM: Final = 100
"""So many due runs are claimed in one round: what one page of the history can show."""
FRESH: Final = 25
"""So many more are claimed where that was not all: those that a callback told of last."""
SINGLE_READS: Final = 16
"""So many runs are read alone in one round, half of them fresh; the rest is given back and due in
the next, so that no process sits on work that another could do."""
ROUND_SECONDS: Final = 10.0
"""Seconds after which a round reads no further run alone (FLORA is slow, or has set a limit): the
next one looks first whether a callback has come."""
RECHECK_CLAIM: Final = 1000
"""So many settled runs are read again in one round: what the pages that are read for some of them
show is taken for all."""
PAGE_SECONDS: Final = 30.0
PAGE_SECONDS_AGAIN: Final = 10.0
"""How long one page may take, repetitions included; less where the last one failed, so that pages
which cannot be read do not keep single reads waiting."""
NEAR_EVERY: Final = 300.0
"""Seconds between two looks for runs whose next poll lies further ahead than any wait."""
LEASE: Final = timedelta(seconds=30)
"""A claim that was not given back, because its process died, runs out after this."""
RENEW_AFTER: Final = 10.0
"""Seconds after which a round that is still under way (FLORA is slow) holds its claims longer."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Poller:
    """Reads due runs. `holder` names this process in the claims that it makes."""

    def __init__(
        self,
        *,
        database: Database,
        writer: Writer,
        workspaces: Workspaces,
        durations: DurationBook,
        gathering: Gathering,
        policy: Policy,
        holder: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._writer = writer
        self._workspaces = workspaces
        self._durations = durations
        self._gathering = gathering
        self._holder = holder
        self._clock = clock
        self._policy = policy
        self._near_at = -math.inf
        self._rests = Rests(clock)
        self._page_rests = Rests(clock)

    async def poll_due(self, *, gather: bool = False) -> PollReport:
        """One round: claim what is due in each workspace and read it. Raises `StoreUnavailable`.

        With `gather`, for who polls again and again, due runs are left until they have gathered. A
        workspace whose key is refused, or that has none, is left alone; so is one in which FLORA
        has just answered nothing, until it has rested.
        """
        report = PollReport()
        if time.monotonic() - self._near_at >= NEAR_EVERY:
            await self._bring_near()
        rounds = [self._poll_workspace(workspace, gather) for workspace in self._readable()]
        for one in await all_of(rounds):
            report.add(one)
        return report

    async def recheck_due(self, *, turn: timedelta | None = None) -> PollReport:
        """One round: read again the settled runs whose cost or outputs are due for it.

        With `turn`, for who does this again and again, one process at a time does it for each
        workspace, and the others leave it alone for so long. Raises `StoreUnavailable`.
        """
        report = PollReport()
        for one in await all_of([self._recheck(each, turn) for each in self._readable()]):
            report.add(one)
        return report

    def clock_jumped(self) -> None:
        """The clock was set: the next round looks at once for what it put too far ahead."""
        self._near_at = -math.inf

    async def _bring_near(self) -> None:
        brought = await claims.bring_near(self._database, self._policy, self._clock())
        self._near_at = time.monotonic()
        if brought:
            log.warning("poll.brought_near", runs=brought, cause="the clock was set back")

    async def next_due_at(self, *, gather: bool = False) -> datetime | None:
        """When the next run that can be read is due, UTC; in the past where one waits already.

        With `gather`, not before the due runs have gathered.
        """
        now = self._clock()
        times: list[datetime | None] = []
        for workspace in self._keyed():
            if rest := self._rests.left(workspace.slot):
                times.append(now + rest)
                continue
            due = await claims.next_due_at(
                self._database, self._workspaces.claimable(workspace), now=now
            )
            until = self._gathering.until(workspace.slot) if gather else None
            # Where lists carry no details, ends that are known are read alone all the time.
            waits = due and until and workspace.lists_carry_details
            times.append(max(due, until) if due and until and waits else due)
        return min((moment for moment in times if moment), default=None)

    def _keyed(self) -> list[Workspace]:
        """The workspaces with a key that FLORA does not refuse."""
        return [
            workspace
            for workspace in self._workspaces
            if workspace.client is not None and not workspace.client.breaker.blocked
        ]

    def _readable(self) -> list[Workspace]:
        """Those of them that do not rest."""
        return [one for one in self._keyed() if not self._rests.left(one.slot)]

    async def probe(self) -> None:
        """Read the newest run of each workspace in which something was wrong with FLORA's last
        answer: whether that is over is then known soon, also where nothing is due."""
        for workspace in self._workspaces:
            client = workspace.client
            if client is not None and (client.contact.failing or client.breaker.open):
                with suppress(FloraError):  # the client has taken note of it
                    page = await client.history(limit=1, deadline=PAGE_SECONDS_AGAIN)
                    taken_over(workspace, page.items)

    async def read_now(self, record: Record) -> Record:
        """Read one run at once, whoever else may be at it; what is known of it afterwards.

        Without a key, or with one that FLORA refuses, it stays due. Raises `StoreUnavailable`.
        """
        workspace = self._workspaces.of(record.run.workspace_id)
        if workspace is None or workspace.client is None or record.run.settled:
            return record
        try:
            with bound_contextvars(run_id=record.run.run_id, workspace_id=workspace.name):
                workspace, reading = await self._read_run(workspace, workspace.client, record.run)
                entries = await self._entries(workspace, record, reading, Round(open_runs={}))
        except (KeyRefused, RateLimited, OtherWorkspace) as refusal:
            return replace(record, last_error=str(refusal))
        passed = await self._writer.submit_all(entries)
        return passed[-1].after or record

    async def release(self) -> None:
        """Give back whatever this process still claims."""
        await claims.release(self._database, self._holder)

    async def _poll_workspace(self, workspace: Workspace, gather: bool) -> PollReport:
        began = self._clock()
        gathering = gather and self._gathering.until(workspace.slot) is not None
        if gathering and workspace.lists_carry_details:
            return PollReport()
        due, full = await self._claim(workspace, began, ended=gathering)
        report = PollReport(claimed=len(due))
        if not due:
            return report
        course = Round(open_runs={record.run.run_id: record for record in due})
        await self._read(workspace, course, report)
        if not gathering:
            over = not course.open_runs or course.broken_off
            self._gathering.count(workspace.slot, course.shared, began=began, over=over)
        report.trouble = course.trouble if course.broken_off else None
        report.more = not course.broken_off and (full or bool(course.open_runs))
        # Pages that were read have most likely answered for what could not be claimed, too.
        report.at_once = report.more and (bool(course.open_runs) or not report.pages)
        return report

    async def _recheck(self, workspace: Workspace, turn: timedelta | None) -> PollReport:
        now, among = self._clock(), self._workspaces.claimable(workspace)
        if not await claims.recheck_is_due(self._database, among, now=now):
            return PollReport()
        name = f"recheck:{workspace.slot}"
        if turn and not await claims.take_lease(self._database, name, self._holder, now, turn):
            return PollReport()
        due = await claims.claim_due(
            self._database,
            holder=self._holder,
            now=now,
            lease=LEASE,
            limit=RECHECK_CLAIM,
            workspaces=among,
            recheck=True,
        )
        report = PollReport(claimed=len(due))
        course = Round(open_runs={record.run.run_id: record for record in due}, recheck=True)
        await self._read(workspace, course, report)
        report.trouble = course.trouble if course.broken_off else None
        full = len(due) == RECHECK_CLAIM
        report.more = not course.broken_off and (full or bool(course.open_runs))
        return report

    async def _read(self, workspace: Workspace, course: Round, report: PollReport) -> None:
        """Read what the round has claimed, together and alone, and give back what is left."""
        renewing = asyncio.create_task(self._renew(course))
        try:
            claimed = course.open_runs.values()
            await self._durations.learn(record.run.technique_id for record in claimed)
            await self._read_pages(workspace, course, report)
            await self._read_alone(workspace, course, report)
        finally:
            renewing.cancel()
            # What was not read (too many for one round, FLORA down, a shutdown) is due as before.
            if course.open_runs:
                await claims.release(self._database, self._holder, list(course.open_runs))
        if not course.broken_off:
            self._rests.over(workspace.slot)
            return
        paused = workspace.require_client().budget.state().paused
        log.warning(
            "poll.flora_down",
            workspace_id=workspace.name,
            error=course.trouble,
            rest_seconds=self._rests.failed(workspace.slot, least=paused),
        )

    async def _claim(
        self, workspace: Workspace, now: datetime, *, ended: bool
    ) -> tuple[list[Record], bool]:
        """Claim due runs, or of those only the ended ones, and whether there are more than that.

        Those that are read first come first: every other one is fresh, where there are many.
        """
        claim = partial(
            claims.claim_due,
            self._database,
            holder=self._holder,
            now=now,
            lease=LEASE,
            workspaces=self._workspaces.claimable(workspace),
        )
        due = await claim(limit=CLAIM, ended=ended)
        full = len(due) == CLAIM
        fresh = await claim(limit=FRESH, ended=True, newest=True) if full else []
        fresh += [record for record in reversed(due) if record.run.standing.ended]
        names = {record.run.run_id for record in fresh[:FRESH]}
        others = [record for record in due if record.run.run_id not in names]
        return [
            record
            for pair in zip_longest(fresh[:FRESH], others)
            for record in pair
            if record is not None
        ], full

    async def _renew(self, course: Round) -> None:
        """Hold what is still to be read for as long as the round takes."""
        while True:
            await asyncio.sleep(RENEW_AFTER)
            try:
                await claims.renew(
                    self._database, self._holder, list(course.open_runs), self._clock() + LEASE
                )
            except StoreError as error:
                log.warning("poll.claims_not_renewed", error=str(error))

    async def _read_pages(self, workspace: Workspace, course: Round, report: PollReport) -> None:
        """Read history pages while they pay, and take from the round what they settle."""
        wanted = listable(course.open_runs.values(), workspace)
        if len(wanted) < 2 or self._page_rests.left(workspace.slot):
            return
        course.places = await listed.places(
            self._database,
            [record.run.run_id for record in wanted],
            self._workspaces.claimable(workspace),
            # Among more than that they are fewer than the pages.
            among=len(wanted) * history.PAGE_SIZE * len(self._workspaces),
        )
        if not pays(pages_away(wanted, course, report.pages)):
            return
        failed_before = self._page_rests.failures(workspace.slot)
        try:
            client = workspace.require_client()
            newest_first = history.pages(
                client if course.recheck else client.for_fresh,
                "technique",
                deadline=lambda: PAGE_SECONDS_AGAIN if failed_before else PAGE_SECONDS,
            )
            async with aclosing(newest_first) as pages:
                async for page in pages:
                    report.pages += 1
                    course.shared += 1
                    course.answered = True
                    await self._take_page(workspace, page.items, course, report)
                    self._page_rests.over(workspace.slot)
                    oldest = history.oldest(page.items)
                    # What is newer than a page's oldest run, and was not shown, is in no list.
                    wanted = [
                        record
                        for record in listable(course.open_runs.values(), workspace)
                        if oldest is not None and record.created_at <= oldest
                    ]
                    if not pays(pages_away(wanted, course, report.pages)):
                        return
        except (KeyRefused, RateLimited, OtherWorkspace) as refusal:
            course.refuse(str(refusal))
        except FloraError as error:
            # The due runs are not to blame: each is still read alone, and tells of its own failure.
            if error.silent:
                course.fail(str(error))
            log.warning(
                "poll.page_failed",
                workspace_id=workspace.name,
                error=str(error),
                rest_seconds=self._page_rests.failed(workspace.slot),
            )

    async def _take_page(
        self,
        workspace: Workspace,
        items: Sequence[Observation],
        course: Round,
        report: PollReport,
    ) -> None:
        """Take a page through the writer; what it shows ended without details stays claimed."""
        taken = await without_removed(self._database, taken_over(workspace, items))
        if items:
            course.confirmed = True
        lean = {item.run_id for item in taken if leaves_open(item, workspace, course)}
        answered = course.open_runs.keys() - lean
        again = await counted_before(self._database, course.open_runs, taken)
        passed = await self._writer.submit_all(
            [
                Seen(
                    observation=item,
                    claim=self._holder if item.run_id in answered else None,
                    counted_before=item.run_id in again,
                )
                for item in taken
            ]
        )
        for item, one in zip(taken, passed, strict=True):
            report.count(one)
            if item.run_id not in course.open_runs:
                continue
            if item.run_id not in lean:
                del course.open_runs[item.run_id]
            elif one.after is not None:
                course.open_runs[item.run_id] = one.after

    async def _read_alone(self, workspace: Workspace, course: Round, report: PollReport) -> None:
        """Read runs one by one; each result goes through the writer as soon as it is there."""
        client = workspace.require_client()
        turns = asyncio.Semaphore(client.budget.state().concurrency)
        until = time.monotonic() + ROUND_SECONDS
        shareable = {
            record.run.run_id
            for record in listable(course.open_runs.values(), workspace)
            if course.places is None or record.run.run_id in course.places
        }

        async def read(record: Record) -> None:
            async with turns:
                if course.broken_off or time.monotonic() > until:
                    return  # it stays open, and is given back
                fresh = record.run.standing.ended and not course.recheck
                try:
                    with bound_contextvars(run_id=record.run.run_id, workspace_id=workspace.name):
                        of, reading = await self._read_run(
                            workspace, client.for_fresh if fresh else client, record.run
                        )
                        if reading.observation is not None and of is workspace:
                            course.confirmed = True
                        entries = await self._entries(of, record, reading, course)
                except (KeyRefused, RateLimited, OtherWorkspace) as refusal:
                    course.refuse(str(refusal))
                    return
                if reading.far_end_down:
                    course.fail(reading.error)
                else:
                    course.answered = True
            report.reads += reading.reads
            seen = reading.observation
            if record.run.run_id == course.probe and seen and seen.charged_cost is not None:
                workspace.lists_carry_costs = False
            if record.run.run_id in shareable:
                course.shared += reading.reads
            for passed in await self._writer.submit_all(entries):
                report.count(passed)
            if reading.observation is None and not reading.missing:
                report.failed += 1
            course.open_runs.pop(record.run.run_id, None)

        alone = list(course.open_runs.values())
        if not course.recheck:
            alone = alone[:SINGLE_READS]
        await all_of([read(record) for record in alone])

    async def _read_run(
        self, workspace: Workspace, client: FloraClient, run: Run
    ) -> tuple[Workspace, Reading]:
        """Read a run, and tell with whose key.

        One that is only claimed for the workspace, and that FLORA denies there, is looked for with
        the other keys: whoever knows a workspace's signing secret can claim any run for it.
        """
        reading = await read_run(client, run)
        if not (reading.missing and run.workspace_is_claimed):
            return workspace, reading
        for other in self._readable():
            if other is workspace or other.client is None:
                continue
            try:
                elsewhere = await read_run(other.client.for_fresh, run)
            except (KeyRefused, RateLimited):
                reading.missing = False  # it may be there
                continue
            reading.reads += elsewhere.reads
            if elsewhere.observation is not None:
                elsewhere.reads = reading.reads
                return other, elsewhere
            reading.missing = reading.missing and elsewhere.missing
        return workspace, reading

    async def _entries(
        self, workspace: Workspace, record: Record, reading: Reading, course: Round
    ) -> list[Entry]:
        """What a reading says of its run, and of the runs that it showed on the way.

        FLORA's denial of a run counts while FLORA can be read in its workspace. Raises
        `OtherWorkspace`, `KeyRefused` and `RateLimited`.
        """
        beside = await without_removed(self._database, taken_over(workspace, reading.beside))
        entries: list[Entry] = [Seen(observation=item) for item in beside]
        if reading.observation is None:
            if reading.missing:
                reading.missing = await self._confirm(workspace, course)
            return [
                *entries,
                Unseen(
                    run_id=record.run.run_id,
                    at=self._clock(),
                    error=reading.error,
                    missing=reading.missing,
                    reads=reading.reads,
                    claim=self._holder,
                ),
            ]
        seen = owned(workspace, reading.observation)
        again = await counted_before(self._database, {seen.run_id: record}, [seen])
        return [
            *entries,
            Seen(
                observation=seen,
                reads=reading.reads,
                claim=self._holder,
                counted_before=bool(again),
            ),
        ]

    async def _confirm(self, workspace: Workspace, course: Round) -> bool:
        """Whether FLORA can be read in this workspace, with this key: what the round has read
        tells, else the newest run of the history, or FLORA's word on whose key it is.

        Raises `OtherWorkspace`, `KeyRefused` and `RateLimited`.
        """
        async with course.confirming:
            if course.confirmed is not None:
                return course.confirmed
            client = workspace.require_client()
            course.confirmed = False
            try:
                page = await client.history(limit=1, deadline=CALL_SECONDS)
                if taken_over(workspace, page.items):
                    course.confirmed = True
                else:  # an empty history might be another workspace's
                    ids = await client.list_workspaces(deadline=CALL_SECONDS)
                    workspace.reads(ids)
                    course.confirmed = workspace.workspace_id in ids
            except (KeyRefused, RateLimited, OtherWorkspace):
                raise
            except FloraError as error:
                log.warning(
                    "poll.denial_not_counted", workspace_id=workspace.name, error=str(error)
                )
            return course.confirmed
