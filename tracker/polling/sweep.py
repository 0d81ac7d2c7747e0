"""Reconciling with the run history: every run that FLORA lists is known here afterwards.

A sweep reads each kind of runs from the newest down (`_Sweep._sweep_kind`):

1. The newest page shows what is to be read: the gap from the top of the list down to what
   `history_coverage` has, then the gaps below, newest first.
2. A gap is read page by page. The items of a page are stored; then all that is newer than its last
   ones is recorded as covered. What is left is a smaller gap: a sweep that is interrupted there is
   resumed by the next one.
3. Items that cannot be read are a hole above a page. It is recorded with its error and stays a gap,
   which is tried again after growing waits; the page below is read.
4. A FLORA that does not answer ends the sweep. The place is recorded, and becomes a hole if it
   fails repeatedly while what is above it can be read.

Coverage is in FLORA's creation times. It ends two minutes before FLORA's now, because a run may be
listed late, and never later than the newest run allows, whatever either clock says. FLORA's clock
of creation may be further behind than both: a run that becomes known after its time was covered
shows that, and the sweep reads on until a page has none. A sweep that finds nothing new costs one
page.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Final
from uuid import uuid4

from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    KeyRefused,
    RateLimited,
    ServerFault,
    SettingsError,
    StoreError,
)
from tracker.core.formatting import iso_time
from tracker.core.log import get_logger
from tracker.core.observation import Observation
from tracker.core.record import Observed
from tracker.core.run import RunType
from tracker.core.waiting import cancel, repeat, to_its_end
from tracker.flora.client import HistoryPage
from tracker.polling.history import HistoryWalk, Hole, WalkedPage
from tracker.polling.poll import Coalescer, DurationBook
from tracker.store import coordination
from tracker.store.queries import runs, sweeps
from tracker.store.queries.sweeps import Gap, Interval
from tracker.store.writing.retention import without_removed
from tracker.store.writing.writer import Writer, WriteResult
from tracker.workspaces import Service, Workspace

LISTED_WITHIN: Final = timedelta(minutes=2)
"""How late a run may appear in FLORA's list, counted from its creation."""
AHEAD: Final = timedelta(minutes=5)
"""How far a time may lie ahead of both clocks and still be believed."""
RETRY_AFTER: Final = timedelta(minutes=5)
RETRY_WITHIN: Final = timedelta(days=1)
"""The pause of an unreadable gap: doubling from the first to the second."""
STUBBORN_AFTER: Final = 2
"""5xx or time-outs at one place after which it is treated as an unreadable page."""
STUBBORN_SECONDS: Final = 10.0
"""How long a read may take there, repetitions included."""
GENERATIONS_EVERY: Final = timedelta(days=1)
"""How often the list of generations is read in a workspace that has shown none."""
GENERATIONS_SECONDS: Final = 120.0
"""How long generations may delay the next sweep of technique runs; the next sweep resumes them."""
LEASE: Final = timedelta(minutes=1)
"""How long a sweep that died keeps others away from its workspace."""
RENEW_AFTER: Final = 15.0
"""Seconds after which a sweep renews its lease (FLORA may be slow for minutes)."""

