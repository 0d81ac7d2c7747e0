"""A callback is verified and stored in the inbox, and only then acknowledged.

A sender waits for storing alone: one statement for a group, which reads no run and merges nothing.
`apply.py` applies what is stored.
"""

import asyncio
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, NamedTuple

from tracker.core.clock import Clock
from tracker.core.errors import SettingsError
from tracker.core.log import add_log_context
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


class Stored(NamedTuple):
    """A delivery that is on disk.

    `delivery_id` differs from the delivery's own id if another body is stored under that.
    `repeated` is true if it was stored before, so that only its receipts changed.
    """

    delivery_id: str
    outcome: DeliveryOutcome | str
    repeated: bool


class Inbox(GroupCommit[Delivery, Stored]):
    """Stores deliveries in groups: `enqueue` a delivery and await its future.

    `on_stored` is called after each commit with the number of deliveries that wait for one, those
    just stored among them. `options` are those of `GroupCommit`.
    """

    def __init__(
        self,
        db: Database,
        *,
        on_stored: Callable[[int], None] = lambda _: None,
        **options: Any,
    ) -> None:
        super().__init__(self._store, name="inbox", size=lambda one: len(one.body), **options)
        self._db = db
        self._on_stored = on_stored

    async def _store(self, group: list[Delivery]) -> list[Stored]:
        stored: dict[int, Stored] = {}
        left: Positions = list(enumerate(group))
        while left:
            receipts, left = _by_id(left)
            rows = [receipts[key] for key in sorted(receipts)]
            before = await store_deliveries(self._db, rows)
            for key, receipt in receipts.items():
                outcome: DeliveryOutcome | str = DeliveryOutcome.WAITING
                if repeated := key in before:
                    if (stored_as := before[key]) is None:
                        renamed = _renamed(receipt.delivery)
                        left += [(position, renamed) for position in receipt.positions]
                        continue
                    outcome = known(DeliveryOutcome, stored_as)
                for position in receipt.positions:
                    stored[position] = Stored(key, outcome, repeated)
                    repeated = True
        self._on_stored(self.waiting)
        return [stored[position] for position in range(len(group))]


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


@fast_dataclass
class Received:
    """A callback that is on disk.

    `outcome` is that of the stored delivery: `waiting`, unless it was received before. `workspace`
    signed it with its secret number `secret`, counted from 1. `is_test` marks a test delivery of
    `tracker doctor`.
    """

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome | str
    repeated: bool
    workspace: str
    secret: int
    is_test: bool = False


@dataclass(slots=True)
class Receiving:
    """An authentic callback that is queued for its commit; awaiting it waits for that.

    Raises `StoreUnavailable` if it was not committed in time, and `StoreError` if the database
    refuses it. `workspace` and `secret` are those of `Received`.
    """

    delivery: Delivery
    workspace: str
    secret: int
    stored: asyncio.Future[Stored]

    def __await__(self) -> Generator[object, None, Received]:
        try:
            yield from self.stored.__await__()
        except BaseException:
            delivery = self.delivery
            add_log_context(delivery_id=delivery.delivery_id, run_id=delivery.run_id)
            raise
        return self.received()

    def received(self) -> Received:
        """The callback, once it is committed."""
        stored = self.stored.result()
        return Received(
            delivery_id=stored.delivery_id,
            run_id=self.delivery.run_id,
            outcome=stored.outcome,
            repeated=stored.repeated,
            workspace=self.workspace,
            secret=self.secret,
            is_test=self.delivery.event_type == TEST_DELIVERY,
        )


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
        return Receiving(delivery, signer.name, position, self.inbox.enqueue(delivery))

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
