"""The configured workspaces: one key and its secrets each.

A workspace's id may be left out where there is only one: it is learnt from FLORA's first answer or
from the first authentic callback. Before a start it is made sure by its key: `tracker.tracking.
identity`.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import (
    FieldFault,
    FloraError,
    InvalidRequest,
    OtherWorkspace,
    RateLimited,
    SettingsError,
    StoreError,
)
from tracker.flora.caller import LONGEST_WAIT
from tracker.flora.client import FloraClient
from tracker.store.engine import Database
from tracker.store.queries import workspaces as stored


@dataclass(slots=True, kw_only=True)
class Workspace:
    """One workspace.

    `slot` is its place in the settings; it never changes. `is_top` marks the one of the top-level
    names. `configured_id` is the id that the settings give it, `workspace_id` the one it goes by.
    """

    slot: str
    workspace_id: str | None = None
    is_top: bool = True
    configured_id: str | None = field(init=False)
    client: FloraClient | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)
    lists_carry_details: bool = True
    """Whether completed items of its history pages carry outputs and cost; learnt from each
    page."""
    lists_carry_outputs: bool = True
    """Whether those that ended a while ago carry either of the two; learnt in the same way."""
    lists_carry_costs: bool = True
    """Whether a cost that a single read shows stands in the list too; false once one did not."""

    def __post_init__(self) -> None:
        self.configured_id = self.workspace_id

    @property
    def name(self) -> str:
        """Its id where that is known, else its slot."""
        return self.workspace_id or self.slot

    def learn(self, workspace_id: str | None) -> None:
        """Take over the id that FLORA gave, where none is known yet."""
        if self.workspace_id is None and workspace_id:
            self.workspace_id = workspace_id

    def reads(self, shown: Iterable[str | None]) -> None:
        """Its key has read a list that shows these workspace ids. Raises `OtherWorkspace` where its
        own is not among them."""
        ids = [one for one in shown if one]
        if not ids:
            return
        self.learn(ids[0])
        other = None
        if self.workspace_id not in ids:
            other = OtherWorkspace(
                f"the API key that is set for workspace {self.workspace_id} reads workspace "
                f"{ids[0]}: set the right key, or the right id"
            )
        if self.client is not None:
            self.client.contact.reads(other)
        if other is not None:
            raise other

    def belongs_to(self, workspace_id: str) -> None:
        """Go by the id that FLORA gave for the key, unless the settings give one."""
        if self.configured_id is None:
            self.workspace_id = workspace_id

    def require_client(self) -> FloraClient:
        """The client for its key. Raises `SettingsError` where no key is set."""
        if self.client is None:
            raise SettingsError(
                "no FLORA API key is set for this workspace: set FLORA_API_KEY (or api_key in the "
                "[[workspaces]] table of TRACKER_CONFIG)"
            )
        return self.client


class Workspaces:
    """All configured workspaces."""

    def __init__(self, workspaces: Sequence[Workspace]) -> None:
        self._all = tuple(workspaces)
        self._secrets = self._all_secrets()

    def __iter__(self) -> Iterator[Workspace]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def secrets(self) -> list[str]:
        """Every signing secret, of all workspaces."""
        return self._secrets

    def rotate(self, slot: str, *, api_key: str | None, secrets: tuple[str, ...]) -> None:
        """Let the workspace in that slot go on with another key and other signing secrets."""
        workspace = self.at(slot)
        if workspace is None:
            return
        workspace.secrets = secrets
        self._secrets = self._all_secrets()
        if workspace.client is not None and api_key is not None:
            workspace.client.rotate_key(api_key)

    def _all_secrets(self) -> list[str]:
        return [secret for workspace in self._all for secret in workspace.secrets]

    def signed_by(self, secret: str) -> list[Workspace]:
        """The workspaces that a secret belongs to: one, unless several were given the same."""
        return [workspace for workspace in self._all if secret in workspace.secrets]

    def pick(self, workspace_id: str | None) -> Workspace:
        """The workspace a caller means. Raises `InvalidRequest` where it is unknown or not
        named."""
        if workspace_id is None:
            if len(self._all) == 1:
                return self._all[0]
            known = ", ".join(workspace.name for workspace in self._all)
            raise _fault(f"several workspaces are configured, name one of them: {known}")
        found = self.of(workspace_id)
        if found is None:
            raise _fault(f"workspace {workspace_id} is not configured here")
        return found

    def of(self, workspace_id: str | None) -> Workspace | None:
        """The workspace of a run, by the id that its row has; `None` where it is not configured.

        A single workspace whose id is not known yet may be any, and a run without an id may be its.
        """
        if len(self._all) == 1 and (workspace_id is None or self._all[0].workspace_id is None):
            return self._all[0]
        return next((one for one in self._all if one.workspace_id == workspace_id), None)

    def has(self, workspace_id: str | None) -> bool:
        """Whether a workspace of that very id is configured."""
        return any(one.workspace_id == workspace_id for one in self._all)

    def at(self, slot: str) -> Workspace | None:
        """The workspace in that slot; `None` where it is not configured any more."""
        return next((one for one in self._all if one.slot == slot), None)

    def claimable(self, workspace: Workspace) -> list[str | None] | None:
        """Which `workspace_id` a due run may have to be read with this workspace's key."""
        if len(self._all) > 1:
            return [workspace.workspace_id]
        return None if workspace.workspace_id is None else [workspace.workspace_id, None]


