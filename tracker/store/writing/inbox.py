"""The inbox: callbacks are stored here when they come, and applied from here to their runs.

To store is all that a sender waits for: one statement for a group, which reads no run and merges
nothing. To apply takes deliveries that wait, merges what they say, and commits runs, timeline,
rollups, notices and the deliveries' own outcome together. So it may be broken off anywhere, be done
by several processes at once, and be done again, and has its effect once.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, NamedTuple, Protocol

from sqlalchemy import Connection

from tracker.core.clock import Clock
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, DeliveryOutcome, Seen
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow, StartState
from tracker.store.writing.group_commit import GroupCommit
from tracker.store.writing.writer import MergeRules, Statements, WriteBatch, WriteOutcome

NAME: Final = "inbox"


class Stored(NamedTuple):
    """What became of a delivery that is now on disk.

    `delivery_id` is under which id: one of its own, where the id that it came with has another body
    already. `repeated` says that it had come before, so that only its receipts changed.
    """

    delivery_id: str
    outcome: DeliveryOutcome
    repeated: bool


@dataclass(slots=True)
class Receipt:
    """One row of a group: a delivery, at which places of the group it stands, and until when the
    group received it."""

    delivery: Delivery
    last_received_at: datetime
    places: list[int]

    @property
    def count(self) -> int:
        """How often the group received it."""
        return len(self.places)


class Stores(Protocol):
    """The statement that stores a group."""

    async def __call__(self, db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
        """Store these deliveries, or count them where they are known, with one commit.

        They come sorted by id, each id once. Returns those that were not new, by id: the outcome of
        one that had come before, `None` for an id under which another body is stored.
        """


class Inbox(GroupCommit[Delivery, Stored]):
    """Stores deliveries in groups. Used as `async with Inbox(database, …) as inbox`.

    `digest_id` makes the id of a delivery whose own id another body has. `on_stored` is called
    after each commit, with how many deliveries waited at that moment, those that were just stored
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
        self._stores = _stores_of(db)
        self._digest_id = digest_id
        self._on_stored = on_stored

    async def store(self, delivery: Delivery) -> Stored:
        """Store a delivery; returns after the commit.

        Raises `StoreUnavailable` where it was not committed in time (it still may be).
        """
        return await self.enqueue(delivery)

    async def _store(self, group: list[Delivery]) -> list[Stored]:
        stored: dict[int, Stored] = {}
        left = dict(enumerate(group))
        while left:
            receipts = _together(left)
            known = await self._stores(self._db, [receipts[key] for key in sorted(receipts)])
            for key, receipt in receipts.items():
                outcome, repeated = DeliveryOutcome.WAITING, key in known
                if repeated:
                    if (before := known[key]) is None:
                        # The id is taken, and yet this was signed: it is stored under its own.
                        other = _renamed(receipt.delivery, self._digest_id)
                        left.update(dict.fromkeys(receipt.places, other))
                        continue
                    outcome = DeliveryOutcome(before)
                for place in receipt.places:
                    stored[place] = Stored(key, outcome, repeated)
                    repeated = True
                    del left[place]
        self._on_stored(self.waiting)
        return [stored[place] for place in range(len(group))]


def _together(left: dict[int, Delivery]) -> dict[str, Receipt]:
    """One row for each id: repeats are counted here, as no statement changes a row twice. What has
    another body under the same id is left for the next statement."""
    receipts: dict[str, Receipt] = {}
    for place, one in left.items():
        receipt = receipts.get(one.delivery_id)
        if receipt is None:
            receipts[one.delivery_id] = Receipt(one, one.received_at, [place])
        elif receipt.delivery.body == one.body:
            receipt.places.append(place)
            receipt.last_received_at = max(receipt.last_received_at, one.received_at)
    return receipts


def _renamed(delivery: Delivery, digest_id: Callable[[bytes], str]) -> Delivery:
    key = digest_id(delivery.body)
    if delivery.delivery_id.startswith(key):  # which someone else's body bears as its own id
        key = f"{delivery.delivery_id}+"
    return replace(delivery, delivery_id=key)


def _stores_of(db: Database) -> Stores:
    if db.dialect == "sqlite":
        from tracker.store.writing.statements_sqlite import store  # noqa: PLC0415

        return store
    from tracker.store.writing.statements_postgres import store as store_postgres  # noqa: PLC0415

    return store_postgres


NOTHING: Final = WriteOutcome([], due=False, changed_runs=[])


