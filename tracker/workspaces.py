"""The configured workspaces: one API key and its signing secrets each.

Where only one workspace is configured its id is optional: it is learnt from FLORA's first list, and
until then from the first authentic callback. Before a start, `Workspaces.id_of` makes sure of it by
the key.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from http import HTTPStatus
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import (
    FieldFault,
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    InvalidRequest,
    KeyRefused,
    OtherWorkspace,
    RateLimited,
    SettingsError,
    StoreError,
)
from tracker.core.log import get_logger
from tracker.core.observation import Observation
from tracker.core.run import RunStatus
from tracker.flora.client import FloraClient
from tracker.flora.http import LONGEST_WAIT
from tracker.flora.resilience import SharedWaits
from tracker.store.clock import SharedClock
from tracker.store.engine import Database
from tracker.store.queries import workspaces as stored

ASK_SECONDS: Final = 5.0
"""How long FLORA may take to name the workspace of a key."""
CLOCK_MARGIN: Final = 1.0
"""Seconds by which the clocks of processes that share waits may differ."""
_LATEST: Final = LONGEST_WAIT + CLOCK_MARGIN

DETAILS_WITHIN: Final = timedelta(minutes=1)
"""How long after the end of a run a list may still lack its details."""

UNKNOWN: Final = "unknown"
"""In metrics and logs, a workspace whose id is not known."""

log = get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Workspace:
    """One workspace.

    `place` is its place in the settings, which never changes; `is_top` marks the workspace of the
    top-level settings. `configured_id` is the id in the settings, `workspace_id` the one in use;
    `on_named` is called when that becomes known, or unknown with another key.
    """

    place: str
    workspace_id: str | None = None
    is_top: bool = True
    configured_id: str | None = field(init=False)
    client: FloraClient | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)
    lists_carry_details: bool = True
    """Whether completed items of history pages carry outputs and cost; updated by each page."""
    lists_carry_outputs: bool = True
    """Whether items that ended a while ago carry outputs or a cost; updated by each page."""
    lists_carry_costs: bool = True
    """Whether history pages carry costs; false once a single read showed one that a page lacked."""
    is_assumed: bool = False
    """Whether the id is that of a callback, until FLORA names the one of the API key."""
    on_named: Callable[["Workspace"], None] = lambda _: None

    def __post_init__(self) -> None:
        self.configured_id = self.workspace_id

    @property
    def name(self) -> str:
        """The id, or `UNKNOWN`."""
        return self.workspace_id or UNKNOWN

    def learn(self, workspace_id: str | None, *, is_assumed: bool = False) -> None:
        """Take over FLORA's id if none is known yet, or it is only assumed."""
        if workspace_id and (self.workspace_id is None or self.is_assumed > is_assumed):
            is_other = workspace_id != self.workspace_id
            self.workspace_id, self.is_assumed = workspace_id, is_assumed
            if is_other:
                self.on_named(self)

    def check_listed(self, listed: Iterable[str | None]) -> None:
        """Check the key against the workspace ids of a list that it has read.

        Raises `OtherWorkspace` if the list names workspaces, but not this one.
        """
        ids = [one for one in listed if one]
        if not ids:
            return
        self.learn(self.workspace_id if self.workspace_id in ids else ids[0])
        error = None
        if self.workspace_id not in ids:
            error = OtherWorkspace(
                f"the API key that is set for workspace {self.workspace_id} reads workspace "
                f"{ids[0]}: set the right key, or the right id"
            )
        if self.client is not None:
            self.client.contact.checked_workspace(error)
        if error is not None:
            raise error

    def attributed(self, seen: Observation) -> Observation:
        """An observation read with the workspace's key, as its own if it names no workspace."""
        if seen.workspace_id is not None or self.workspace_id is None:
            return seen
        return replace(seen, workspace_id=self.workspace_id)

    def attributed_page(self, items: Sequence[Observation]) -> list[Observation]:
        """The items of a page read with the workspace's key, attributed to it.

        The workspace learns its id, and whether its lists carry details. Raises `OtherWorkspace` if
        every item that names a workspace names another one.
        """
        self.check_listed(item.workspace_id for item in items)
        completed = with_details = old = with_outputs = 0
        for item in items:
            if item.status is RunStatus.COMPLETED:
                completed += 1
                with_details += bool(item.details)
                self.lists_carry_costs |= item.charged_cost is not None
                if item.completed_at and item.read_at - item.completed_at > DETAILS_WITHIN:
                    old += 1
                    with_outputs += bool(item.outputs) or item.charged_cost is not None
        if completed:
            self.lists_carry_details = 2 * with_details >= completed
        if old:
            self.lists_carry_outputs = 2 * with_outputs >= old
        return [self.attributed(item) for item in items]

    def require_client(self) -> FloraClient:
        """The client for its key. Raises `SettingsError` if no key is set."""
        if self.client is None:
            raise SettingsError(
                "no FLORA API key is set for this workspace: set FLORA_API_KEY (or api_key in the "
                "[[workspaces]] table of TRACKER_CONFIG)"
            )
        return self.client


