"""A callback arrives: authenticate, understand, commit, and only then say that it was taken."""

from dataclasses import dataclass

from structlog.contextvars import bind_contextvars

from tracker.core.clock import Clock
from tracker.core.entry import DeliveryOutcome
from tracker.core.errors import SettingsError
from tracker.sources import callback
from tracker.store.door import Door
from tracker.tracking.workspaces import Workspaces


class NoSecrets(SettingsError):
    """No signing secret is configured, so no callback can be believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What became of a callback that is now on disk.

    `workspace` and `secret` tell who signed it: the secret's position, from 1, among those of the
    workspace.
    """

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome
    repeated: bool
    workspace: str
    secret: int
    reason: str | None = None


class Receiver:
    """Takes callbacks. `tolerance` is how many seconds a signed time may be off; 0 is unchecked."""

    def __init__(
        self, *, door: Door, workspaces: Workspaces, tolerance: float, clock: Clock
    ) -> None:
        self._door = door
        self._workspaces = workspaces
        self._secrets = workspaces.secrets
        self._tolerance = tolerance
        self._clock = clock

    async def receive(
        self, body: bytes, *, signature: str | None, webhook_id: str | None
    ) -> Received:
        """Store one callback and its effect on its run; returns after both are committed.

        `body` is the raw bytes, `signature` and `webhook_id` the `Flora-Signature` and
        `Flora-Webhook-Id` headers. Raises `SignatureError` (nothing is stored), `NoSecrets`, and
        `StoreUnavailable` where it could not be committed in time.
        """
        if not self._secrets:
            raise NoSecrets(
                "no signing secret is set, so no callback can be believed: set FLORA_WEBHOOK_SECRET"
            )
        now = self._clock()
        secret = callback.authenticate(
            body, signature, self._secrets, now=now, tolerance=self._tolerance
        )
        for workspace in self._workspaces.signed_by(secret):
            delivered = callback.read(
                body, at=now, webhook_id=webhook_id, workspace_id=workspace.workspace_id
            )
            if delivered.observation is not None:
                break  # of several with one secret, it is the one that the callback speaks of
        delivery = delivered.delivery
        bind_contextvars(delivery_id=delivery.delivery_id, run_id=delivery.run_id)
        passed = await self._door.put(delivered)
        if delivered.observation is not None:
            workspace.learn(delivered.observation.workspace_id)
        return Received(
            delivery_id=delivery.delivery_id,
            run_id=delivery.run_id,
            outcome=delivery.outcome,
            repeated=passed.repeated,
            workspace=workspace.name,
            secret=workspace.secrets.index(secret) + 1,
            reason=delivery.reason,
        )
