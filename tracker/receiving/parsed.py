"""What a stored callback shows, and of which workspaces' runs its signers may report."""

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from tracker.core.observation import Observation
from tracker.core.record import TEST_DELIVERY, Delivery, Record
from tracker.flora import parse
from tracker.store.queries.starts import StartRow, StartState
from tracker.workspaces import Workspaces


class ParsedDelivery(NamedTuple):
    """What a delivery shows: an observation of a run, or why it is quarantined, or neither for a
    test delivery.

    `signers` are the workspaces that may have signed it; `None` if only one is configured.
    """

    observation: Observation | None
    reason: str | None = None
    signers: Collection[str | None] | None = None

    def is_signed_for(self, start: StartRow) -> bool:
        """Whether the secret of the start's workspace signed it; if not, its address is ignored."""
        if self.observation is None or start.state is StartState.STORED:
            return False
        if self.signers is None:  # the only workspace; a body need not name it
            return self.observation.workspace_id in (None, start.workspace_id)
        return start.workspace_id in self.signers

    def owner_conflict(self, record: Record | None) -> tuple[str | None, bool]:
        """Why the signers may not report on its run (`None` if they may), and whether the owner of
        the run is only claimed; `record` is what is known of the run.

        Only the workspace of a run may report its end: otherwise a secret of one workspace would be
        enough to end runs of another and to take them over. The first callback about an unknown run
        claims it for its signer, until FLORA shows the owner. Callbacks that are quarantined for
        that are applied then.
        """
        owner = None if record is None else record.run.workspace_id
        if self.signers is None or record is None or owner is None or owner in self.signers:
            return None, False
        signer = None if self.observation is None else self.observation.workspace_id
        signed_by = f"the secret of {signer} signed it"
        if record.run.workspace_is_claimed:
            return (
                f"its run was first claimed for workspace {owner}, but {signed_by}; it is applied "
                f"when FLORA shows the run to the key of {signer}"
            ), True
        return f"its run is of workspace {owner}, but {signed_by}", False


def parse_stored(workspaces: Workspaces, delivery: Delivery) -> ParsedDelivery:
    """The observation, or why the delivery is quarantined, by the settings that this process has.

    Never raises, whatever the body. If no workspace of the id that is stored as the signer is
    configured, that id was a mistake in the settings, or was not known when it was received.
    """
    if delivery.event_type == TEST_DELIVERY:
        return ParsedDelivery(None)
    seen = parse.callback(delivery.body, at=delivery.received_at)
    if isinstance(seen, str):
        return ParsedDelivery(None, seen)
    if (signer := delivery.workspace_id) and workspaces.has(signer):
        if seen.workspace_id and seen.workspace_id != signer:
            return ParsedDelivery(
                None,
                f"it names workspace {seen.workspace_id}, but the secret of {signer} signed it",
            )
        if not seen.workspace_id:
            seen = replace(seen, workspace_id=signer)
    workspace = workspaces.of(seen.workspace_id)
    if workspace is None and seen.workspace_id is not None:
        return ParsedDelivery(
            None, f"it names workspace {seen.workspace_id}, which is not configured here"
        )
    if len(workspaces) == 1:
        if workspace is not None:
            # The secret may be of another workspace than the key, as after a rotation.
            workspace.learn(seen.workspace_id, is_assumed=True)
        return ParsedDelivery(seen)
    # That workspace, and those that share a secret with it.
    secrets = set(workspace.secrets) if workspace is not None else set()
    sharing = {one.workspace_id for one in workspaces if not secrets.isdisjoint(one.secrets)}
    return ParsedDelivery(seen, signers=sharing | {seen.workspace_id})