_LOGGED: Final = (
    *("pages", "items", "discovered", "repaired", "unreadable", "error", "generations_error"),
)
"""What the log of sweeps keeps of a report."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadGap:
    """Runs created after `from_at`, up to `to_at` (ISO 8601, UTC), that could not be read."""

    run_type: RunType
    from_at: str
    to_at: str
    error: str


@dataclass(slots=True, kw_only=True)
class SweepReport:
    """The result of a sweep.

    `discovered` counts runs that were unknown, `repaired` known ones whose end or details were
    missing. `error` is `None` for a sweep that was not broken off, `generations_error` if these
    could be read or were not due; `gaps` are those that it tried in vain, or that an earlier sweep
    did and that are not due yet. `skipped` is true if another process is sweeping.
    """

    workspace_id: str
    pages: int = 0
    items: int = 0
    discovered: int = 0
    repaired: int = 0
    unreadable: int = 0
    gaps: list[UnreadGap] = field(default_factory=list)
    error: str | None = None
    generations_error: str | None = None
    skipped: bool = False


@dataclass(kw_only=True, eq=False)
class Sweeper(Service):
    """Sweeps workspaces. `first_since` is how far back a workspace's first sweep goes."""

    writer: Writer
    durations: DurationBook
    coalescer: Coalescer
    first_since: timedelta
    lease: timedelta = LEASE
    renew_after: float = RENEW_AFTER

    async def sweep(self, workspace: Workspace, *, since: timedelta | None = None) -> SweepReport:
        """Sweep one workspace: what its coverage lacks, or everything since `since` ago.

        Failures of FLORA and of the database are reported, not raised, and recorded in the log of
        sweeps if the database can be written. Raises `SettingsError` if the workspace has no key.
        """
        workspace.require_client()
        sweep, renewing = _Sweep(self, workspace, since), None
        report = sweep.report
        try:
            report.skipped = not await sweep.hold()
            if not report.skipped:
                renewing = asyncio.create_task(repeat("sweep lease", sweep.renew))
                await sweep.run()
        finally:
            if not report.skipped:  # if taking it was cancelled, it may be taken all the same
                ending = self._drop(sweep.lease, renewing)  # two writes, one after the other
                await to_its_end(ending, seconds=2 * coordination.LEASE_SECONDS)
        return report

    async def _drop(self, lease: str, renewing: "asyncio.Task[None] | None") -> None:
        await cancel(renewing)  # else it might take back what is dropped
        with suppress(StoreError):  # it then expires
            await coordination.drop_lease(self.database, lease, self.process)