class Workspaces:
    """All configured workspaces.

    Idempotency keys belong to a workspace id, which `id_of` finds by the API key and stores with
    the key's fingerprint. If they belonged to a place in the settings, moving a workspace would pay
    for its starts again, and another workspace's key in the same place would be given the runs of
    the first.
    """

    def __init__(
        self, workspaces: Sequence[Workspace], *, database: Database, clock: Clock
    ) -> None:
        self._all = tuple(workspaces)
        self.signers = self._signers()
        """The workspaces of each signing secret: one, unless several have the same."""
        self._database = database
        self._clock = clock
        self._ids: dict[tuple[str, str], str] = {}
        self._asking = asyncio.Lock()

    def __iter__(self) -> Iterator[Workspace]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def keyed(self) -> list[Workspace]:
        """Those with an API key."""
        return [one for one in self._all if one.client is not None]

    async def recall(self) -> None:
        """Take over the ids of API keys that any process has learnt. Raises `StoreUnavailable`."""
        for one in self.keyed:
            if one.workspace_id is None:
                fingerprint = one.require_client().key_fingerprint
                one.learn(await stored.workspace_of(self._database, fingerprint))

    def rotate(self, place: str, *, api_key: str | None, secrets: tuple[str, ...]) -> None:
        """Replace the key and the signing secrets of the workspace in that place."""
        workspace = next((one for one in self._all if one.place == place), None)
        if workspace is None:
            return
        workspace.secrets = secrets
        self.signers = self._signers()
        if (client := workspace.client) is not None and api_key is not None:
            before = client.key_fingerprint
            client.rotate_key(api_key)
            if client.key_fingerprint != before:  # which may be of another workspace
                workspace.workspace_id, workspace.is_assumed = workspace.configured_id, False
                workspace.on_named(workspace)

    def _signers(self) -> dict[str, list[Workspace]]:
        signers: dict[str, list[Workspace]] = {}
        for workspace in self._all:
            for secret in dict.fromkeys(workspace.secrets):
                signers.setdefault(secret, []).append(workspace)
        return signers

    async def pick(self, workspace_id: str | None) -> Workspace:
        """The workspace that a caller asks for, which may be left out if there is only one.

        Raises `InvalidRequest` if it is unknown, or left out and there are several. Where its id is
        not learnt yet, it is looked up by the API key, and `pick` raises as `id_of` does.
        """
        if workspace_id is None:
            if len(self._all) == 1:
                return self._all[0]
            known = ", ".join(workspace.name for workspace in self._all)
            raise _fault(f"several workspaces are configured, name one of them: {known}")
        if not self.has(workspace_id):
            for unnamed in [one for one in self.keyed if one.workspace_id is None]:
                await self.id_of(unnamed)
        found = self.of(workspace_id)
        if found is None:
            raise _fault(f"workspace {workspace_id} is not configured here")
        return found

    def of(self, workspace_id: str | None) -> Workspace | None:
        """The workspace of a run, by the `workspace_id` of its row; `None` if it is not configured.

        A single workspace without a known id matches any, and a run without an id any single one.
        """
        if len(self._all) == 1 and (workspace_id is None or self._all[0].workspace_id is None):
            return self._all[0]
        return next((one for one in self._all if one.workspace_id == workspace_id), None)

    def reader_of(self, workspace_id: str | None) -> Workspace | None:
        """The workspace whose key reads a run, by the `workspace_id` of its row; `None` if there is
        none. A run without an id is read with any key (`RunReader.read` tries the others)."""
        if workspace_id is not None or len(self._all) == 1:
            return self.of(workspace_id)
        return min(self.keyed, key=lambda one: one.require_client().breaker.blocked, default=None)

    def has(self, workspace_id: str | None) -> bool:
        """Whether a workspace of exactly that id is configured."""
        return any(one.workspace_id == workspace_id for one in self._all)

    def ids_of_runs(self, workspace: Workspace) -> list[str | None] | None:
        """The `workspace_id`s of this workspace's runs; `None` for all."""
        return [workspace.workspace_id] if len(self._all) > 1 else self.claimable(workspace)

    def claimable(self, workspace: Workspace) -> list[str | None] | None:
        """The `workspace_id`s of the runs to read with this workspace's key; `None` for all.

        Runs without an id, from the time before it was known, are read with any key.
        """
        if len(self._all) == 1 and workspace.workspace_id is None:
            return None
        return [workspace.workspace_id, None]

    async def with_id(self, workspace_id: str) -> Workspace | None:
        """The workspace whose API key is that workspace's; `None` if there is none.

        Raises as `id_of` does, if there is none among those whose key says whose it is.
        """
        failure: Exception | None = None
        for one in sorted(self.keyed, key=lambda one: workspace_id != one.workspace_id):
            try:
                if await self.id_of(one) == workspace_id:
                    return one
            except (FloraError, SettingsError) as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return None

    async def id_of(
        self,
        workspace: Workspace,
        *,
        wanted: str | None = None,
        deadline: float | None = None,
    ) -> str:
        """The id of the workspace that its key belongs to. `deadline` is in seconds.

        Raises `SettingsError` if there is no key, if the caller (`wanted`) or the settings name
        another workspace, or if FLORA does not say and FLORA_WORKSPACE_ID is not set; the
        `FloraError` of a FLORA that cannot be asked now, if nothing else gives the id; and
        `StoreUnavailable`.
        """
        client = workspace.require_client()
        fingerprint = client.key_fingerprint
        workspace_id = self._ids.get((workspace.place, fingerprint))
        if workspace_id is None:
            workspace_id = await self._find_id(workspace, client, deadline)
            if client.key_fingerprint != fingerprint:
                return await self.id_of(workspace, wanted=wanted, deadline=deadline)
            self._ids[workspace.place, fingerprint] = workspace_id
        workspace.learn(workspace_id)
        workspace.workspace_id = workspace_id  # that of a new key may be another
        if wanted not in (None, workspace_id):
            raise _other_key(wanted, [workspace_id])
        return workspace_id

    async def _find_id(
        self, workspace: Workspace, client: FloraClient, deadline: float | None
    ) -> str:
        fingerprint = client.key_fingerprint
        seconds = ASK_SECONDS if deadline is None else min(deadline, ASK_SECONDS)
        async with asking_in_turn(self._asking, deadline):
            if (found := self._ids.get((workspace.place, fingerprint))) is not None:
                return found
            workspace_id = await stored.workspace_of(self._database, fingerprint)
            if workspace_id is None:
                workspace_id = await self._learn(workspace, client, fingerprint, seconds)
            configured = workspace.configured_id
            if configured is not None and configured != workspace_id:
                # A key that sees several may have been used for another of them before.
                try:
                    sees = await client.sees(configured, deadline=seconds)
                except FloraError as error:
                    if not _has_no_such_list(error):
                        raise
                    sees = False
                if not sees:
                    raise _other_key(configured, [workspace_id])
                workspace_id = configured
            if workspace.is_top:
                await stored.give_ids(self._database, workspace_id)
        return workspace_id

    async def _learn(
        self, workspace: Workspace, client: FloraClient, fingerprint: str, deadline: float
    ) -> str:
        """Ask FLORA and store its answer; without one, the id in the settings."""
        found = await _ask_flora(client, workspace.configured_id, deadline)
        if found is not None and client.key_fingerprint != fingerprint:
            return found  # not stored: it may be that of the key which has replaced this one
        if found is None:
            if workspace.configured_id is None:
                raise SettingsError(
                    "FLORA does not say which workspace the API key belongs to, so nothing is "
                    "started: set FLORA_WORKSPACE_ID"
                )
            return workspace.configured_id  # not stored: FLORA may say next time
        before = await stored.last_workspace_at(self._database, workspace.place)
        if before not in (None, found):
            log.warning("workspace.changed", workspace_id=found, before=before)
        await stored.keep_id(
            self._database, fingerprint, found, place=workspace.place, at=self._clock()
        )
        return found


