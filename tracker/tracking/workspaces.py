"""The configured workspaces: one key and its secrets each.

A workspace's id may be left out where there is only one: it is learnt from FLORA's first answer or
from the first authentic callback. Before a start it is made sure by its key: `tracker.tracking.
identity`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tracker.core.errors import FieldFault, InvalidRequest, OtherWorkspace, SettingsError
from tracker.flora.client import FloraClient


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
