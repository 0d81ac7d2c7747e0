"""Reconciling with the run history: nothing that FLORA lists is missing here afterwards.

A sweep reads the newest page of each kind of runs, and then what `history_coverage` says is missing
below it, newest first; the writer takes every item. What a page covers is recorded after what
it brought is stored, so a sweep that is broken off is resumed by the next. A page that cannot be
read leaves a gap: it is recorded with its error and tried again after growing waits, and everything
else is read.

Coverage is counted in FLORA's own creation times. It ends two minutes before FLORA's now, because a
run may be listed late, and never later than the newest run seen allows, whatever either clock says.
A sweep that finds nothing new costs one page.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Final
from uuid import uuid4

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    ServerFault,
    SettingsError,
    StoreError,
)
from tracker.core.observation import Observation
from tracker.core.record import Seen
from tracker.core.run import RunType
from tracker.polling.history import Hole, PageUnreadable, Stretch, Walk, taken_over, without_removed
from tracker.polling.poll_round import DurationBook, Gathering
from tracker.polling.workspaces import Workspace, WorkspaceIds, Workspaces
from tracker.store import claims
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.queries import sweeps
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.sweeps import Gap, Interval
from tracker.store.writing.writer import Writer, WriteResult

LISTED_WITHIN: Final = timedelta(minutes=2)
"""How late a run may appear in FLORA's list, counted from its creation."""
AHEAD: Final = timedelta(minutes=5)
"""How far a time may lie ahead of both clocks and still be believed."""
RETRY_AFTER: Final = timedelta(minutes=5)
RETRY_WITHIN: Final = timedelta(days=1)
"""How long a gap that could not be read rests: doubling from the first to the second."""
STUBBORN_AFTER: Final = 2
"""After so many 5xx or time-outs at one place it is treated as a page that cannot be read."""
GENERATIONS_EVERY: Final = timedelta(days=1)
"""How often the list of generations is read in a workspace that has shown none."""
GENERATIONS_SECONDS: Final = 120.0
"""How long generations may hold up the next sweep of technique runs; the next one goes on."""
LEASE: Final = timedelta(minutes=1)
"""How long a sweep holds its workspace: one whose process died keeps others away for no longer."""
RENEW_AFTER: Final = 15.0
"""Seconds after which a sweep that still goes on (FLORA may be slow for minutes) holds it anew."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadGap:
    """Runs created after `from_at`, through `to_at` (ISO 8601, UTC), that could not be read."""

    run_type: RunType
    from_at: str
    to_at: str
    error: str


@dataclass(slots=True, kw_only=True)
class SweepReport:
    """What a sweep found.

    `discovered` counts runs that were not known, `repaired` known ones whose end or details were
    not. `error` is `None` for a complete sweep, `generations_error` where these could be read or
    were not asked for; `gaps` are those that this sweep tried to read and could not. `skipped` is
    true where another process is sweeping.
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

    def count(self, passed: WriteResult) -> None:
        """Count one item that went through the writer."""
        before, after = passed.before, passed.after
        if before is None:
            self.discovered += 1
        elif after is not None and (
            (after.run.standing.ended and not before.run.standing.ended)
            or (after.run.settled and not before.run.settled)
        ):
            self.repaired += 1


