"""The definitions of techniques: read from FLORA, stored, and read again when they are old.

Checking a start against a definition costs no request if any process has read it within the hour.
If FLORA cannot be read, an old one is used: FLORA checks again.

`CatalogueSync` reads the whole catalogue: the list of every workspace that has a key, once. Only a
complete sync, in which every list was read to its end and every item could be read, shows which
techniques are gone.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4
from weakref import WeakValueDictionary

from tracker.core.errors import (
    FieldFault,
    FloraError,
    FloraRefusal,
    FloraUnreadable,
    InvalidRequest,
    NotFound,
    RateLimited,
    SettingsError,
    StoreError,
)
from tracker.core.log import get_logger
from tracker.core.starts import TechniqueDefinition, check, typed
from tracker.flora.client import pages as pages_of
from tracker.flora.parse import ports
from tracker.store import coordination
from tracker.store.queries import techniques
from tracker.store.queries.techniques import TechniqueRow
from tracker.workspaces import Service, Workspace, asking_in_turn

FRESH: Final = timedelta(hours=1)
"""How long a definition is used without reading it again."""
PAUSE: Final = timedelta(minutes=1)
"""How long after a read, or a failed one, the same definition is not read again."""
EVERY: Final = timedelta(hours=6)
"""How often the catalogue is read."""
LEASE: Final = timedelta(minutes=10)
"""How long the lease of a sync lasts, renewed with each page."""
PAGE_SIZE: Final = 100

_RUNNING: Final = "catalogue"
_SCHEDULED: Final = "catalogue:scheduled"

log = get_logger(__name__)

_Key = tuple[str, str]


@dataclass(kw_only=True, eq=False)
class Catalogue(Service):
    """The definitions of techniques, by id or slug.

    FLORA may take `renewal_seconds` to renew a known definition.
    """

    renewal_seconds: float = 5.0

    def __post_init__(self) -> None:
        self._slugs: dict[_Key, str] = {}
        self._failed_at: dict[_Key, datetime] = {}
        self._asking: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()
        self._finding = asyncio.Lock()

    async def definition(
        self, workspace: Workspace, technique: str, *, deadline: float | None = None
    ) -> TechniqueRow:
        """The definition of a technique to start, read again if it is old; once for all concurrent
        callers. `deadline` is in seconds.

        Raises `NotFound` if FLORA has none, `InvalidRequest` for an invalid id or slug,
        `SettingsError` without a key, `StoreUnavailable`, and other `FloraError`s if no definition
        is known.
        """
        longest = min(deadline or self.renewal_seconds, self.renewal_seconds)
        return (await self.priced(workspace, technique, deadline=deadline, if_old=longest))[0]

    async def priced(
        self,
        workspace: Workspace,
        technique: str,
        *,
        deadline: float | None = None,
        if_old: float | None = None,
    ) -> tuple[TechniqueRow, FloraError | None]:
        """The definition with the current price, or the last known one and why it is not current.

        With `if_old`, a known one is only read again if it is old, in so many seconds. Raises like
        `definition`.
        """
        key = (workspace.place, technique)
        try:
            async with asking_in_turn(
                self._asking.setdefault(key, asyncio.Lock()), deadline
            ) as left:
                known = await self._defined(workspace, technique)
                if known is None:
                    return await self._ask(workspace, technique, left), None
                if if_old is not None and self._is_current(known, key):
                    return known, None
                return await self._ask(workspace, technique, if_old), None
        except FloraError as error:
            if not (error.silent or isinstance(error, FloraUnreadable | RateLimited)):
                raise  # it is about the technique
            if (known := await self._defined(workspace, technique)) is None:
                raise
            self._failed_at[key] = self.clock()
            log.warning("catalogue.not_renewed", technique_id=known.technique_id, error=str(error))
            return known, error

    async def checked(
        self,
        workspace: Workspace,
        technique: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        deadline: float | None = None,
    ) -> tuple[TechniqueDefinition, list[dict[str, Any]]]:
        """The definition of a technique to start with these inputs, and the inputs with their
        types, after checking them.

        Raises `InvalidRequest` with every wrong field, and else like `definition`.
        """
        definition = await self.definition(workspace, technique, deadline=deadline)
        known = ports(definition.inputs)
        inputs = typed(known, inputs)
        faults = check(known, inputs)
        if faults:
            raise InvalidRequest(f"the inputs do not fit the technique {technique}", faults)
        return definition, inputs

    async def technique_id(
        self, workspace: Workspace, technique: str, *, deadline: float | None = None
    ) -> str:
        """The `tech_…` form of an id or slug; FLORA is read only for a new slug.

        Raises like `definition`.
        """
        if technique.startswith("tech_"):
            return technique
        known = await self._known(workspace, technique)
        if known is None:
            known = await self.definition(workspace, technique, deadline=deadline)
        return known.technique_id

    async def find(self, technique: str) -> TechniqueRow | None:
        """A technique to show, of any workspace; `None` if there is none.

        FLORA is read if the definition is old or was never read; for one caller at a time, because
        starts and polls wait in the same queue for their requests, and whoever may read can ask for
        any name. Raises `FloraError` if nothing is known and FLORA cannot be read within
        `renewal_seconds`, and `StoreUnavailable`.
        """
        if not is_possible_name(technique):
            return None
        failure: FloraError | None = None
        known: TechniqueRow | None = None
        for workspace in self.workspaces:
            here = await self._known(workspace, technique)
            known = here or known
            if workspace.client is None:
                continue
            if here is not None and self._is_current(here, (workspace.place, technique)):
                return here
            try:
                async with asking_in_turn(self._finding, self.renewal_seconds) as left:
                    return await self.definition(workspace, technique, deadline=left)
            except NotFound:
                continue
            except FloraError as error:
                failure = error
        if known is None and failure is not None:
            raise failure
        return known

    async def last_known(self, technique: str) -> TechniqueRow | None:
        """The stored definition of a technique by id or slug, whichever workspace it was last read
        in: to show what was started, and not to start anything."""
        known = await techniques.get(self.database, technique)
        known = known or await techniques.by_slug(self.database, technique)
        return known if _is_defined(known) else None

    async def refused(self, technique_id: str, refusal: FloraRefusal) -> None:
        """FLORA refused a start.

        If it refused inputs that fit the definition, that is read again before the next start,
        unless it has just been read.
        """
        if refusal.code == "input_validation_error":
            await techniques.doubt(self.database, technique_id, before=self.clock() - PAUSE)

    async def _ask(
        self, workspace: Workspace, technique: str, deadline: float | None
    ) -> TechniqueRow:
        if not is_possible_name(technique):
            message = "is no technique's id or slug"
            raise InvalidRequest(f"{technique!r} {message}", [FieldFault("technique", message)])
        try:
            found = await workspace.require_client().get_technique(technique, deadline=deadline)
        except NotFound as error:  # FLORA's message does not repeat the name
            raise NotFound(
                status=error.status,
                code=error.code,
                message=f"there is no technique {technique!r}; `tracker techniques list` shows all",
                request_id=error.request_id,
            ) from error
        if technique != found.technique_id:
            self._slugs[workspace.place, technique] = found.technique_id
        self._failed_at.pop((workspace.place, technique), None)
        row = TechniqueRow.of(found, slug=None if technique == found.technique_id else technique)
        return await techniques.define(self.database, row, self.clock())

    async def _defined(self, workspace: Workspace, technique: str) -> TechniqueRow | None:
        """The stored technique, if its definition was ever read."""
        known = await self._known(workspace, technique)
        return known if _is_defined(known) else None

    async def _known(self, workspace: Workspace, technique: str) -> TechniqueRow | None:
        """The stored technique. With several workspaces a slug may differ between them: then only
        slugs count that this process has read in this one."""
        by_id = await techniques.get(
            self.database, self._slugs.get((workspace.place, technique), technique)
        )
        if by_id is not None or len(self.workspaces) > 1:
            return by_id
        return await techniques.by_slug(self.database, technique)

    def _is_current(self, known: TechniqueRow, key: _Key) -> bool:
        now = self.clock()
        if known.defined_at is not None and abs(now - known.defined_at) < FRESH:
            return True
        failed_at = self._failed_at.get(key)
        return failed_at is not None and abs(now - failed_at) < PAUSE


def _is_defined(known: TechniqueRow | None) -> bool:
    """Whether the definition of a technique was ever read."""
    return known is not None and (known.defined_at is not None or len(known.inputs) > 0)


def is_possible_name(technique: str) -> bool:
    """Whether this can be a technique's id or slug: one segment of a path."""
    return 0 < len(technique) <= 255 and technique.isprintable() and "/" not in technique


