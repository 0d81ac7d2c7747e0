"""Reading FLORA's whole catalogue, so that it can be searched here and what has gone is known.

A sync walks the list of every workspace that has a key, once. It is complete only where each list
was read to its end and every item could be read; and only a complete one says that a technique has
gone, because what was not looked at has not disappeared.
"""

from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import uuid4

from tracker.core.clock import Clock
from tracker.core.errors import FloraError, StoreError
from tracker.flora import paging
from tracker.store import claims, techniques
from tracker.store.engine import Database
from tracker.tracking.catalogue import row_of
from tracker.tracking.workspaces import Workspace, Workspaces

EVERY: Final = timedelta(hours=6)
"""How often the catalogue is read."""
LEASE: Final = timedelta(minutes=10)
"""How long a sync holds the catalogue, renewed with each page."""
PAGE_SIZE: Final = 100

_RUNNING: Final = "catalogue"
_SCHEDULED: Final = "catalogue:scheduled"


@dataclass(slots=True, kw_only=True)
class ListReport:
    """How the walk through one workspace's list went; `error` is `None` where it was complete."""

    workspace_id: str
    pages: int = 0
    techniques: int = 0
    error: str | None = None


@dataclass(slots=True, kw_only=True)
class SyncReport:
    """What a sync found.

    `new` techniques were not known, `back` ones had been gone, `gone` ones are in no list any more.
    `skipped` is true where another process is at it.
    """

    lists: list[ListReport] = field(default_factory=list)
    new: int = 0
    back: int = 0
    gone: int = 0
    skipped: bool = False

    @property
    def complete(self) -> bool:
        """Whether every list was read whole."""
        return not self.skipped and all(one.error is None for one in self.lists)


class CatalogueSync:
    """Syncs the catalogue. `process` names this process."""

    def __init__(
        self, *, database: Database, workspaces: Workspaces, process: str, clock: Clock
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._process = process
        self._clock = clock

    async def sync(self) -> SyncReport:
        """Read the lists of all workspaces with a key.

        FLORA's and the database's failures in reading a list are reported, not raised. Raises
        `StoreUnavailable` where the database cannot be used at all.
        """
        report = SyncReport()
        holder = f"{self._process}:{uuid4()}"
        if not await self._hold(holder):
            report.skipped = True
            return report
        try:
            began = self._clock()
            for workspace in self._workspaces:
                if workspace.client is not None:
                    await self._walk(workspace, began, holder, report)
            # Lists that are all empty are a fault at FLORA sooner than an empty catalogue.
            if report.complete and any(one.techniques for one in report.lists):
                report.gone = await techniques.mark_gone(
                    self._database, since=began, at=self._clock()
                )
        finally:
            with suppress(StoreError):  # then it runs out by itself
                await claims.drop_lease(self._database, _RUNNING, holder)
        return report

    async def sync_if_due(self) -> SyncReport | None:
        """Sync where no process has, completely, for `EVERY`; `None` where it is not due.

        One that fails is due again after `LEASE`. Raises as `sync`.
        """
        holder = f"{self._process}:{uuid4()}"  # nobody else's, this process's next one included
        if not await self._schedule(holder, LEASE):
            return None
        report = await self.sync()
        if report.complete:
            await self._schedule(holder, EVERY)
        return report

    async def _walk(
        self, workspace: Workspace, began: datetime, holder: str, report: SyncReport
    ) -> None:
        """Take one workspace's list, page by page."""
        walked = ListReport(workspace_id=workspace.name)
        report.lists.append(walked)
        client = workspace.require_client()
        unreadable: list[str] = []
        try:
            async with aclosing(
                paging.pages(lambda cursor: client.list_techniques(cursor=cursor, limit=PAGE_SIZE))
            ) as pages:
                async for page in pages:
                    rows = [row_of(found) for found in page.items]
                    listed = await techniques.add_listed(self._database, rows, began)
                    report.new += listed.new
                    report.back += listed.back
                    walked.pages += 1
                    walked.techniques += len(rows)
                    unreadable += page.unreadable
                    await self._hold(holder)
        except (FloraError, StoreError) as failure:
            walked.error = str(failure)
        if unreadable and walked.error is None:
            walked.error = f"{len(unreadable)} could not be read, the first being {unreadable[0]}"

    async def _hold(self, holder: str) -> bool:
        return await claims.take_lease(self._database, _RUNNING, holder, self._clock(), LEASE)

    async def _schedule(self, holder: str, until: timedelta) -> bool:
        """Keep other scheduled syncs away for so long; false where one has done so itself."""
        return await claims.take_lease(
            self._database, _SCHEDULED, holder, self._clock(), until, longest=EVERY
        )