class Sweeper:
    """Sweeps workspaces. `first_since` is how far back a workspace's first sweep goes."""

    def __init__(
        self,
        *,
        database: Database,
        writer: Writer,
        workspaces: Workspaces,
        ids: WorkspaceIds,
        durations: DurationBook,
        gathering: Gathering,
        holder: str,
        first_since: timedelta,
        clock: Clock,
    ) -> None:
        self._database = database
        self._writer = writer
        self._workspaces = workspaces
        self._ids = ids
        self._durations = durations
        self._gathering = gathering
        self._holder = holder
        self._first_since = first_since
        self._clock = clock

    async def sweep(self, workspace: Workspace, *, since: timedelta | None = None) -> SweepReport:
        """Sweep one workspace: what its coverage lacks, or all of it back to `since` before now.

        FLORA's and the database's failures are reported, not raised: they stand in the log of
        sweeps too where the database can be written. Raises `SettingsError` where the workspace has
        no key.
        """
        workspace.require_client()
        report = SweepReport(workspace_id=workspace.name)
        lease = f"sweep:{workspace.slot}"
        if not await self._hold(lease):
            report.skipped = True
            return report
        renewing = asyncio.create_task(self._renew(lease))
        try:
            await self._sweep(_Sweep(workspace, since, lease, report, self._clock()))
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])  # else it might take what is given back
            with suppress(StoreError):  # then it runs out by itself
                await claims.drop_lease(self._database, lease, self._holder)
        return report

    async def _sweep(self, sweep: "_Sweep") -> None:
        """Sweep both kinds, and log it; the row is there before the second page is asked for."""
        workspace, report = sweep.workspace, sweep.report
        report.error = "it was interrupted"
        try:
            await self._sweep_kind(sweep, "technique")
            # It has shown what a round of polling would have read the same pages for.
            began, pages = sweep.started_at, report.pages
            self._gathering.count(workspace.slot, pages, began=began, over=True)
            report.error = None
            await self._sweep_generations(sweep)
        except (FloraError, SettingsError, StoreError) as failure:
            report.error = str(failure)
        except BaseException as failure:
            report.error = "it was interrupted"
            if isinstance(failure, Exception):
                name = type(failure).__name__
                report.error = f"a fault of the tracker's own: {name}: {failure}"
            raise
        finally:
            await self._close(sweep)

    async def _sweep_generations(self, sweep: "_Sweep") -> None:
        """A workspace that has shown none is read once a day, by whichever process comes
        first. Whatever FLORA answers here is no failure of technique runs."""
        workspace = sweep.workspace
        known = await read.has_generations(self._database, self._workspaces.claimable(workspace))
        look = partial(
            claims.take_lease,
            self._database,
            f"generations:{workspace.slot}",
            f"{self._holder}:{uuid4()}",  # nobody else's, this process's next sweep included
            longest=GENERATIONS_EVERY,
        )
        if not known and not await look(self._clock(), LEASE):
            return
        limit = asyncio.timeout(GENERATIONS_SECONDS if sweep.since is None else None)
        looked = True
        try:
            async with limit:
                await self._sweep_kind(sweep, "generation")
        except TimeoutError:
            if not limit.expired():
                raise
        except FloraError as error:
            looked = (
                isinstance(error, FloraRefusal)
                and not error.silent
                and error.status in (400, 403, 404, 410)
            )
            if known:
                sweep.report.generations_error = str(error)
            log.info("sweep.generations_failed", workspace_id=workspace.name, error=str(error))
        if looked and not known:
            await look(self._clock(), GENERATIONS_EVERY)

    async def _sweep_kind(self, sweep: "_Sweep", kind: RunType) -> None:
        """Read the newest page, and what is missing below it; in `sweep.since`, everything."""
        await self._read_down(sweep, kind, Gap(sweep.started_at, sweep.started_at))
        plan = sweep.plans[kind]
        tried: set[datetime] = set()
        while sweep.since is None and (gap := plan.next_gap(self._clock(), tried)):
            tried.add(gap.top)
            await self._read_down(sweep, kind, gap)
        # The log of sweeps says how far the history is verified; only coverage decides by it.
        sweep.report.gaps += plan.unread
        since = plan.now - self._first_since
        sweep.through[kind] = coverage.verified(plan.covered, since=since)

    async def _read_down(self, sweep: "_Sweep", kind: RunType, gap: Gap) -> None:
        """Read a gap of the plan; first of all from the list's top, which makes the plan.

        A failure at a place below the top is recorded there, so that the next sweep can tell one
        page that is broken from a FLORA that is down.
        """
        plan, above = sweep.plans.get(kind), gap.above
        stubborn = above is not None and above.failures >= STUBBORN_AFTER
        walk = Walk(sweep.workspace.require_client(), kind, stubborn=stubborn)
        below, cursor = (above.from_at, above.cursor) if above else (None, None)
        top, lowest = gap.top, below
        try:
            async with aclosing(walk.pages(below=below, cursor=cursor)) as pages:
                async for page in pages:
                    items = taken_over(sweep.workspace, page.items)
                    if plan is None:
                        await self._begin(sweep)
                        plan = sweep.plans[kind] = await self._plan(sweep, kind, items)
                        gap = plan.newest_gap()
                    await self._take_page(items, page, sweep.report)
                    if page.from_top:
                        top = plan.until
                    if page.hole is not None:
                        end = page.ceiling or plan.bottom  # where no time is shown, all of it
                        await self._note(plan, lowest or top, page.hole, gap, end=end)
                        top, lowest = end, None
                    floor = plan.bottom if page.is_last else page.floor
                    if floor is not None and floor < top:
                        lowest, cursor = floor, page.cursor
                        read_at = self._clock()
                        await self._add(
                            plan,
                            Interval(from_at=floor, to_at=top, read_at=read_at, cursor=cursor),
                        )
                    if not await self._hold(sweep.lease):
                        raise StoreError("it took so long that another process has begun one")
                    if floor is not None and floor <= gap.bottom:
                        break
        except PageUnreadable as error:
            if plan is None:
                raise error.cause from error
            await self._note(plan, lowest or top, error.hole, gap, end=gap.bottom)
        except (ServerFault, FloraUnreachable) as error:
            if plan is not None and lowest is not None:
                failed = Hole(error=str(error), cursor=cursor)
                await self._note(plan, lowest, failed, gap, end=None)
            raise
        finally:
            sweep.report.pages += walk.pages_read

    async def _begin(self, sweep: "_Sweep") -> int:
        """Its row in the log."""
        name = sweep.report.workspace_id = sweep.workspace.name
        if sweep.row is None:
            sweep.row = await sweeps.begin(self._database, name, sweep.started_at)
        return sweep.row

    async def _plan(self, sweep: "_Sweep", kind: RunType, items: Sequence[Observation]) -> "_Plan":
        """What to read, now that the newest page has been seen."""
        workspace, now = sweep.workspace, self._clock()
        at_flora = now + (workspace.require_client().clock_offset or timedelta())
        earlier, later = sorted((now, at_flora))
        # Neither clock alone says how far the list is whole: the newest run does, between the two.
        believed = (one.created_at for one in items if one.created_at)
        newest = max((at for at in believed if at <= later + AHEAD), default=earlier)
        until = min(max(newest, earlier), later) - LISTED_WITHIN
        first = at_flora - self._first_since
        named = await self._is_named(workspace, items)
        covered = []
        if named:
            covered = await coverage.of(self._database, workspace.name, kind)
            if any(one.to_at > later + AHEAD for one in covered):
                await coverage.forget_after(self._database, workspace.name, kind, later + AHEAD)
                covered = await coverage.of(self._database, workspace.name, kind)
            stale = [one for one in covered if one.error and one.from_at <= first]
            if stale:  # nothing new can come of it, so that nobody need hear of it any more
                settled = [replace(one, error=None, retry_at=None) for one in stale]
                covered = await coverage.add(self._database, workspace.name, kind, *settled)
        since = first if sweep.since is None else at_flora - sweep.since
        return _Plan(
            workspace_id=workspace.name if named else None,
            kind=kind,
            now=at_flora,
            since=since,
            until=until,
            covered=covered,
            all_again=sweep.since is not None,
        )

    async def _is_named(self, workspace: Workspace, items: Sequence[Observation]) -> bool:
        """Whether it is known whose history this is: coverage of another one would hide runs."""
        ids = {item.workspace_id for item in items if item.workspace_id}
        if others := ids - {workspace.workspace_id}:
            raise SettingsError(
                f"the API key that is set for workspace {workspace.name} shows runs of workspace "
                f"{min(others)}: set the right key, or the right id"
            )
        if ids:
            return True
        try:
            await self._ids.of(workspace)
        except SettingsError:
            if workspace.configured_id is not None:
                raise
        except FloraError as error:
            log.info("sweep.workspace_unknown", workspace_id=workspace.name, error=str(error))
        else:
            return True
        return False

    async def _note(
        self, plan: "_Plan", at: datetime, hole: Hole, gap: Gap, *, end: datetime | None
    ) -> None:
        """Record that from `at` down to `end` nothing could be read, and when it is tried again;
        without an end the next sweep does so at once."""
        before = next((one for one in plan.covered if one.from_at == at), gap.above)
        failures = 1 + (before.failures if before else 0)
        now = self._clock()
        wait = min(RETRY_AFTER * 2 ** min(failures - 1, 10), RETRY_WITHIN)
        await self._add(
            plan,
            Interval(
                from_at=at,
                to_at=at,
                read_at=now,
                cursor=hole.cursor,
                error=hole.error,
                failures=failures,
                retry_at=None if end is None else now + wait,
            ),
        )
        if end is None:
            return
        times = {"from_at": end.isoformat(), "to_at": at.isoformat()}
        plan.unread.append(UnreadGap(run_type=plan.kind, **times, error=hole.error))
        log.error(
            "sweep.page_unreadable",
            workspace_id=plan.workspace_id,
            run_type=plan.kind,
            **times,
            error=hole.error,
            failures=failures,
        )

    async def _add(self, plan: "_Plan", interval: Interval) -> None:
        if plan.workspace_id is None:
            plan.covered = coverage.merged([*plan.covered, interval])
        else:
            plan.covered = await coverage.add(
                self._database, plan.workspace_id, plan.kind, interval
            )

    async def _take_page(
        self, items: Sequence[Observation], page: Stretch, report: SweepReport
    ) -> None:
        kept = await without_removed(self._database, items)
        await self._durations.learn(item.technique_id for item in kept)
        for passed in await self._writer.submit_all([Seen(observation=item) for item in kept]):
            report.count(passed)
        report.items += len(items)
        report.unreadable += len(page.unreadable)
        for reason in page.unreadable:
            log.error("sweep.item_unreadable", workspace_id=report.workspace_id, reason=reason)

    async def _hold(self, lease: str) -> bool:
        """Take the sweep's lease, or keep it for longer."""
        return await claims.take_lease(self._database, lease, self._holder, self._clock(), LEASE)

    async def _renew(self, lease: str) -> None:
        """Keep the lease for as long as the sweep takes; whoever takes a page notices its loss."""
        while True:
            await asyncio.sleep(RENEW_AFTER)
            with suppress(StoreError):  # the next time, or the page, tells
                await self._hold(lease)

    async def _close(self, sweep: "_Sweep") -> None:
        """Write the end of the sweep into the log, if the database still answers."""
        report, workspace = sweep.report, sweep.workspace
        try:
            await sweeps.finish(
                self._database,
                await self._begin(sweep),
                at=self._clock(),
                pages=report.pages,
                items=report.items,
                discovered=report.discovered,
                repaired=report.repaired,
                unreadable=report.unreadable,
                through=sweep.through.get("technique"),
                generations_through=sweep.through.get("generation"),
                error=report.error,
                generations_error=report.generations_error,
            )
        except StoreError as failure:
            report.error = report.error or str(failure)
            log.error("sweep.log_failed", workspace_id=workspace.name, error=str(failure))


