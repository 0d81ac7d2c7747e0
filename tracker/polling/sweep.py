"""Reconciling with the run history: every run that FLORA lists is known here afterwards.

A sweep reads the newest page of each kind of runs, and then what `history_coverage` lacks below it,
newest first; the writer takes every item. Coverage is recorded after the items are stored, so the
next sweep resumes one that was interrupted. A page that cannot be read leaves a gap, which is
recorded with its error and tried again after growing waits, and everything else is read.

Coverage is in FLORA's creation times. It ends two minutes before FLORA's now, because a run may be
listed late, and never later than the newest run allows, whatever either clock says. FLORA's clock
of creation may be further behind than both: a run that becomes known after its time was covered
shows that, and the sweep reads on until a page has none. A sweep that finds nothing new costs one
page.
"""

import asyncio
from collections.abc import Sequence
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
from tracker.polling.history import (
    HistoryWalk,
    Hole,
    PageUnreadable,
    WalkedPage,
    attributed_page,
    without_removed,
)
from tracker.polling.poll import Coalescer, DurationBook
from tracker.store import coordination
from tracker.store.queries import runs, sweeps
from tracker.store.queries.sweeps import Gap, Interval
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
        self._plans: dict[RunType, _Plan] = {}
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
        await self._read_down(kind, Gap(self._started_at, self._started_at))
        plan = self._plans[kind]
        tried: set[datetime] = set()
        while self._since is None and (gap := plan.next_gap(self._clock(), tried)):
            tried.add(gap.top)
            await self._read_down(kind, gap)
        self.report.gaps += [*plan.unread, *plan.resting()]
        # For the log of sweeps only; coverage decides what is read.
        since = plan.now - self._sweeper.first_since
        self._through[kind] = sweeps.verified(plan.covered, since=since)

    async def _read_down(self, kind: RunType, gap: Gap) -> None:
        """Read a gap of the plan. The first, at the top of the list, makes the plan.

        A failure below the top is recorded at its place, so that the next sweep can tell a broken
        page from a FLORA that is down.
        """
        plan, at = self._plans.get(kind), _Descent(gap)
        stubborn = gap.above is not None and gap.above.failures >= STUBBORN_AFTER
        walk = HistoryWalk(self._workspace.require_client(), kind, stubborn=stubborn)
        try:
            async with aclosing(walk.pages(below=at.lowest, cursor=at.cursor)) as pages:
                async for page in pages:
                    items = attributed_page(self._workspace, page.items)
                    if plan is None:
                        await self._log_row()
                        plan = self._plans[kind] = await self._plan(kind, items)
                        at = _Descent(plan.newest_gap())
                    is_late = await self._take_page(plan, items, page)
                    is_over = await self._cover(plan, at, page, is_late=is_late)
                    if not await self.hold():
                        raise StoreError("it took so long that another process has begun one")
                    if is_over:
                        break
        except PageUnreadable as error:
            is_down = isinstance(error.cause, ServerFault | FloraUnreachable)
            if plan is None or (is_down and plan.all_again):
                raise error.cause from error
            await self._note(plan, at.reached, error.hole, at.gap, end=at.gap.bottom)
        except (ServerFault, FloraUnreachable) as error:
            if plan is None or at.lowest is None:
                raise
            failed = Hole(error=str(error), cursor=at.cursor)
            place = await self._note(plan, at.lowest, failed, at.gap, end=None)
            if not (plan.all_again and isinstance(error, ServerFault)):
                raise
            # No later sweep goes on here: this one goes around the page at once.
            around = replace(place, failures=STUBBORN_AFTER)
            await self._read_down(kind, Gap(at.gap.bottom, at.lowest, around))
        finally:
            self.report.pages += walk.pages_read

    async def _cover(
        self, plan: "_Plan", at: "_Descent", page: WalkedPage, *, is_late: bool
    ) -> bool:
        """Record what is covered down to the end of a page, unless a run of it came late, and the
        hole above it; whether the gap is read."""
        floor = plan.bottom if page.is_last else None if is_late else page.floor
        if page.from_top:
            at.top = plan.until
        if page.hole is not None:
            end = page.ceiling or plan.bottom  # all of it if no time is known
            if end > plan.until:  # above what is covered: read next time
                plan.report_unread(plan.now, end, page.hole.error)
            else:
                await self._note(plan, at.reached, page.hole, at.gap, end=end)
                at.top, at.lowest = end, None
        if floor is None:
            return False
        if floor < at.top:
            at.lowest, at.cursor, now = floor, page.cursor, self._clock()
            read = Interval(from_at=floor, to_at=at.top, read_at=now, cursor=page.cursor)
            await self._add(plan, read)
        return floor <= at.gap.bottom

    async def _log_row(self) -> int:
        """The row in the log of sweeps, inserted if need be."""
        self.report.workspace_id = self._workspace.name
        if self._row is None:
            workspace_id = self._workspace.workspace_id
            self._row = await sweeps.begin(self._database, workspace_id, self._started_at)
        return self._row

    async def _plan(self, kind: RunType, items: Sequence[Observation]) -> "_Plan":
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
        self, plan: "_Plan", at: datetime, hole: Hole, gap: Gap, *, end: datetime | None
    ) -> Interval:
        """Record that nothing could be read from `at` down to `end`, and when it is tried again;
        without an end, by the next sweep."""
        before = next((one for one in plan.covered if one.from_at == at), gap.above)
        failures = 1 + (before.failures if before else 0)
        now = self._clock()
        wait = min(RETRY_AFTER * 2 ** min(failures - 1, 10), RETRY_WITHIN)
        place = Interval(
            from_at=at,
            to_at=at,
            read_at=now,
            cursor=hole.cursor,
            error=hole.error,
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

    async def _take_page(
        self, plan: "_Plan", items: Sequence[Observation], page: WalkedPage
    ) -> bool:
        """Store the items; whether one of them came after its time was covered."""
        report, sweeper = self.report, self._sweeper
        kept, stored = await without_removed(self._database, items)
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
        report.items += len(items)
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


class _Descent:
    """How far down a gap has been read: from `top` to `lowest` (`None`: nothing below `top` yet),
    below which `cursor` leads."""

    def __init__(self, gap: Gap) -> None:
        self.gap = gap
        self.top = gap.top
        self.lowest = gap.above.from_at if gap.above else None
        self.cursor = gap.above.cursor if gap.above else None

    @property
    def reached(self) -> datetime:
        return self.lowest or self.top


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
    all_again: bool
    unread: list[UnreadGap] = field(default_factory=list)
    covered_before: list[Interval] = field(init=False)

    def __post_init__(self) -> None:
        self.covered_before = self.covered

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

    def report_unread(self, at: datetime, end: datetime, error: str, failures: int = 1) -> None:
        """Report that nothing could be read from `at` down to `end`."""
        times = {"from_at": iso_time(end), "to_at": iso_time(at)}
        self.unread.append(UnreadGap(run_type=self.kind, **times, error=error))
        log.error(
            "sweep.page_unreadable",
            workspace_id=self.workspace_id,
            run_type=self.kind,
            **times,
            error=error,
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

    def next_gap(self, now: datetime, tried: set[datetime]) -> Gap | None:
        """The newest gap that this sweep has yet to read."""
        for gap in sweeps.gaps(self.covered, since=self.since, until=self.until):
            above = gap.above
            if above is None or gap.top in tried or (above.retry_at and above.retry_at > now):
                continue
            if not above.failures or gap.top > self.since:  # else it is too old to matter
                return gap
        return None
