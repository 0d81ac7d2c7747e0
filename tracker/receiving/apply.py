"""Stored callbacks are applied to their runs: promptly, in groups, by any process.

The process that stored a callback applies it within milliseconds. Every other process checks for
waiting deliveries when it starts and then every second, so that none is lost with a process.

Acknowledging has priority. While many callbacks wait to be stored, this process applies one group a
second and leaves the rest for later, or for another process.

One transaction takes waiting deliveries, merges their observations, and commits runs, timeline,
rollups, notices and the outcomes of the deliveries together. So it may be interrupted anywhere and
repeated, several processes may do it at once, and each delivery takes effect once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import Connection

from tracker.core.clock import Clock
from tracker.core.errors import StoreError, StoreUnavailable, TrackerError
from tracker.core.log import get_logger
from tracker.core.observation import Observation, Source
from tracker.core.record import TEST_DELIVERY, Delivery, DeliveryOutcome, Observed, Record
from tracker.core.waiting import cancel, repeat, wait_for
from tracker.flora.callback import delivery_of, observation_of
from tracker.store.coordination import INBOX, notify
from tracker.store.engine import Database
from tracker.store.errors import StoreBusy, StoreRefused
from tracker.store.queries import audit, deliveries, runs, starts
from tracker.store.queries.audit import Action
from tracker.store.queries.deliveries import DeliveryRow, finish, quarantine, take_waiting
from tracker.store.queries.starts import StartRow, StartState
from tracker.store.writing import retention
from tracker.store.writing.group_commit import OnWrite, call_hook, reported
from tracker.store.writing.retention import AROUND, ListedRun
from tracker.store.writing.writer import MergeRules, OnCommit, WriteBatch, WriteOutcome
from tracker.workspaces import Service, Workspaces

SAMPLE_SECONDS: Final = 0.01
"""How long arriving callbacks are counted between two groups."""
BUSY_FROM: Final = 20
"""The average number of callbacks waiting to be stored from which storing has priority. At a third
of the highest rate five to ten wait, measured on both databases; at the highest rate, as many as
there are connections."""
LONGEST_PAUSE: Final = 0.9
"""The longest wait between two groups, so that at least one a second is applied."""
NOTIFY_SECONDS: Final = 0.1
"""The shortest time between two notifications: each takes a lock that all commits share."""
SAMPLES: Final = 100
"""The last commits of the inbox that show whether it is busy."""

log = get_logger(__name__)

NO_CHANGE: Final = WriteOutcome([], due=False, changed_runs=[])


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
        if not record.run.workspace_is_confirmed:
            return (
                f"its run was first claimed for workspace {owner}, but {signed_by}; it is applied "
                f"when FLORA shows the run to the key of {signer}"
            ), True
        return f"its run is of workspace {owner}, but {signed_by}", False


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What applying a group did: how many deliveries it took, which were quarantined and why, and
    what changed in runs. `more` is true if others may be waiting."""

    taken: int
    more: bool
    quarantined: list[tuple[str, str]]
    outcome: WriteOutcome