@asynccontextmanager
async def asking_in_turn(lock: asyncio.Lock, seconds: float | None) -> AsyncIterator[float | None]:
    """Hold a lock under which FLORA is asked for what others want to know, too; yields how many of
    the seconds are left.

    Raises `FloraUnreachable` if none are: those before it got no answer.
    """
    loop = asyncio.get_running_loop()
    until = None if seconds is None else loop.time() + seconds
    try:
        async with asyncio.timeout_at(until):
            await lock.acquire()
    except TimeoutError:
        raise FloraUnreachable(
            "FLORA was not asked, because too many others wait for its answer",
            may_have_acted=False,
            timed_out=True,
        ) from None
    try:
        yield None if until is None else max(until - loop.time(), 0.0)
    finally:
        lock.release()


@dataclass(kw_only=True, eq=False)
class Service:
    """Base of the parts of `tracker.services` that need the database and the workspaces. `process`
    names this process in leases."""

    database: Database
    workspaces: Workspaces
    clock: SharedClock
    process: str


def _other_key(configured: str, ids: Sequence[str]) -> SettingsError:
    log.error("workspace.other_key", configured=configured, workspace_id=", ".join(ids))
    return SettingsError(
        f"the API key that is set for workspace {configured} is of workspace {', '.join(ids)}: set "
        "the right key, or the right id"
    )


