"""Which workspace an API key is of: known before anything is started with it.

Keys of starts belong to a workspace. Were they kept under the place where its API key stands in the
settings, a workspace that moves would be paid again, and another one's key in the same place would
be given the first one's runs.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import FloraError, RateLimited, SettingsError
from tracker.flora.client import FloraClient
from tracker.store import workspace_keys
from tracker.store.engine import Database
from tracker.tracking.workspaces import Workspace

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
            workspace_id = await workspace_keys.workspace_of(self._database, fingerprint)
            if workspace_id is None:
                workspace_id = await self._learn(
                    workspace, client, fingerprint, min(deadline, ASK_SECONDS)
                )
            self._check(workspace, workspace_id)
            workspace.belongs_to(workspace_id)
            if workspace.is_top:
                await workspace_keys.give_ids(self._database, workspace_id)
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
        before = await workspace_keys.last_at(self._database, workspace.slot)
        if before not in (None, told):
            log.warning("workspace.changed", workspace_id=told, before=before)
        await workspace_keys.keep(
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