@dataclass(slots=True)
class _Sweep:
    """One sweep, and its row in the log as far as it is known."""

    workspace: Workspace
    since: timedelta | None
    lease: str
    report: SweepReport
    started_at: datetime
    row: int | None = None
    plans: dict[RunType, "_Plan"] = field(default_factory=dict)
    through: dict[RunType, datetime | None] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What of one kind is to be read, and what has been: times are FLORA's, `now` is its now.

    `workspace_id` is `None` where it is not known whose history it is: then nothing is recorded.
    """

    workspace_id: str | None
    kind: RunType
    now: datetime
    since: datetime
    until: datetime
    covered: list[Interval]
    all_again: bool
    unread: list[UnreadGap] = field(default_factory=list)

    @property
    def bottom(self) -> datetime:
        """How far down there is anything to read."""
        covered = () if self.all_again else self.covered
        return min([self.since, *(one.from_at for one in covered)])

    def newest_gap(self) -> Gap:
        """What is read from the list's top on: at least a page, which may show what is new."""
        if self.all_again or not self.covered:
            return Gap(self.since, self.until)
        return Gap(min(self.covered[0].to_at, self.until), self.until)

    def next_gap(self, now: datetime, tried: set[datetime]) -> Gap | None:
        """The newest gap that is still to be read in this sweep."""
        for gap in coverage.gaps(self.covered, since=self.since, until=self.until):
            above = gap.above
            if above is None or gap.top in tried or (above.retry_at and above.retry_at > now):
                continue
            if not above.failures or gap.top > self.since:  # else it has become too old to matter
                return gap
        return None