class _Sweep:
    def __init__(self, sweeper: Sweeper, workspace: Workspace, since: timedelta | None) -> None:
        self.lease = f"sweep:{workspace.place}"
        self.report = SweepReport(workspace_id=workspace.name)
        self._sweeper = sweeper
        self._database = sweeper.database
        self._clock = sweeper.clock
        self._workspace = workspace
        self._since = since
        self._started_at = sweeper.clock()  # `run` sets it again, once the lease is held
        self._row: int | None = None  # in the log of sweeps
        self._through: dict[RunType, datetime | None] = {}

    async def hold(self) -> bool:
        return await coordination.take_lease(
            self._database, self.lease, self._sweeper.process, self._clock(), self._sweeper.lease
        )

    async def renew(self) -> None:
        """Renew the lease in a while; its loss is noticed with the next page."""
        await asyncio.sleep(self._sweeper.renew_after)
        await self.hold()

    async def run(self) -> None:
        """Sweep both kinds, and write the log; its row exists before the second page is read."""
        report = self.report
        report.error = "it was interrupted"
        # While the lease was waited for, another process may have finished its sweep.
        self._started_at, began = self._clock(), self._sweeper.clock.seconds()
        refused = None
        try:
            try:
                await self._sweep_kind("technique")
                # These pages have shown what a round of polling would have read them for.
                self._sweeper.coalescer.add(
                    self._workspace.place, report.pages, began=began, complete=True
                )
            except FloraError as failure:
                if not _concerns_list(failure):
                    raise
                refused = str(failure)
            await self._sweep_generations()
            report.error = refused
        except (FloraError, SettingsError, StoreError) as failure:
            report.error = str(failure)
        except Exception as failure:
            report.error = f"a fault of the tracker's own: {type(failure).__name__}: {failure}"
            raise
        finally:
            await self._finish()

    async def _sweep_generations(self) -> None:
        """Sweep generations; in a workspace that has shown none, one process does so once a day.

        A failure here is no failure of technique runs.
        """
        workspace, sweeper = self._workspace, self._sweeper
        among = sweeper.workspaces.ids_of_runs(workspace)
        known = await runs.has_generations(self._database, among)
        take_lease = partial(
            coordination.take_lease,
            self._database,
            f"generations:{workspace.place}",
            f"{sweeper.process}:{uuid4()}",  # this process's next sweep does not have it either
            longest=GENERATIONS_EVERY,
        )
        if not known and not await take_lease(self._clock(), sweeper.lease):
            return
        limit = asyncio.timeout(GENERATIONS_SECONDS if self._since is None else None)
        answered = True
        try:
            async with limit:
                await self._sweep_kind("generation")
        except TimeoutError:
            if not limit.expired():
                raise
        except FloraError as error:
            answered = (
                isinstance(error, FloraRefusal)
                and not error.silent
                and error.status in (400, 403, 404, 410)
            )
            if known:
                self.report.generations_error = str(error)
            log.info("sweep.generations_failed", workspace_id=workspace.name, error=str(error))
        if answered and not known:
            await take_lease(self._clock(), GENERATIONS_EVERY)

    async def _sweep_kind(self, kind: RunType) -> None:
        """Read the newest page and the gaps below it; with `since`, everything."""
        async with aclosing(self._pages(kind)) as pages:
            newest = await anext(pages)
            plan = await self._plan(kind, newest.items)
            await self._read_down(plan, await self._take(plan, plan.newest_gap(), newest), pages)
        while gap := plan.next_gap(self._clock()):
            async with aclosing(self._pages(kind, gap.above)) as pages:
                await self._read_down(plan, gap, pages)
        self.report.gaps += [*plan.unread, *plan.resting()]
        # For the log of sweeps only; coverage decides what is read.
        since = plan.now - self._sweeper.first_since
        self._through[kind] = sweeps.verified(plan.covered, since=since)

    def _pages(
        self, kind: RunType, above: Interval | None = None
    ) -> AsyncGenerator[WalkedPage, None]:
        """The pages from the top of the list down, or from below an interval."""
        client = self._workspace.require_client()
        stubborn = above is not None and above.failures >= STUBBORN_AFTER
        deadline = STUBBORN_SECONDS if stubborn else None

        async def read(cursor: str | None, limit: int) -> HistoryPage:
            page = await client.history(kind=kind, cursor=cursor, limit=limit, deadline=deadline)
            self.report.pages += 1
            return replace(page, items=self._workspace.attributed_page(page.items))

        walk = HistoryWalk(read, stubborn=stubborn)
        return walk.pages(below=above.from_at, cursor=above.cursor) if above else walk.pages()

    async def _read_down(
        self, plan: "_Plan", gap: Gap | None, pages: AsyncGenerator[WalkedPage, None]
    ) -> None:
        """Take pages until nothing is left of a gap.

        A failure below the top is recorded at its place, so that the next sweep can tell a broken
        page from a FLORA that is down.
        """
        while gap is not None:
            try:
                page = await anext(pages)
            except (ServerFault, FloraUnreachable) as error:
                if gap.above is None:
                    raise
                failed = Hole(error=error, cursor=gap.above.cursor)
                place = await self._note(plan, gap.top, failed, end=None)
                if not (plan.all_again and isinstance(error, ServerFault)):
                    raise
                # No later sweep goes on here: this one goes around the page at once.
                around = replace(place, failures=STUBBORN_AFTER)
                plan.around = Gap(gap.bottom, gap.top, around)
                return
            gap = await self._take(plan, gap, page)

    async def _take(self, plan: "_Plan", gap: Gap, page: WalkedPage) -> Gap | None:
        """Store a page and record what it covers of a gap; what is left of the gap."""
        is_late = await self._store(plan, page)
        left = await self._cover(plan, gap, page, is_late=is_late)
        if not await self.hold():
            raise StoreError("it took so long that another process has begun one")
        return left

    async def _cover(
        self, plan: "_Plan", gap: Gap, page: WalkedPage, *, is_late: bool
    ) -> Gap | None:
        """Record the hole above a page, and what is covered down to the end of the page unless a
        run of it came late; what is left of the gap."""
        if (hole := page.hole) is not None:
            is_down = hole.end is None and isinstance(hole.error, ServerFault | FloraUnreachable)
            if is_down and plan.all_again:  # it has not failed in earlier sweeps, as others have
                raise hole.error
            end = hole.end or gap.bottom
            if end < gap.top:
                await self._note(plan, gap.top, hole, end=end)
                gap = Gap(gap.bottom, end)
            elif gap.top == plan.until:  # above what is covered: read next time
                plan.report_unread(plan.now, end, hole.error)
            # else it is covered, or in a gap above this one
            if hole.end is None:
                return None
        top = plan.until if page.from_top else gap.top
        floor = plan.bottom if page.is_last else None if is_late else page.floor
        if floor is not None and floor < top:
            now = self._clock()
            read = Interval(from_at=floor, to_at=top, read_at=now, cursor=page.cursor)
            await self._add(plan, read)
            if floor < gap.top:
                gap = Gap(gap.bottom, floor, read)
        is_read = page.is_last or (floor is not None and floor <= gap.bottom)
        return None if is_read else gap

    async def _log_row(self) -> int:
        """The row in the log of sweeps, inserted if need be."""
        self.report.workspace_id = self._workspace.name
        if self._row is None:
            workspace_id = self._workspace.workspace_id
            self._row = await sweeps.begin(self._database, workspace_id, self._started_at)
        return self._row

    async def _plan(self, kind: RunType, items: Sequence[Observation]) -> "_Plan":
        """What is to be read, by coverage and the items of the newest page."""
        await self._log_row()
        workspace, database, now = self._workspace, self._database, self._clock()
        at_flora = now + (workspace.require_client().clock_offset or timedelta())
        earlier, later = sorted((now, at_flora))
        # Neither clock alone shows up to when the list is complete: the newest run between does.
        believed = (one.created_at for one in items if one.created_at)
        newest = max((at for at in believed if at <= later + AHEAD), default=earlier)
        until = min(max(newest, earlier), later) - LISTED_WITHIN
        first = at_flora - self._sweeper.first_since
        named = await self._is_named(items)
        covered = []
        if named:
            covered = await sweeps.of(database, workspace.name, kind)
            if any(one.to_at > later + AHEAD for one in covered):
                await sweeps.forget_after(database, workspace.name, kind, later + AHEAD)
                covered = await sweeps.of(database, workspace.name, kind)
            stale = [one for one in covered if one.error and one.from_at <= first]
            if stale:  # too old for anything new to come of them, so they are no longer reported
                settled = [replace(one, error=None, retry_at=None) for one in stale]
                covered = await sweeps.add(database, workspace.name, kind, *settled)
        return _Plan(
            workspace_id=workspace.name if named else None,
            kind=kind,
            now=at_flora,
            since=first if self._since is None else at_flora - self._since,
            until=until,
            covered=covered,
            covered_before=covered,
            all_again=self._since is not None,
        )

    async def _is_named(self, items: Sequence[Observation]) -> bool:
        """Whether the workspace of the history is known: another's coverage would hide runs."""
        workspace = self._workspace
        ids = {item.workspace_id for item in items if item.workspace_id}
        if others := ids - {workspace.workspace_id}:
            raise SettingsError(
                f"the API key that is set for workspace {workspace.name} shows runs of workspace "
                f"{min(others)}: set the right key, or FLORA_WORKSPACE_ID (or id) to the one to "
                "track"
            )
        if ids and workspace.configured_id is not None:
            return True
        try:  # this also stores it for other processes
            await self._sweeper.workspaces.id_of(workspace)
        except SettingsError:
            if workspace.configured_id is not None:
                raise
        except FloraError as error:
            log.info("sweep.workspace_unknown", workspace_id=workspace.name, error=str(error))
        else:
            return True
        return bool(ids)

    async def _note(
        self, plan: "_Plan", at: datetime, hole: Hole, *, end: datetime | None
    ) -> Interval:
        """Record that nothing could be read from `at` down to `end`, and when it is tried again;
        without an end, by the next sweep."""
        failures = 1 + next((one.failures for one in plan.covered if one.from_at == at), 0)
        now = self._clock()
        wait = min(RETRY_AFTER * 2 ** min(failures - 1, 10), RETRY_WITHIN)
        place = Interval(
            from_at=at,
            to_at=at,
            read_at=now,
            cursor=hole.cursor,
            error=str(hole.error),
            failures=failures,
            retry_at=None if end is None else now + wait,
        )
        await self._add(plan, place)
        if end is not None:
            plan.report_unread(at, end, hole.error, failures)
        return place

    async def _add(self, plan: "_Plan", interval: Interval) -> None:
        if plan.workspace_id is None:
            plan.covered = sweeps.merged([*plan.covered, interval])
        else:
            plan.covered = await sweeps.add(self._database, plan.workspace_id, plan.kind, interval)

    async def _store(self, plan: "_Plan", page: WalkedPage) -> bool:
        """Store a page's items; whether one of them came after its time was covered."""
        report, sweeper = self.report, self._sweeper
        kept, stored = await without_removed(self._database, page.items)
        open_runs = (item for item in kept if not item.precedence.ended)  # others wait for no end
        await sweeper.durations.learn(item.technique_id for item in open_runs)
        late = False
        for result in await sweeper.writer.submit_all(
            [
                Observed(observation=item, incidental=True, only_stored=item.run_id in stored)
                for item in kept
            ]
        ):
            before, after = result.before, result.after
            if after is None:  # removed by retention just now
                continue
            if before is None:
                report.discovered += 1
            else:
                ended = after.run.precedence.ended and not before.run.precedence.ended
                report.repaired += ended or result.settles
            late |= plan.is_late(result)
        report.items += len(page.items)
        report.unreadable += len(page.unreadable)
        for reason in page.unreadable:
            log.error("sweep.item_unreadable", workspace_id=report.workspace_id, reason=reason)
        return late

    async def _finish(self) -> None:
        """Write the end of the sweep into the log, if the database answers."""
        report, workspace = self.report, self._workspace
        try:
            await sweeps.finish(
                self._database,
                await self._log_row(),
                at=self._clock(),
                also_of=workspace.workspace_id if workspace.is_top else None,
                through=self._through.get("technique"),
                generations_through=self._through.get("generation"),
                **{name: getattr(report, name) for name in _LOGGED},
            )
        except StoreError as failure:
            report.error = report.error or str(failure)
            log.error("sweep.log_failed", workspace_id=report.workspace_id, error=str(failure))


