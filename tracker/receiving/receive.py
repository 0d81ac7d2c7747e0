"""A callback arrives: it is verified, stored, and only then acknowledged. Nothing else is done."""

from collections.abc import Callable
from datetime import datetime

from structlog.contextvars import bind_contextvars

from tracker.core.clock import Clock
from tracker.core.errors import SettingsError
from tracker.core.quick import quick_dataclass
from tracker.core.record import TEST_DELIVERY, DeliveryOutcome
from tracker.flora.signature import SignatureError
from tracker.polling.workspaces import Workspace, Workspaces
from tracker.receiving import callback
from tracker.store.writing.inbox import Inbox


class NoSecrets(SettingsError):
    """No signing secret is configured, so no callback can be believed."""


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What became of a callback that is now on disk.

    `outcome` is that of the stored delivery, which waits unless it had come before. `workspace` and
    `secret` tell who signed it: the secret's position, from 1, among those of the workspace.
    `is_test` is true for a test delivery of `tracker doctor`.
    """

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome
    repeated: bool
    workspace: str
    secret: int
    is_test: bool = False


class Receiver:
    """Takes callbacks. `tolerance` is how many seconds a signed time may be off; 0 is unchecked.

    `find_new_secrets` is called where no secret fits, and tells whether the workspaces have others
    by now.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        workspaces: Workspaces,
        tolerance: float,
        clock: Clock,
        find_new_secrets: Callable[[], bool] = lambda: False,
    ) -> None:
        self._inbox = inbox
        self._workspaces = workspaces
        self._tolerance = tolerance
        self._clock = clock
        self._find_new_secrets = find_new_secrets

    async def receive(
        self,
        body: bytes,
        *,
        signature: str | None,
        webhook_id: str | None,
        token: str | None = None,
    ) -> Received:
        """Store one callback; returns after the commit. Its effect on its run follows.

        `body` is the raw bytes, `signature` and `webhook_id` the `Flora-Signature` and
        `Flora-Webhook-Id` headers, `token` the last part of a start's own callback address. Raises
        `SignatureError` (nothing is stored), `NoSecrets`, and `StoreUnavailable` where it could not
        be committed in time.
        """
        if not self._workspaces.secrets and not self._find_new_secrets():
            raise NoSecrets(
                "no signing secret is set, so no callback can be believed: set FLORA_WEBHOOK_SECRET"
            )
        now = self._clock()
        secret = self._authenticate(body, signature, now)
        signers = self._workspaces.signed_by(secret)
        names = [workspace.workspace_id for workspace in signers]
        delivery = callback.delivery(
            body, at=now, webhook_id=webhook_id, signers=names, token=token
        )
        workspace = _signer(signers, delivery.workspace_id)
        position = workspace.secrets.index(secret) + 1  # while it is there: secrets are rotated
        try:
            stored = await self._inbox.store(delivery)
        except BaseException:
            bind_contextvars(delivery_id=delivery.delivery_id, run_id=delivery.run_id)
            raise
        return Received(
            delivery_id=stored.delivery_id,
            run_id=delivery.run_id,
            outcome=stored.outcome,
            repeated=stored.repeated,
            workspace=workspace.name,
            secret=position,
            is_test=delivery.event_type == TEST_DELIVERY,
        )

    def _authenticate(self, body: bytes, signature: str | None, now: datetime) -> str:
        """The secret that signed it. A rotation that has just begun must refuse nothing."""
        secrets, tolerance = self._workspaces.secrets, self._tolerance
        try:
            position = callback.authenticate(body, signature, secrets, now=now, tolerance=tolerance)
        except SignatureError as error:
            if error.reason != "mismatch" or not self._find_new_secrets():
                raise
            secrets = self._workspaces.secrets
            position = callback.authenticate(body, signature, secrets, now=now, tolerance=tolerance)
        return secrets[position]


def _signer(signers: list[Workspace], workspace_id: str | None) -> Workspace:
    """Of several workspaces with one secret, the one that the callback speaks of."""
    return next((one for one in signers if one.workspace_id == workspace_id), signers[0])