def _fault(message: str) -> InvalidRequest:
    return InvalidRequest(message, [FieldFault("workspace_id", message)])


# Which workspace an API key is of: known before anything is started with it.
#
# Keys of starts belong to a workspace. Were they kept under the place where its API key stands in
# the settings, a workspace that moves would be paid again, and another one's key in the same
# place would be given the first one's runs.


ASK_SECONDS: Final = 5.0
"""How long FLORA may take to tell whose key it is."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    """What was made of a key; `client` and `fingerprint` tell whether it is still the same one."""

    client: FloraClient
    fingerprint: str
    workspace_id: str


class WorkspaceIds:
    """Tells the id of a workspace by its key. One that was learnt is kept with the key's
    fingerprint, so that a restart knows it."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._asking = asyncio.Lock()

    async def of(self, workspace: Workspace, *, deadline: float = ASK_SECONDS) -> str:
        """The id of the workspace that its key is of. `deadline` is in seconds.

        Raises `SettingsError` where there is no key, where the settings name another workspace, and
        where FLORA does not tell and FLORA_WORKSPACE_ID is not set; the `FloraError` of a FLORA
        that cannot be asked now, where nothing else tells; and `StoreUnavailable`.
        """
        client = workspace.require_client()
        fingerprint = client.key_fingerprint
        known = self._known.get(workspace.slot)
        if known is not None and (known.client, known.fingerprint) == (client, fingerprint):
            return known.workspace_id
        async with self._asking:
            workspace_id = await stored.workspace_of(self._database, fingerprint)
            if workspace_id is None:
                workspace_id = await self._learn(
                    workspace, client, fingerprint, min(deadline, ASK_SECONDS)
                )
            self._check(workspace, workspace_id)
            workspace.belongs_to(workspace_id)
            if workspace.is_top:
                await stored.give_ids(self._database, workspace_id)
            self._known[workspace.slot] = _Known(client, fingerprint, workspace_id)
        return workspace_id

    async def _learn(
        self, workspace: Workspace, client: FloraClient, fingerprint: str, deadline: float
    ) -> str:
        """Ask FLORA, and keep what it tells. What the settings say does where it does not."""
        told = await _asked(client, workspace.configured_id, deadline)
        if told is None:
            if workspace.configured_id is None:
                raise SettingsError(
                    "FLORA does not tell which workspace the API key is of, so nothing is started: "
                    "set FLORA_WORKSPACE_ID"
                )
            return workspace.configured_id  # not kept: FLORA may tell next time
        before = await stored.last_at(self._database, workspace.slot)
        if before not in (None, told):
            log.warning("workspace.changed", workspace_id=told, before=before)
        await stored.keep_id(
            self._database, fingerprint, told, place=workspace.slot, at=self._clock()
        )
        return told

    def _check(self, workspace: Workspace, workspace_id: str) -> None:
        configured = workspace.configured_id
        if configured not in (None, workspace_id):
            log.error("workspace.other_key", configured=configured, workspace_id=workspace_id)
            raise SettingsError(
                f"the API key that is set for workspace {configured} is of workspace "
                f"{workspace_id}: set the right key, or the right id"
            )


async def _asked(client: FloraClient, configured: str | None, deadline: float) -> str | None:
    """What FLORA says; `None` where it does not, or names several."""
    try:
        seen = await client.list_workspaces(deadline=deadline)
    except FloraError as error:
        log.info("workspace.not_told", error=str(error))
        if configured is not None:
            return None
        if error.silent or isinstance(error, RateLimited):
            raise
        seen = []
    if configured in seen:
        return configured
    if len(seen) == 1:
        return seen[0]
    if seen or configured is not None:
        return None
    # Any answer that names it will do: the list of runs does, where there is one.
    page = await client.history(limit=1, deadline=deadline)
    return next((item.workspace_id for item in page.items if item.workspace_id), None)


# What the processes on one database tell each other of the waits that FLORA asks for.
#
# Every request looks here before it leaves. That costs a row read by its key, where a request
# costs a round trip through the internet, and needs no process to listen: a command that runs
# beside the server hears of a wait like another worker does.


WITHIN: Final = 1.0
"""Seconds that the database may take. Without its answer each process goes by what it was told
itself, and FLORA tells it soon enough."""


class DatabaseWaits:
    """The waits of the workspace in `slot`; `process` is who is told. Nothing is raised."""

    def __init__(self, database: Database, slot: str, *, process: str, clock: Clock) -> None:
        self._database = database
        self._slot = slot
        self._process = process
        self._clock = clock

    async def left(self) -> float:
        """How many seconds the last wait still lasts; 0 where it is over."""
        until = None
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(WITHIN):
                until = await stored.waits_until(self._database, self._slot)
        if until is None:
            return 0.0
        left = (until - self._clock()).total_seconds()
        # No wait is longer than the longest: one that seems so was kept under another clock.
        return left if 0 < left <= LONGEST_WAIT + WITHIN else 0.0

    async def tell(self, seconds: float) -> None:
        """Keep a wait of so many seconds from now on."""
        until = self._clock() + timedelta(seconds=seconds)
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(WITHIN):
                await stored.keep_wait(self._database, self._slot, until, told=self._process)
