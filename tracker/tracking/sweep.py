"""Reconciling with the run history: nothing that FLORA lists is missing here afterwards.

A sweep reads the history from the newest run back to its *horizon* and takes every item through the
door. It is complete or failed, never partly done: only a complete one moves the horizon of the
next.

The horizon is counted in FLORA's own creation times, never in ours, so that a wrong clock on either
side hides no run: each complete sweep keeps the newest creation time that it saw (`through`), and
the next one goes safely past it, and past what was started shortly before and has not ended. Once a
sweep has looked again, long enough after that newest run was first seen, nothing older can turn up,
and sweeps that find nothing new stop there: they cost one page, also after a thousand runs at once.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Final
from uuid import uuid4

import structlog

from tracker.core.clock import Clock
from tracker.core.entry import Seen
from tracker.core.errors import FloraError, StoreError
from tracker.core.observation import Observation
from tracker.sources import history
from tracker.sources.history import Kind
from tracker.store import claims, read, sweeps
from tracker.store.batch import Passed
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.tracking.durations import DurationBook
from tracker.tracking.gather import Gathering
from tracker.tracking.pages import taken_over, without_removed
from tracker.tracking.workspaces import Workspace, Workspaces

OVERLAP: Final = timedelta(minutes=2)
"""How far a sweep goes past the newest run of the one before: a run may be listed late."""
NEWLY_UNFINISHED: Final = timedelta(hours=1)
"""Runs that were started within this time before the horizon and have not ended are swept too; an
older one is stuck, and polled alone."""
TAIL: Final = 5
"""So many items at the end of a page must lie beyond the horizon before the sweep stops there."""
AHEAD: Final = timedelta(minutes=5)
"""How far a run's creation may lie ahead of FLORA's clock and still be believed."""
GENERATIONS_EVERY: Final = timedelta(days=1)
"""How often a workspace that has shown no generation run is looked at for one."""
LEASE: Final = timedelta(minutes=1)
"""How long a sweep holds its workspace: one whose process died keeps others away for no longer."""
RENEW_AFTER: Final = 15.0
"""Seconds after which a sweep that still goes on (FLORA may be slow for minutes) holds it anew."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class SweepReport:
    """What a sweep found.

    `discovered` counts runs that were not known, `repaired` known ones whose end or details were
    not. `error` is `None` for a complete sweep; `skipped` is true where another process is
    sweeping.
    """

    workspace_id: str
    pages: int = 0
    items: int = 0
    discovered: int = 0
    repaired: int = 0
    unreadable: int = 0
    error: str | None = None
    skipped: bool = False

    def count(self, passed: Passed) -> None:
        """Count one item that went through the door."""
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
        door: Door,
        workspaces: Workspaces,
        durations: DurationBook,
        gathering: Gathering,
        holder: str,
        first_since: timedelta,
        clock: Clock,
    ) -> None:
        self._database = database
        self._door = door
        self._workspaces = workspaces
        self._durations = durations
        self._gathering = gathering
        self._holder = holder
        self._first_since = first_since
        self._clock = clock

    async def sweep(self, workspace: Workspace, *, since: timedelta | None = None) -> SweepReport:
        """Sweep one workspace, back to `since` before now, or else as far as is needed.

        FLORA's and the database's failures are reported, not raised: they stand in the ledger too
        where the database can be written. Raises `SettingsError` where the workspace has no key.
        """
        workspace.require_client()
        report = SweepReport(workspace_id=workspace.name)
        lease = f"sweep:{workspace.slot}"
        if not await self._hold(lease):
            report.skipped = True
            return report
        renewing = asyncio.create_task(self._renew(lease))
        try:
            await self._sweep(workspace, since, lease, report)
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])  # else it might take what is given back
            with suppress(StoreError):  # then it runs out by itself
                await claims.drop_lease(self._database, lease, self._holder)
        return report

    async def _sweep(
        self, workspace: Workspace, since: timedelta | None, lease: str, report: SweepReport
    ) -> None:
        """Sweep, and keep the ledger; the row is there before the second page is asked for."""
        started_at = self._clock()
        row = _LedgerRow(started_at)
        report.error = "it was interrupted"
        try:
            await self._sweep_kind(workspace, "technique", since, lease, row, report)
            # It has shown what a round of polling would have read the same pages for.
            self._gathering.count(workspace.slot, report.pages, began=started_at, over=True)
            async with self._generations_due(workspace) as due:
                if due:
                    await self._sweep_kind(workspace, "generation", since, lease, row, report)
            report.error = None
        except (FloraError, StoreError) as failure:
            report.error = str(failure)
        except Exception as failure:
            report.error = f"a fault of the tracker's own: {type(failure).__name__}: {failure}"
            raise
        finally:
            await self._close(workspace, row, report)

    async def _sweep_kind(
        self,
        workspace: Workspace,
        kind: Kind,
        since: timedelta | None,
        lease: str,
        row: "_LedgerRow",
        report: SweepReport,
    ) -> None:
        client = workspace.require_client()
        horizon: _Horizon | None = None
        newest: datetime | None = None
        async with aclosing(history.pages(client, kind)) as pages:
            async for page in pages:
                items = taken_over(workspace, page.items)  # the ledger goes by the id they name
                report.workspace_id = workspace.name
                if row.id is None:
                    row.id = await sweeps.begin(self._database, workspace.name, row.started_at)
                if horizon is None:
                    horizon = await self._horizon(workspace, kind, since, row.started_at)
                await self._take_page(items, page.unreadable, report)
                newest = _latest(newest, history.newest(items))
                if not await self._hold(lease):
                    raise StoreError("it took so long that another process has begun one")
                if _reaches(items, horizon.until):
                    break
        if horizon is not None and horizon.joins_the_last:
            # A run that says it begins in the future must not hide those that begin until then.
            newest = None if newest is None else min(newest, horizon.now + AHEAD)
            row.through[kind] = _latest(newest, horizon.last_through)

    @asynccontextmanager
    async def _generations_due(self, workspace: Workspace) -> AsyncIterator[bool]:
        """Whether to sweep the list of generation runs too: always, once one was shown.

        Until then it is looked at once a day, by whichever process comes first.
        """
        if await read.has_generations(self._database, self._workspaces.claimable(workspace)):
            yield True
            return
        name = f"generations:{workspace.slot}"
        looker = f"{self._holder}:{uuid4()}"  # nobody else's, this process's next sweep included
        take = partial(claims.take_lease, self._database, name, looker)
        due = await take(self._clock(), LEASE)
        yield due
        if due:  # it went well: nobody need look again before tomorrow
            await take(self._clock(), GENERATIONS_EVERY)

    async def _horizon(
        self, workspace: Workspace, kind: Kind, since: timedelta | None, started_at: datetime
    ) -> "_Horizon":
        """How far back to read, in FLORA's time, and whether that joins what was swept before."""
        now_at_flora = started_at + (workspace.require_client().clock_offset or timedelta())
        last = await sweeps.last_through(self._database, workspace.name, kind)
        if last is not None and last > now_at_flora + AHEAD:
            last = None  # a clock was wrong then: what it says cannot be relied on
        if last is None:
            due = now_at_flora - self._first_since
        else:
            known_for = await sweeps.newest_known_for(
                self._database, workspace.name, kind, self._workspaces.claimable(workspace)
            )
            all_listed = known_for is not None and known_for >= OVERLAP
            due = last if all_listed else last - OVERLAP
            unfinished = await sweeps.oldest_unfinished_since(
                self._database,
                self._workspaces.claimable(workspace),
                due - NEWLY_UNFINISHED,
            )
            due = min(due, unfinished) if unfinished else due
        until = due if since is None else now_at_flora - since
        return _Horizon(
            now=now_at_flora, until=until, last_through=last, joins_the_last=until <= due
        )

    async def _take_page(
        self, items: Sequence[Observation], unreadable: Sequence[str], report: SweepReport
    ) -> None:
        kept = await without_removed(self._database, items)
        await self._durations.learn(item.technique_id for item in kept)
        for passed in await self._door.put_all([Seen(observation=item) for item in kept]):
            report.count(passed)
        report.pages += 1
        report.items += len(items)
        report.unreadable += len(unreadable)
        for reason in unreadable:
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

    async def _close(self, workspace: Workspace, row: "_LedgerRow", report: SweepReport) -> None:
        """Write the end of the sweep into the ledger, if the database still answers."""
        try:
            if row.id is None:
                row.id = await sweeps.begin(self._database, workspace.name, row.started_at)
            await sweeps.finish(
                self._database,
                row.id,
                at=self._clock(),
                pages=report.pages,
                items=report.items,
                discovered=report.discovered,
                repaired=report.repaired,
                unreadable=report.unreadable,
                through=row.through.get("technique"),
                generations_through=row.through.get("generation"),
                error=report.error,
            )
        except StoreError as failure:
            report.error = report.error or str(failure)
            log.error("sweep.ledger_failed", workspace_id=workspace.name, error=str(failure))


@dataclass(slots=True)
class _LedgerRow:
    """The sweep's own row, as far as it is known."""

    started_at: datetime
    id: int | None = None
    through: dict[Kind, datetime | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Horizon:
    """How far back a sweep reads, and what time it is at FLORA.

    `joins_the_last` is false where somebody asked for less than is due: such a sweep leaves a gap,
    so the next one must not start from it.
    """

    now: datetime
    until: datetime
    last_through: datetime | None
    joins_the_last: bool


def _latest(*moments: datetime | None) -> datetime | None:
    return max((moment for moment in moments if moment), default=None)


def _reaches(items: Sequence[Observation], until: datetime) -> bool:
    """Whether a page has gone past the horizon.

    Its last few items must all be older: one item with a senseless time ends no sweep.
    """
    tail = [item.created_at for item in items if item.created_at][-TAIL:]
    return bool(tail) and max(tail) < until
