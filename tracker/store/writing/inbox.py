"""The inbox: callbacks are stored here when they arrive, and applied from here to their runs.

A sender waits for storing alone: one statement for a group, which reads no run and merges nothing.
Applying takes waiting deliveries, merges their observations, and commits runs, timeline, rollups,
notices and the outcomes of the deliveries together. So it may be interrupted anywhere and repeated,
several processes may do it at once, and each delivery takes effect once.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from tracker.core.clock import Clock
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, DeliveryOutcome, Seen
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow, StartState
from tracker.store.writing.group_commit import GroupCommit
from tracker.store.writing.statements import Receipt, Statements, statements_for
from tracker.store.writing.writer import MergeRules, WriteBatch, WriteOutcome

NAME: Final = "inbox"

Positions = list[tuple[int, Delivery]]


class Stored(NamedTuple):
    """A delivery that is on disk.

    `delivery_id` differs from the delivery's own id if another body is stored under that.
    `repeated` is true if it was stored before, so that only its receipts changed.
    """

    delivery_id: str
    outcome: DeliveryOutcome
    repeated: bool


class Inbox(GroupCommit[Delivery, Stored]):
    """Stores deliveries in groups: `enqueue` a delivery and await its future.

    `digest_id` makes the id of a delivery if another body is stored under its own id. `on_stored`
    is called after each commit with the number of deliveries that wait for one, those just stored
    among them. `options` are those of `GroupCommit`.
    """

    def __init__(
        self,
        db: Database,
        *,
        digest_id: Callable[[bytes], str],
        on_stored: Callable[[int], None] = lambda _: None,
        **options: Any,
    ) -> None:
        super().__init__(self._store, name=NAME, size=lambda one: len(one.body), **options)
        self._db = db
        self._statements = statements_for(db)
        self._digest_id = digest_id
        self._on_stored = on_stored

    async def _store(self, group: list[Delivery]) -> list[Stored]:
        stored: dict[int, Stored] = {}
        left: Positions = list(enumerate(group))
        while left:
            receipts, left = _by_id(left)
            rows = [receipts[key] for key in sorted(receipts)]
            before = await self._statements.store(self._db, rows)
            for key, receipt in receipts.items():
                outcome, repeated = DeliveryOutcome.WAITING, key in before
                if repeated:
                    if (known := before[key]) is None:
                        renamed = self._renamed(receipt.delivery)
                        left += [(position, renamed) for position in receipt.positions]
                        continue
                    outcome = DeliveryOutcome(known)
                for position in receipt.positions:
                    stored[position] = Stored(key, outcome, repeated)
                    repeated = True
        self._on_stored(self.waiting)
        return [stored[position] for position in range(len(group))]

    def _renamed(self, delivery: Delivery) -> Delivery:
        """The delivery under an id made from its body: it was signed, though its id is taken."""
        key = self._digest_id(delivery.body)
        if delivery.delivery_id.startswith(key):  # another body bears that as its own id
            key = f"{delivery.delivery_id}+"
        return replace(delivery, delivery_id=key)


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


class ParsedDelivery(NamedTuple):
    """What a delivery shows: an observation of a run, or why it is quarantined, or neither for a
    test delivery.

    `signers` are the workspaces that may have signed it; `None` if only one is configured.
    """

    observation: Observation | None
    reason: str | None = None
    signers: Collection[str | None] | None = None


NO_CHANGE: Final = WriteOutcome([], due=False, changed_runs=[])


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What applying a group did: how many deliveries it took, which were quarantined and why, and
    what changed in runs. `more` is true if others may be waiting."""

    taken: int
    more: bool
    quarantined: list[tuple[str, str]]
    outcome: WriteOutcome


def apply_waiting(
    connection: Connection,
    *,
    limit: int,
    held_up: Sequence[str] = (),
    parse: Callable[[Delivery], ParsedDelivery],
    taken: list[str],
    clock: Clock,
    rules: MergeRules,
    statements: Statements,
) -> ApplyResult:
    """Apply the oldest waiting deliveries, `limit` at most, without those `held_up`.

    Nothing is committed here. `taken` receives their ids before anything can fail, so that the
    caller can find the one that cannot be applied.
    """
    deliveries, found = statements.take_waiting(connection, limit, held_up)
    taken[:] = [delivery.delivery_id for delivery in deliveries]
    more = found == limit or len(taken) < found
    if not deliveries:
        return ApplyResult(0, more, [], NO_CHANGE)
    parsed = [parse(delivery) for delivery in deliveries]
    tokens = {one.callback_token for one in deliveries if one.callback_token is not None}
    starts_by_token = starts.of_tokens(connection, sorted(tokens)) if tokens else {}
    run_ids = {one.observation.run_id for one in parsed if one.observation is not None}
    batch = WriteBatch(connection, run_ids, rules, statements)
    applied: list[str] = []
    quarantined: list[tuple[str, str]] = []
    for delivery, one in zip(deliveries, parsed, strict=True):
        reason, seen = one.reason, one.observation
        if seen is not None:
            reason, is_disputed = _owner_conflict(one, seen, batch)
            if is_disputed:  # read the run at once: FLORA shows whose it is
                tracked = Observation(
                    run_id=seen.run_id, source=Source.TRACK, at=delivery.received_at
                )
                batch.add(Seen(observation=tracked))
            if reason is None:
                start = starts_by_token.get(delivery.callback_token or "")
                if start is not None and _is_signed_for(one, seen, start):
                    # Its callback came to the start's own address.
                    own = Observation(run_id=seen.run_id, source=Source.START, at=seen.at)
                    batch.add(start.became(own, callback_expected=True))
                batch.add(Seen(observation=seen))
        if reason is None:
            applied.append(delivery.delivery_id)
        else:
            quarantined.append((delivery.delivery_id, reason))
    outcome = batch.write()
    statements.finish(connection, applied, quarantined, clock())
    return ApplyResult(len(taken), more, quarantined, outcome)


def _is_signed_for(parsed: ParsedDelivery, seen: Observation, start: StartRow) -> bool:
    """Whether the secret of the start's workspace signed the callback; if not, its address is
    ignored."""
    if start.state is StartState.STORED:
        return False
    if parsed.signers is None:  # the only workspace; a body need not name it
        return seen.workspace_id in (None, start.workspace_slot)
    return start.workspace_slot in parsed.signers


def _owner_conflict(
    parsed: ParsedDelivery, seen: Observation, batch: WriteBatch
) -> tuple[str | None, bool]:
    """Why the signers may not report on the run (`None` if they may), and whether its owner is
    only claimed.

    Only the workspace of a run may report its end: otherwise a secret of one workspace would be
    enough to end runs of another and to take them over. The first callback about an unknown run
    claims it for its signer, until FLORA shows the owner. Callbacks that are quarantined for that
    are applied then.
    """
    record = batch.record(seen.run_id)
    owner = None if record is None else record.run.workspace_id
    if parsed.signers is None or record is None or owner is None or owner in parsed.signers:
        return None, False
    signed_by = f"the secret of {seen.workspace_id} signed it"
    if record.run.workspace_is_claimed:
        return (
            f"its run was first claimed for workspace {owner}, but {signed_by}; it is applied when "
            f"FLORA shows the run to the key of {seen.workspace_id}"
        ), True
    return f"its run is of workspace {owner}, but {signed_by}", False