@dataclass(slots=True, kw_only=True)
class ListReport:
    """The read of one workspace's list; `error` is `None` if it was complete."""

    workspace_id: str
    pages: int = 0
    techniques: int = 0
    error: str | None = None


@dataclass(slots=True, kw_only=True)
class SyncReport:
    """The result of a sync.

    `new` techniques were unknown, `back` ones had been gone, `gone` ones are in no list any more.
    `skipped` is true if another process is syncing.
    """

    lists: list[ListReport] = field(default_factory=list)
    new: int = 0
    back: int = 0
    gone: int = 0
    skipped: bool = False

    @property
    def complete(self) -> bool:
        """Whether every list was read completely."""
        return not self.skipped and all(one.error is None for one in self.lists)


@dataclass(kw_only=True, eq=False)
class CatalogueSync(Service):
    """Syncs the catalogue."""

    lease: timedelta = LEASE

    async def sync(self) -> SyncReport:
        """Read the lists of all workspaces with a key.

        Failures while reading a list are reported, not raised. Raises `StoreUnavailable` if the
        database cannot be used at all.
        """
        report = SyncReport()
        holder = f"{self.process}:{uuid4()}"
        if not await self._hold(holder):
            report.skipped = True
            return report
        try:
            began = self.clock()
            for workspace in self.workspaces.keyed:
                await self._walk(workspace, began, holder, report)
            # If all lists are empty, a fault at FLORA is more likely than an empty catalogue.
            if report.complete and any(one.techniques for one in report.lists):
                report.gone = await techniques.mark_gone(
                    self.database, since=began, at=self.clock()
                )
        finally:
            with suppress(StoreError):  # the lease then expires
                await coordination.drop_lease(self.database, _RUNNING, holder)
        return report

    async def sync_if_due(self) -> SyncReport | None:
        """Sync if no process has done so completely for `EVERY`; `None` if it is not due.

        A failed sync is due again after `lease`. Raises like `sync`.
        """
        holder = f"{self.process}:{uuid4()}"  # this process's next sync does not have it either
        if not await self._schedule(holder, self.lease):
            return None
        report = await self.sync()
        if report.complete:
            await self._schedule(holder, EVERY)
        return report

    async def _walk(
        self, workspace: Workspace, began: datetime, holder: str, report: SyncReport
    ) -> None:
        walked = ListReport(workspace_id=workspace.name)
        report.lists.append(walked)
        client = workspace.require_client()
        unreadable: list[str] = []
        try:
            async with aclosing(
                pages_of(lambda cursor: client.list_techniques(cursor=cursor, limit=PAGE_SIZE))
            ) as pages:
                async for page in pages:
                    rows = [TechniqueRow.of(found) for found in page.items]
                    listed = await techniques.add_listed(self.database, rows, began)
                    report.new += listed.new
                    report.back += listed.back
                    walked.pages += 1
                    walked.techniques += len(rows)
                    unreadable += page.unreadable.values()
                    await self._hold(holder)
        except (FloraError, StoreError) as failure:
            walked.error = str(failure)
        else:
            with suppress(FloraError, SettingsError, StoreError):  # the list was read all the same
                walked.workspace_id = await self.workspaces.id_of(workspace)
        if unreadable and walked.error is None:
            walked.error = f"{len(unreadable)} could not be read, the first being {unreadable[0]}"

    async def _hold(self, holder: str) -> bool:
        return await coordination.take_lease(
            self.database, _RUNNING, holder, self.clock(), self.lease
        )

    async def _schedule(self, holder: str, until: timedelta) -> bool:
        """Prevent other scheduled syncs for so long; false if another process already does."""
        return await coordination.take_lease(
            self.database, _SCHEDULED, holder, self.clock(), until, longest=EVERY
        )