class Read(NamedTuple):
    """What a delivery says, as of now: an observation of a run, or why it is quarantined, or
    neither for a test delivery. `signers` are the workspaces that may have signed it; `None` where
    only one is configured."""

    observation: Observation | None
    reason: str | None = None
    signers: Collection[str | None] | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What applying a group did: how many deliveries it took, which were quarantined and why, and
    what it did to runs. `more` says that others may be waiting."""

    taken: int
    more: bool
    quarantined: list[tuple[str, str]]
    outcome: WriteOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Which deliveries to apply: at most `limit`, those that have waited longest, without those
    `held_up`. `read` says what each says."""

    limit: int
    read: Callable[[Delivery], Read]
    held_up: Sequence[str] = ()


def apply_waiting(
    connection: Connection,
    group: Group,
    taken: list[str],
    *,
    clock: Clock,
    rules: MergeRules,
    statements: Statements,
) -> Applied:
    """Apply deliveries that wait. Nothing is committed here.

    Their ids stand in `taken` as soon as they are known, for whoever has to find out which of them
    cannot be applied.
    """
    deliveries, found = statements.take_waiting(connection, group.limit, group.held_up)
    taken[:] = [delivery.delivery_id for delivery in deliveries]
    more = found == group.limit or len(taken) < found
    if not deliveries:
        return Applied(0, more, [], NOTHING)
    said = [group.read(delivery) for delivery in deliveries]
    own = _starts_of(connection, deliveries)
    run_ids = {one.observation.run_id for one in said if one.observation is not None}
    merging = WriteBatch(connection, run_ids, rules, statements)
    applied: list[str] = []
    quarantined: list[tuple[str, str]] = []
    for delivery, one in zip(deliveries, said, strict=True):
        reason = one.reason
        if one.observation is not None:
            reason, disputed = _not_theirs(one, merging)
            if disputed:  # to be read at once: FLORA shows whose it is
                told = Observation(
                    run_id=one.observation.run_id, source=Source.TRACK, at=delivery.received_at
                )
                merging.add(Seen(observation=told))
            if reason is None:
                start = own.get(delivery.callback_token or "")
                if start is not None and _names_its_run(one, start):
                    merging.add(_started(start, one.observation))
                merging.add(Seen(observation=one.observation))
        if reason is None:
            applied.append(delivery.delivery_id)
        else:
            quarantined.append((delivery.delivery_id, reason))
    outcome = merging.write()
    statements.finish(connection, applied, quarantined, clock())
    return Applied(len(taken), more, quarantined, outcome)


def _starts_of(connection: Connection, deliveries: Sequence[Delivery]) -> dict[str, StartRow]:
    """The starts to whose own addresses these came, by token."""
    tokens = {one.callback_token for one in deliveries if one.callback_token is not None}
    return starts.of_tokens(connection, sorted(tokens)) if tokens else {}


def _names_its_run(said: Read, start: StartRow) -> bool:
    """Whether the secret that signed a callback is of the start's workspace. One that is not is
    taken as if it had come to the bare address."""
    if said.observation is None or start.state is StartState.STORED:
        return False
    seen = said.observation.workspace_id
    if (
        said.signers is None
    ):  # the only workspace's secret, which a body without an id leaves as it is
        return seen in (None, start.workspace_slot)
    return start.workspace_slot in said.signers


def _started(start: StartRow, seen: Observation) -> Seen:
    """What a callback to a start's own address says of the start: which run it became."""
    return Seen(
        observation=Observation(
            run_id=seen.run_id,
            source=Source.START,
            at=seen.at,
            workspace_id=start.workspace_slot,
            technique_id=start.technique_id,
        ),
        inputs=start.inputs,
        tags=start.tags,
        reserved_at=start.reserved_at,
        reserved_cost=start.reserved_cost,
        callback_expected=True,
        slot=start.workspace_slot,
        idempotency_key=start.idempotency_key,
    )


def _not_theirs(said: Read, merging: WriteBatch) -> tuple[str | None, bool]:
    """Why the workspaces that signed it cannot speak of the run, `None` where they can; and whether
    the run is only claimed for the workspace that it is held to be of.

    Only the workspace that a run is of may say, with its secret, that it ended: whoever knows one
    workspace's secret could else write another's run into a callback, end that run and take it
    over. A run that nobody has heard of may be anybody's: who speaks of it first claims it, until
    FLORA shows whose it is. A callback that waits in quarantine for that is applied then.
    """
    seen, signers = said.observation, said.signers
    if seen is None or signers is None:
        return None, False
    record = merging.record(seen.run_id)
    owner = None if record is None else record.run.workspace_id
    if record is None or owner is None or owner in signers:
        return None, False
    signed_by = f"the secret of {seen.workspace_id} signed it"
    if record.run.workspace_is_claimed:
        return (
            f"its run was first claimed for workspace {owner}, but {signed_by}; it is applied when "
            "FLORA shows the run to the key of the latter"
        ), True
    return f"its run is of workspace {owner}, but {signed_by}", False
