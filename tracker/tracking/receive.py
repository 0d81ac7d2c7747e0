"""A callback arrives: authenticate, understand, commit, and only then say that it was taken."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from structlog.contextvars import bind_contextvars

from tracker.core.clock import Clock
from tracker.core.entry import TRIAL, Delivery, DeliveryOutcome
from tracker.core.errors import SettingsError
from tracker.flora.signature import SignatureError
from tracker.sources import callback
from tracker.store import read
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.tracking.belonging import not_theirs
from tracker.tracking.workspaces import Workspaces


class NoSecrets(SettingsError):
    """No signing secret is configured, so no callback can be believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What became of a callback that is now on disk.

    `workspace` and `secret` tell who signed it: the secret's position, from 1, among those of the
    workspace. `trial` is true for one that `tracker doctor` sent.
    """

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome
    repeated: bool
    workspace: str
    secret: int
    trial: bool = False
    reason: str | None = None


class Receiver:
    """Takes callbacks. `tolerance` is how many seconds a signed time may be off; 0 is unchecked.

    `find_new_secrets` is called where no secret fits, and tells whether the workspaces have others
    by now.
    """

    def __init__(
        self,
        *,
        database: Database,
        door: Door,
        workspaces: Workspaces,
        tolerance: float,
        clock: Clock,
        find_new_secrets: Callable[[], bool] = lambda: False,
    ) -> None:
        self._database = database
        self._door = door
        self._workspaces = workspaces
        self._find_new_secrets = find_new_secrets
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
        if not self._workspaces.secrets:
            raise NoSecrets(
                "no signing secret is set, so no callback can be believed: set FLORA_WEBHOOK_SECRET"
            )
        now = self._clock()
        secret = self._authenticate(body, signature, now)
        signers = self._workspaces.signed_by(secret)
        for workspace in signers:
            delivered = callback.read(
                body, at=now, webhook_id=webhook_id, workspace_id=workspace.workspace_id
            )
            if delivered.observation is not None:
                break  # of several with one secret, it is the one that the callback speaks of
        position = workspace.secrets.index(secret) + 1  # while it is there: secrets are rotated
        if delivered.observation is not None and len(self._workspaces) > 1:
            theirs = {one.workspace_id for one in signers}
            reason = await not_theirs(self._database, delivered.observation, theirs)
            delivered = callback.quarantined(delivered, reason) if reason else delivered
        delivery = delivered.delivery
        bind_contextvars(delivery_id=delivery.delivery_id, run_id=delivery.run_id)
        passed = await self._door.put(delivered)
        if passed.repeated and await self._is_another(delivery):
            # The id is taken, and yet this was signed: what is answered 2xx is kept as it came.
            delivered = callback.by_digest(delivered)
            delivery = delivered.delivery
            bind_contextvars(delivery_id=delivery.delivery_id)
            passed = await self._door.put(delivered)
        if delivered.observation is not None:
            workspace.learn(delivered.observation.workspace_id)
        return Received(
            delivery_id=delivery.delivery_id,
            run_id=delivery.run_id,
            outcome=delivery.outcome,
            repeated=passed.repeated,
            workspace=workspace.name,
            secret=position,
            trial=delivery.event_type == TRIAL,
            reason=delivery.reason,
        )

    def _authenticate(self, body: bytes, signature: str | None, now: datetime) -> str:
        """The secret that signed it. A rotation that has just begun must refuse nothing."""
        authenticate = partial(
            callback.authenticate, body, signature, now=now, tolerance=self._tolerance
        )
        try:
            return authenticate(self._workspaces.secrets)
        except SignatureError as error:
            if error.reason != "mismatch" or not self._find_new_secrets():
                raise
        return authenticate(self._workspaces.secrets)

    async def _is_another(self, delivery: Delivery) -> bool:
        """Whether what is kept under its id, as far as it is, came with another body."""
        kept = await read.get_delivery(self._database, delivery.delivery_id)
        return kept is not None and bool(kept.body) and kept.body != delivery.body