@dataclass(eq=False)
class Applier:
    """Applies waiting deliveries. Used as `async with Applier(…) as applier`.

    With `background` true it checks every `check_seconds` for deliveries that another process left;
    else only after `wake` or in `drain`. A transaction takes `max_group` deliveries at most, and
    `busy_group` while storing has priority, so that no callback waits long for its answer. One
    whose run is locked elsewhere is left alone for `held_up_seconds`. `on_commit` is called after
    each commit with its effect on runs, `on_applied` with the numbers of applied and of quarantined
    deliveries, `on_write` after each attempt to commit.
    """

    database: Database
    _: KW_ONLY
    workspaces: Workspaces
    rules: MergeRules
    clock: Clock
    background: bool
    monotonic: Callable[[], float] = time.monotonic
    max_group: int = 500
    busy_group: int = 100
    check_seconds: float = 1.0
    held_up_seconds: float = 5.0
    on_commit: Sequence[OnCommit] = ()
    on_applied: Callable[[int, int], None] = lambda *_: None
    on_write: OnWrite = lambda *_: None

    def __post_init__(self) -> None:
        self._woken = asyncio.Event()
        self._queue_lengths: deque[int] = deque(maxlen=SAMPLES)
        """How many callbacks waited at each commit of the inbox, since the last pause."""
        self._notified_at = float("-inf")
        self._limit = self.max_group
        self._held_up: dict[str, float] = {}
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> Self:
        if self.background:
            self.wake()  # another process may have died before it could apply what it had stored
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop; deliveries that were stored just now are still applied. Raises
        `StoreUnavailable`; then another process applies them, or the next start."""
        self._closing = True
        task, self._task = self._task, None
        if task is None:
            return
        await cancel(task)
        if self._woken.is_set():
            await self.drain()

    def stored(self, queue_length: int) -> None:
        """Hook of the inbox: deliveries were stored, while so many waited for it."""
        self._queue_lengths.append(queue_length)
        self.wake()

    def committed(self, outcome: WriteOutcome) -> None:
        """Hook of the writer: quarantined deliveries may wait again."""
        if outcome.requeued:
            self.wake()

    def wake(self) -> None:
        """Check for waiting deliveries soon."""
        self._woken.set()
        if self._task is None and not self._closing:
            # In a context of its own: without the log fields of the request that came first.
            applying = repeat("applier", self._apply_next)
            self._task = asyncio.create_task(applying, name="applier", context=Context())

    async def drain(self) -> int:
        """Apply all waiting deliveries that no other process has locked; returns how many.

        Raises `StoreUnavailable`.
        """
        count, more = 0, True
        while more:
            taken, more = await self._apply_group()
            count += taken
        return count

    async def _apply_next(self) -> None:
        self._woken.clear()
        began = self.monotonic()
        try:
            taken, more = await self._apply_group(is_busy=self._is_busy())
        except BaseException:
            self._woken.set()
            raise
        if more:
            self._woken.set()
        if taken:
            await self._pause_while_busy(began + LONGEST_PAUSE)
        await wait_for(
            self._woken, self.check_seconds if self.background or self._held_up else None
        )
        self._woken.set()

    async def _pause_while_busy(self, until: float) -> None:
        """Return when few callbacks wait to be stored, or at that monotonic time."""
        while self._queue_lengths and (now := self.monotonic()) < until:
            self._queue_lengths.clear()
            await asyncio.sleep(SAMPLE_SECONDS)
            if not self._is_busy():
                return
            await self._notify(now)

    def _is_busy(self) -> bool:
        lengths = self._queue_lengths
        return bool(lengths) and sum(lengths) >= BUSY_FROM * len(lengths)

    async def _notify(self, now: float) -> None:
        """Tell other processes that deliveries wait which this one has no time to apply."""
        if now - self._notified_at < NOTIFY_SECONDS:
            return
        self._notified_at = now
        with suppress(StoreError):  # they check every second
            await notify(self.database, INBOX)

    async def _apply_group(self, *, is_busy: bool = False) -> tuple[int, bool]:
        """Apply one group; returns how many deliveries were applied or quarantined, and whether
        more may be waiting.

        If one of them cannot be applied, or all cannot in time, the next group is half as large,
        until one is alone.
        Raises `StoreError` where no delivery is to blame.
        """
        async with self._lock:
            now = self.monotonic()
            self._held_up = {key: until for key, until in self._held_up.items() if until > now}
            taken: list[str] = []
            try:
                limit = min(self._limit, self.busy_group) if is_busy else self._limit
                with reported(self.on_write, taken, self.monotonic):
                    work = partial(self.apply_waiting, limit, taken)
                    result = await self.database.write(work)
            except Exception as error:
                if taken:  # also where all together are too much for a slow database
                    self._limit = max(len(taken) // 2, 1)
                if not taken or not _is_caused_by_delivery(error):
                    raise
                if len(taken) > 1:
                    return 0, True
                if isinstance(error, StoreBusy):
                    self._held_up[taken[0]] = self.monotonic() + self.held_up_seconds
                    return 0, True
                result = await self._quarantine(taken[0], error)
            else:
                self._limit = min(self._limit * 2, self.max_group)
            if result.taken:
                self._report(result)
            return result.taken, result.more or result.outcome.requeued

    def apply_waiting(self, limit: int, taken: list[str], connection: Connection) -> ApplyResult:
        """Apply the oldest waiting deliveries, `limit` at most, without those held up.

        Nothing is committed here. `taken` receives their ids before anything can fail, so that the
        caller can find the one that cannot be applied.
        """
        waiting, found = take_waiting(connection, limit, [*self._held_up])
        taken[:] = [delivery.delivery_id for delivery in waiting]
        more = found == limit or len(taken) < found
        if not waiting:
            return ApplyResult(0, more, [], NO_CHANGE)
        parsed = [self.parse(delivery) for delivery in waiting]
        tokens = {one.callback_token for one in waiting if one.callback_token is not None}
        starts_by_token = starts.of_tokens(connection, sorted(tokens)) if tokens else {}
        run_ids = {one.observation.run_id for one in parsed if one.observation is not None}
        batch = WriteBatch(connection, run_ids, self.rules, self.database.origin)
        applied: list[str] = []
        quarantined: list[tuple[str, str]] = []
        for delivery, one in zip(waiting, parsed, strict=True):
            reason, seen = one.reason, one.observation
            if seen is not None:
                reason, is_disputed = one.owner_conflict(batch.record(seen.run_id))
                if is_disputed:  # read the run at once: FLORA shows whose it is
                    tracked = Observation(
                        run_id=seen.run_id, source=Source.TRACK, at=delivery.received_at
                    )
                    batch.add(Observed(observation=tracked))
                if reason is None:
                    start = starts_by_token.get(delivery.callback_token or "")
                    if start is not None and one.is_signed_for(start):
                        # Its callback came to the start's own address.
                        own = Observation(run_id=seen.run_id, source=Source.START, at=seen.at)
                        batch.add(start.became(own, callback_expected=True))
                    batch.add(Observed(observation=seen))
            if reason is None:
                applied.append(delivery.delivery_id)
            else:
                quarantined.append((delivery.delivery_id, reason))
        outcome = batch.write()
        finish(connection, applied, quarantined, self.clock())
        return ApplyResult(len(taken), more, quarantined, outcome)

    def parse(self, delivery: Delivery) -> ParsedDelivery:
        """The observation, or why the delivery is quarantined, by the settings of this process.

        Never raises, whatever the body. If no workspace of the id that is stored as the signer is
        configured, that id was a mistake in the settings, or was not known when it was received.
        """
        workspaces = self.workspaces
        if delivery.event_type == TEST_DELIVERY:
            return ParsedDelivery(None)
        seen = observation_of(delivery.body, at=delivery.received_at)
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

    async def _quarantine(self, delivery_id: str, error: Exception) -> ApplyResult:
        kind = "" if isinstance(error, StoreError) else f"{type(error).__name__}: "
        quarantined = [(delivery_id, f"it cannot be applied: {kind}{error}")]
        await self.database.write(partial(quarantine, reasons=quarantined))
        return ApplyResult(1, True, quarantined, NO_CHANGE)

    def _report(self, result: ApplyResult) -> None:
        for on_commit in self.on_commit:
            call_hook(on_commit, result.outcome)
        bad = len(result.quarantined)
        call_hook(self.on_applied, result.taken - bad, bad)
        reasons: dict[str, list[str]] = {}
        for delivery_id, reason in result.quarantined:
            reasons.setdefault(reason, []).append(delivery_id)
        for reason, ids in reasons.items():
            log.warning("callback.quarantined", reason=reason, delivery_id=ids[0], count=len(ids))


def _is_caused_by_delivery(error: Exception) -> bool:
    """Whether a delivery of the group causes the error: its run is locked elsewhere, the database
    refuses its values, or it brings out a fault of the tracker. An unavailable database is not."""
    return isinstance(error, StoreBusy | StoreRefused) or not isinstance(error, StoreError)


# Quarantined deliveries, which are applied again or acknowledged.

APPLIED_BEFORE: Final = "it had been applied before"
ACKNOWLEDGED_AT_ONCE: Final = 500
"""Deliveries that one transaction acknowledges."""
CHECKS: Final = 100
CHECK_SECONDS: Final = 0.05
"""How often it is checked whether another process has applied the delivery."""


class UnknownDelivery(TrackerError):
    """No callback of that id is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The result of a replay.

    `already` is true if the delivery had been applied before, so that nothing was done. `reason` is
    why, or why it is still quarantined.
    """

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome | str
    reason: str | None = None
    already: bool = False

    @classmethod
    def of(cls, row: DeliveryRow, reason: str | None, *, already: bool = False) -> Self:
        """The result that the delivery is in this state."""
        return cls(
            delivery_id=row.delivery_id,
            run_id=row.run_id,
            outcome=row.outcome,
            reason=reason,
            already=already,
        )


@dataclass(kw_only=True, eq=False)
class Replayer(Service):
    """Applies a quarantined callback again, after an upgrade or when a setting has been corrected,
    or acknowledges it: someone has seen it, and nothing is to be done.

    Its signature was verified on receipt and is not checked again (its time would be too old). The
    delivery waits once more, and is applied or quarantined like every other. One whose run has been
    removed by retention stays quarantined, because it would bring the run back.
    """

    applier: Applier

    async def replay(self, delivery_id: str) -> Replay:
        """Apply a delivery that is waiting, or quarantined and understood now; returns after the
        commit.

        Raises `UnknownDelivery` and `StoreUnavailable`.
        """
        row = await self._row(delivery_id)
        if row.outcome is DeliveryOutcome.APPLIED:
            kept = row.run_id is None or await runs.get_run(self.database, row.run_id)
            gone = "" if kept else "; its run has been deleted"
            return Replay.of(row, f"{APPLIED_BEFORE}{gone}", already=True)
        if row.outcome is DeliveryOutcome.QUARANTINED:
            if row.body is None:
                return Replay.of(row, "its body was removed by retention")
            again = self._parse_again(row, row.body)
            reason = await self._why_not(again)
            detail = {"delivery_id": delivery_id, "run_id": again.run_id}
            detail |= {"still_quarantined": reason}
            entry = audit.entry(Action.REPLAY, self.clock(), **detail)
            log.info("delivery.replayed", actor=entry["actor"], **detail)
            if reason is not None:
                await audit.write(self.database, entry)
                return Replay.of(row, reason)
            if not await self.database.write(partial(_requeue, again, entry)):
                row = await self._row(delivery_id)  # another process was quicker
                if row.outcome is DeliveryOutcome.APPLIED:
                    return Replay.of(row, APPLIED_BEFORE, already=True)
        for _ in range(CHECKS):
            await self.applier.drain()
            row = await self._row(delivery_id)
            if row.outcome is not DeliveryOutcome.WAITING:
                return Replay.of(row, row.reason)
            await asyncio.sleep(CHECK_SECONDS)
        raise StoreUnavailable(f"delivery {delivery_id} waits, and was not applied in time")

    async def acknowledge(self, delivery_ids: Sequence[str]) -> list[str]:
        """Mark quarantined deliveries as seen: they stay, can be replayed, and are not counted as
        problems any more. Returns the ids of those that were not acknowledged before.

        Raises `StoreUnavailable`.
        """
        done: list[str] = []
        for first in range(0, len(delivery_ids), ACKNOWLEDGED_AT_ONCE):
            some = delivery_ids[first : first + ACKNOWLEDGED_AT_ONCE]
            entry = audit.entry(Action.ACKNOWLEDGE, self.clock())
            done += await self.database.write(partial(_acknowledge, some, entry))
        return done

    async def _row(self, delivery_id: str) -> DeliveryRow:
        row = await deliveries.get_delivery(self.database, delivery_id)
        if row is None:
            raise UnknownDelivery(f"there is no delivery {delivery_id}")
        return row

    def _parse_again(self, row: DeliveryRow, body: bytes) -> Delivery:
        """The delivery as it is parsed now; its id may come from a header, which is not kept."""
        signer = row.workspace_id if self.workspaces.has(row.workspace_id) else None
        again = delivery_of(body, at=row.received_at, signers=[signer])
        return replace(again, delivery_id=row.delivery_id)

    async def _why_not(self, delivery: Delivery) -> str | None:
        """Why it would be quarantined again, or may not be applied."""
        seen, reason, _ = self.applier.parse(delivery)
        if seen is None:
            return reason
        # A callback comes when its run ends, or soon after.
        listed = ListedRun(seen.run_id, seen.workspace_id, delivery.received_at - AROUND)
        removed, _ = await retention.find_removed(self.database, [listed])
        if removed:
            return (
                f"it is as old as runs that retention has removed, and run {seen.run_id} is not "
                "kept here; `tracker runs track` reads it again"
            )
        return None


def _acknowledge(
    delivery_ids: Sequence[str], entry: Mapping[str, Any], connection: Connection
) -> list[str]:
    marked = deliveries.acknowledge(connection, delivery_ids, entry["at"])
    for delivery_id in marked:
        audit.note(connection, {**entry, "detail": {"delivery_id": delivery_id}})
    return marked


def _requeue(delivery: Delivery, entry: Mapping[str, Any], connection: Connection) -> bool:
    if not deliveries.requeue(connection, delivery):
        return False
    audit.note(connection, entry)
    return True