def _fault(message: str) -> InvalidRequest:
    return InvalidRequest(message, [FieldFault("workspace_id", message)])


async def _ask_flora(client: FloraClient, configured: str | None, deadline: float) -> str | None:
    """The id that FLORA gives for the key; `None` if it gives none, or several.

    Raises `SettingsError` if the settings name none of several, and the `FloraError` of a FLORA
    that cannot be asked now.
    """
    try:
        listed = await client.list_workspaces(deadline=deadline)
    except FloraError as error:
        log.info("workspace.not_reported", error=str(error))
        if configured is None and not _has_no_such_list(error):
            raise
        listed = []
    if configured in listed:
        return configured
    if len(listed) > 1 and configured is not None:
        raise _other_key(configured, listed)
    if listed:
        return listed[0] if len(listed) == 1 else None
    try:
        page = await client.history(limit=100, deadline=deadline)  # its items name it as well
    except FloraError as error:
        if configured is None or not _has_no_such_list(error):
            raise
        return None
    named = [item.workspace_id for item in page.items if item.workspace_id]
    return configured if configured in named else next(iter(named), None)


def _has_no_such_list(error: FloraError) -> bool:
    """Whether a list was refused for good, as one that FLORA, or a gateway, does not have."""
    if isinstance(error, FloraRefusal) and error.status == HTTPStatus.NOT_FOUND:
        return True
    return not (error.silent or isinstance(error, KeyRefused | RateLimited))


@dataclass(eq=False)
class DatabaseWaits(SharedWaits):
    """Shares the waits that FLORA asks for between all processes that use one key.

    Every request checks for a wait before it is sent: a row read by its key, which costs little
    beside the request, and works for one-shot commands too. If the database does not answer in
    time, each process knows its own waits only. `process` names who stored one. Nothing is raised.
    """

    database: Database
    place: str
    _: KW_ONLY
    process: str
    clock: Clock

    async def left(self) -> float:
        """Seconds that the latest wait still lasts, or 0."""
        until = None
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(self.database.url.times.waits):
                until = await stored.waits_until(self.database, self.place)
        if until is None:
            return 0.0
        left = (until - self.clock()).total_seconds()
        # A wait beyond the longest was stored by another clock, before the machine was started.
        return left if 0 < left <= _LATEST else 0.0

    async def share(self, seconds: float) -> None:
        """Store a wait of `seconds` from now on."""
        now = self.clock()
        until, latest = (now + timedelta(seconds=one) for one in (seconds, _LATEST))
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(self.database.url.times.waits):
                await stored.keep_wait(
                    self.database, self.place, until, process=self.process, latest=latest
                )
