"""The techniques' definitions: read from FLORA, kept in the database, and read again when old.

What a start is checked against costs no request as long as it was read within the hour, by whatever
process. An old one does still where FLORA cannot be asked: it is better than none, and FLORA checks
again.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4
from weakref import WeakValueDictionary

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import (
    FieldFault,
    FloraError,
    FloraRefusal,
    FloraUnreadable,
    InvalidRequest,
    NotFound,
    RateLimited,
    StoreError,
)
from tracker.core.inputs import check
from tracker.flora import paging
from tracker.flora.technique import Technique
from tracker.polling.workspaces import Workspace, Workspaces
from tracker.store import claims
from tracker.store.engine import Database
from tracker.store.queries import techniques
from tracker.store.queries.techniques import TechniqueRow

FRESH: Final = timedelta(hours=1)
"""How long a definition is used without asking FLORA again."""
PAUSE: Final = timedelta(minutes=1)
"""So long after asking in vain, or after a read, FLORA is not asked for the same once more."""
RENEWAL_SECONDS: Final = 5.0
"""How long FLORA may take to renew a definition that is known: an old one is not worth more."""

log = structlog.get_logger(__name__)

_Key = tuple[str, str]


class Catalogue:
    """Definitions of techniques, by id or slug."""

    def __init__(self, database: Database, *, workspaces: Workspaces, clock: Clock) -> None:
        self._database = database
        self._workspaces = workspaces
        self._clock = clock
        self._slugs: dict[_Key, str] = {}
        self._asked_in_vain: dict[_Key, datetime] = {}
        self._asking: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()

    async def definition(
        self, workspace: Workspace, technique: str, *, deadline: float | None = None
    ) -> Technique:
        """The definition of a technique that is to be started. `deadline` is in seconds.

        Raises `NotFound` where FLORA knows none, `InvalidRequest` for what can name none,
        `SettingsError` without a key, `StoreUnavailable`, and the rest of the `FloraError` tree
        where none is known.
        """
        return _definition(await self._renewed(workspace, technique, deadline))

    async def priced(
        self, workspace: Workspace, technique: str
    ) -> tuple[Technique, FloraError | None]:
        """The definition, with the price as it is now; or as it was, and why FLORA did not tell.

        Raises as `definition`.
        """
        key = (workspace.slot, technique)
        try:
            async with self._asking.setdefault(key, asyncio.Lock()):
                return _definition(await self._ask(workspace, technique, None)), None
        except FloraError as error:
            if not _tells_nothing(error):
                raise
            known = await self._known(workspace, technique)
            if known is None or not (known.defined_at or known.inputs):
                raise
            return _definition(known), error

    async def checked(
        self,
        workspace: Workspace,
        technique: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        deadline: float | None = None,
    ) -> Technique:
        """The definition of a technique to be started with these inputs, which fit it.

        Raises `InvalidRequest`, with every field that is wrong, where they do not, and else as
        `definition`.
        """
        definition = await self.definition(workspace, technique, deadline=deadline)
        faults = check(definition.ports, inputs)
        if faults:
            raise InvalidRequest(f"the inputs do not fit the technique {technique}", faults)
        return definition

    async def technique_id(self, workspace: Workspace, technique: str) -> str:
        """The `tech_…` form of an id or slug; FLORA is asked only for a slug that is new.

        Raises as `definition`.
        """
        if technique.startswith("tech_"):
            return technique
        known = await self._known(workspace, technique)
        return (known or await self._renewed(workspace, technique, None)).technique_id

    async def find(self, technique: str) -> TechniqueRow | None:
        """A technique to be shown, of whichever workspace; `None` where there is none.

        FLORA is asked where the definition is old or was never read. Raises the `FloraError` tree
        where nothing is known and FLORA does not tell, and `StoreUnavailable`.
        """
        if not could_name_one(technique):
            return None
        failure: FloraError | None = None
        known: TechniqueRow | None = None
        for workspace in self._workspaces:
            known = await self._known(workspace, technique) or known
            if workspace.client is None:
                continue
            try:
                return await self._renewed(workspace, technique, RENEWAL_SECONDS)
            except NotFound:
                continue
            except FloraError as error:
                failure = error
        if known is None and failure is not None:
            raise failure
        return known

    async def refused(self, technique_id: str, refusal: FloraRefusal) -> None:
        """Take to heart that FLORA refused a start.

        Where it refused inputs that fitted the definition, that is read again before the next
        start, unless it was read just now: then reading it tells nothing new.
        """
        if refusal.code == "input_validation_error":
            await techniques.doubt(self._database, technique_id, before=self._clock() - PAUSE)

    async def _renewed(
        self, workspace: Workspace, technique: str, deadline: float | None
    ) -> TechniqueRow:
        """The technique, asked for where what is known is not fresh; once for all who wait."""
        key = (workspace.slot, technique)
        lock = self._asking.setdefault(key, asyncio.Lock())
        async with lock:
            known = await self._known(workspace, technique)
            if known is None or not (known.defined_at or known.inputs):
                return await self._ask(workspace, technique, deadline)
            if self._will_do(known, key):
                return known
            try:
                return await self._ask(
                    workspace, technique, min(deadline or RENEWAL_SECONDS, RENEWAL_SECONDS)
                )
            except FloraError as error:
                if not _tells_nothing(error):
                    raise
                self._asked_in_vain[key] = self._clock()
                log.warning(
                    "catalogue.not_renewed", technique_id=known.technique_id, error=str(error)
                )
                return known

    async def _ask(
        self, workspace: Workspace, technique: str, deadline: float | None
    ) -> TechniqueRow:
        if not could_name_one(technique):
            message = "is no technique's id or slug"
            raise InvalidRequest(f"{technique!r} {message}", [FieldFault("technique", message)])
        found = await workspace.require_client().get_technique(technique, deadline=deadline)
        if technique != found.technique_id:
            self._slugs[workspace.slot, technique] = found.technique_id
        self._asked_in_vain.pop((workspace.slot, technique), None)
        row = row_of(found, slug=None if technique == found.technique_id else technique)
        return await techniques.define(self._database, row, self._clock())

    async def _known(self, workspace: Workspace, technique: str) -> TechniqueRow | None:
        """What the database has. Where there are several workspaces, one's slug need not be the
        other's: then only a slug that this process has asked for counts."""
        by_id = await techniques.get(
            self._database, self._slugs.get((workspace.slot, technique), technique)
        )
        if by_id is not None or len(self._workspaces) > 1:
            return by_id
        return await techniques.by_slug(self._database, technique)

    def _will_do(self, known: TechniqueRow, key: _Key) -> bool:
        """Whether FLORA need not, or not yet, be asked again."""
        now = self._clock()
        if known.defined_at is not None and abs(now - known.defined_at) < FRESH:
            return True
        in_vain = self._asked_in_vain.get(key)
        return in_vain is not None and abs(now - in_vain) < PAUSE


def _definition(row: TechniqueRow) -> Technique:
    return Technique(
        technique_id=row.technique_id,
        name=row.name,
        description=row.description,
        run_cost=row.run_cost,
        inputs=row.inputs,
        outputs=row.outputs,
    )


def could_name_one(technique: str) -> bool:
    """Whether a technique's id or slug could be this: it has to be one part of a path."""
    return 0 < len(technique) <= 255 and technique.isprintable() and "/" not in technique


def row_of(found: Technique, *, slug: str | None = None) -> TechniqueRow:
    """A technique of FLORA's as the database keeps it."""
    return TechniqueRow(
        technique_id=found.technique_id,
        slug=slug,
        name=found.name,
        description=found.description,
        run_cost=found.run_cost,
        inputs=found.inputs,
        outputs=found.outputs,
    )


def _tells_nothing(error: FloraError) -> bool:
    """Whether FLORA has told nothing about the technique."""
    return error.silent or isinstance(error, FloraUnreadable | RateLimited)


# Reading FLORA's whole catalogue, so that it can be searched here and what has gone is known.
#
# A sync walks the list of every workspace that has a key, once. It is complete only where each
# list was read to its end and every item could be read; and only a complete one says that a
# technique has gone, because what was not looked at has not disappeared.


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
