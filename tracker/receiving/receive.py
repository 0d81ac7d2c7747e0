"""A callback is verified and stored in the inbox, and only then acknowledged.

A sender waits for storing alone: one statement for a group, which reads no run and merges nothing.
`apply.py` applies what is stored.
"""

import asyncio
import re
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, replace
from datetime import datetime
from typing import Final, NamedTuple

from tracker.core.clock import Clock
from tracker.core.errors import SettingsError
from tracker.core.record import TEST_DELIVERY, Delivery, DeliveryOutcome
from tracker.core.run import fast_dataclass, known
from tracker.flora.callback import SignatureError, delivery_of, digest_id, verify
from tracker.store.engine import Database
from tracker.store.queries.deliveries import Receipt, store_deliveries
from tracker.store.writing.group_commit import GroupCommit
from tracker.workspaces import Workspaces

Positions = list[tuple[int, Delivery]]

_TOKEN: Final = re.compile(r"[\w-]{1,64}", re.ASCII)
"""A start's token; an address that ends in anything else counts as the bare one."""


@fast_dataclass
class Received:
    """A callback that is on disk.

    `delivery_id` differs from the callback's own id if another body is stored under that. `outcome`
    is that of the stored delivery: `waiting`, unless it was received before, which is `repeated`.
    `workspace` signed it with its secret number `secret`, counted from 1. `is_test` marks a test
    delivery of `tracker doctor`.
    """

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome | str
    repeated: bool
    workspace: str
    secret: int
    is_test: bool = False


class SignedDelivery(NamedTuple):
    """A delivery to store; `workspace` and `secret` are those of `Received`."""

    delivery: Delivery
    workspace: str
    secret: int


Receiving = tuple[Delivery, asyncio.Future[Received]]
"""A callback that is queued for its commit, and its result."""


@dataclass(eq=False)
class Inbox(GroupCommit[SignedDelivery, Received]):
    """Stores deliveries in groups: `enqueue` a delivery and await its future.

    `on_stored` is called after each commit with the number of deliveries that wait for one, those
    just stored among them.
    """

    name = "inbox"
    database: Database
    _: KW_ONLY
    on_stored: Callable[[int], None] = lambda _: None

    def _size(self, item: SignedDelivery) -> int:
        return len(item.delivery.body)

    async def _commit(self, items: list[SignedDelivery]) -> list[Received]:
        stored: dict[int, Received] = {}
        left: Positions = [(position, one.delivery) for position, one in enumerate(items)]
        while left:
            receipts, left = _by_id(left)
            rows = [receipts[key] for key in sorted(receipts)]
            before = await store_deliveries(self.database, rows)
            for key, receipt in receipts.items():
                outcome: DeliveryOutcome | str = DeliveryOutcome.WAITING
                if repeated := key in before:
                    if (stored_as := before[key]) is None:
                        renamed = _renamed(receipt.delivery)
                        left += [(position, renamed) for position in receipt.positions]
                        continue
                    outcome = known(DeliveryOutcome, stored_as)
                for position in receipt.positions:
                    delivery, workspace, secret = items[position]
                    stored[position] = Received(
                        delivery_id=key,
                        run_id=delivery.run_id,
                        outcome=outcome,
                        repeated=repeated,
                        workspace=workspace,
                        secret=secret,
                        is_test=delivery.event_type == TEST_DELIVERY,
                    )
                    repeated = True
        self.on_stored(self.waiting)
        return [stored[position] for position in range(len(items))]


def _by_id(deliveries: Iterable[tuple[int, Delivery]]) -> tuple[dict[str, Receipt], Positions]:
    """One receipt for each id, because no statement changes a row twice; and the deliveries with
    another body under the same id."""
    receipts: dict[str, Receipt] = {}
    others: Positions = []
    for position, one in deliveries:
        receipt = receipts.get(one.delivery_id)
        if receipt is None:
            receipts[one.delivery_id] = Receipt(one, one.received_at, [position])
        elif receipt.delivery.body == one.body:
            receipt.positions.append(position)
            receipt.last_received_at = max(receipt.last_received_at, one.received_at)
        else:
            others.append((position, one))
    return receipts, others


def _renamed(delivery: Delivery) -> Delivery:
    """The delivery under an id made from its body: it was signed, though its id is taken."""
    key = digest_id(delivery.body)
    if delivery.delivery_id.startswith(key):  # another body bears that as its own id
        key = f"{delivery.delivery_id}+"
    return replace(delivery, delivery_id=key)


class NoSecrets(SettingsError):
    """No signing secret is configured, so no callback can be verified."""


@dataclass(kw_only=True, eq=False)
class Receiver:
    """Receives callbacks. `tolerance` is how many seconds a signed time may be off; 0 is unchecked.

    `find_new_secrets` is called when no secret fits; it returns whether there are new ones.
    """

    inbox: Inbox
    workspaces: Workspaces
    tolerance: float
    clock: Clock
    find_new_secrets: Callable[[], bool] = lambda: False

    def receive(
        self,
        body: bytes,
        *,
        signature: str | bytes | None,
        webhook_id: str | None,
        token: str | None = None,
    ) -> Receiving:
        """Verify one callback and queue it for its commit. It is applied to its run later.

        The result raises `StoreUnavailable` if it was not committed in time, and `StoreError` if
        the database refuses it.

        `body` is the raw bytes, `signature` and `webhook_id` are the `Flora-Signature` and
        `Flora-Webhook-Id` headers, `token` is what follows the callback address, if anything.
        Raises `SignatureError` and `NoSecrets`, and `StoreUnavailable` if the queue is full; then
        nothing is stored.
        """
        now = self.clock()
        secret = self._verify(body, signature, now)
        signers = self.workspaces.signers[secret]
        delivery = delivery_of(
            body,
            at=now,
            webhook_id=webhook_id,
            signers=[workspace.workspace_id for workspace in signers],
            token=token if token and _TOKEN.fullmatch(token) else None,
        )
        signer = next(
            (one for one in signers if one.workspace_id == delivery.workspace_id), signers[0]
        )
        position = signer.secrets.index(secret) + 1  # before the commit: secrets are rotated
        return delivery, self.inbox.enqueue(SignedDelivery(delivery, signer.name, position))

    def _verify(self, body: bytes, signature: str | bytes | None, now: datetime) -> str:
        """The secret that signed the body; new secrets are looked up before it is refused."""
        secrets = [*self.workspaces.signers]
        if not secrets and self.find_new_secrets():
            secrets = [*self.workspaces.signers]
        if not secrets:
            raise NoSecrets(
                "no signing secret is set, so no callback can be verified: set FLORA_WEBHOOK_SECRET"
            )
        try:
            return secrets[verify(signature, body, secrets, now=now, tolerance=self.tolerance)]
        except SignatureError as error:
            if error.reason != "mismatch" or not self.find_new_secrets():
                raise
        secrets = [*self.workspaces.signers]
        return secrets[verify(signature, body, secrets, now=now, tolerance=self.tolerance)]