def _concerns_list(error: FloraError) -> bool:
    """Whether the error is about the list that was asked for, so that the other can be read."""
    if isinstance(error, FloraRefusal):
        return error.from_flora and not isinstance(error, KeyRefused | RateLimited)
    return isinstance(error, FloraUnreadable) and not error.silent


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What of one kind is to be read, and what has been. Times are FLORA's; `now` is its now.

    `workspace_id` is `None` if the workspace of the history is unknown: nothing is recorded then.
    """

    workspace_id: str | None
    kind: RunType
    now: datetime
    since: datetime
    until: datetime
    covered: list[Interval]
    covered_before: list[Interval]
    all_again: bool
    unread: list[UnreadGap] = field(default_factory=list)
    around: Gap | None = None
    """Where a sweep of everything goes on below a page that FLORA did not answer."""
    tried: set[datetime] = field(default_factory=set)
    """The tops of the gaps that were read."""

    @property
    def bottom(self) -> datetime:
        """How far down there is anything to read."""
        covered = () if self.all_again else self.covered
        return min([self.since, *(one.from_at for one in covered)])

    def is_late(self, result: WriteResult) -> bool:
        """Whether the run became known after its time was covered.

        FLORA's clock of creation is behind then, and more such runs may be below it.
        """
        created_at, before = result.record.run.created_at, result.before
        return created_at is not None and any(
            one.from_at < created_at <= one.to_at
            and (before is None or before.first_seen_at > one.read_at)
            for one in self.covered_before
        )

    def report_unread(
        self, at: datetime, end: datetime, error: FloraError, failures: int = 1
    ) -> None:
        """Report that nothing could be read from `at` down to `end`."""
        times = {"from_at": iso_time(end), "to_at": iso_time(at)}
        self.unread.append(UnreadGap(run_type=self.kind, **times, error=str(error)))
        log.error(
            "sweep.page_unreadable",
            workspace_id=self.workspace_id,
            run_type=self.kind,
            **times,
            error=str(error),
            failures=failures,
        )

    def resting(self) -> list[UnreadGap]:
        """The gaps that earlier sweeps could not read, and that this one did not try."""
        reported = {one.to_at for one in self.unread}
        return [
            UnreadGap(run_type=self.kind, from_at=iso_time(gap.bottom), to_at=at, error=error)
            for gap in sweeps.gaps(self.covered, since=self.since, until=self.until)
            if gap.above and (error := gap.above.error) and gap.top > self.since
            if (at := iso_time(gap.top)) not in reported and not self.all_again
        ]

    def newest_gap(self) -> Gap:
        """The gap at the top of the list: at least a page, which may show something new."""
        if self.all_again or not self.covered:
            return Gap(self.since, self.until)
        return Gap(min(self.covered[0].to_at, self.until), self.until)

    def next_gap(self, now: datetime) -> Gap | None:
        """The newest gap that is due and that this sweep has not tried yet."""
        if self.all_again:
            around, self.around = self.around, None
            return around
        for gap in sweeps.gaps(self.covered, since=self.since, until=self.until):
            above = gap.above
            if above is None or gap.top in self.tried or (above.retry_at and above.retry_at > now):
                continue
            if not above.failures or gap.top > self.since:  # else it is too old to matter
                self.tried.add(gap.top)
                return gap
        return None
