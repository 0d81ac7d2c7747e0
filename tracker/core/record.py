"""A run as it stands in the database: what the merge decides, and the facts about its receipt.

Who was first, when it was first seen, how often it was looked at: these lie outside the join,
because they tell how the news reached *us*. `apply` is pure: the door gives it the row and the
entry and writes what comes back.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from tracker.core.merge import merge, shows_the_same
from tracker.core.observation import Observation, Source
from tracker.core.quick import quick_dataclass
from tracker.core.run import Run, RunStatus, Tracking
from tracker.core.schedule import Durations, Policy, next_check, next_recheck
from tracker.core.tags import Tags

# What is written of runs: one entry for each thing that happened to one, and deliveries.
#
# Sources make observations; the use cases wrap them into entries that also say what the sight
# was: a callback, a read made for this run alone, an item of a list, the answer to a start.


TRIAL: Final = "tracker.doctor"
"""The type of the deliveries with which `tracker doctor` tries the way that callbacks take. They
are signed, stored and answered like any other, speak of no run, and count in no statistics."""
TRIAL_IDS: Final = "whd_doctor_"
"""How their ids begin; hexadecimal digits follow."""


class DeliveryOutcome(StrEnum):
    """What became of a callback whose signature was right.

    It is stored as waiting, and answered. Whoever applies it makes it applied, together with its
    effect on its run, or quarantined, with the reason; a replay makes a quarantined one wait again.
    """

    WAITING = "waiting"
    APPLIED = "applied"
    QUARANTINED = "quarantined"


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An authentic callback as it came. `body` is the raw bytes; `created_at` is FLORA's time.

    `workspace_id` is the workspace whose secret signed it; the one that the body names where that
    is not known. `callback_token` is the last part of the address that it came to, where that is
    not the bare one.
    """

    delivery_id: str
    received_at: datetime
    body: bytes
    run_id: str | None = None
    event_type: str | None = None
    api_version: str | None = None
    workspace_id: str | None = None
    created_at: datetime | None = None
    callback_token: str | None = None


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A run was seen.

    `reads` counts the API reads made for this run alone (none for an item of a list that was read
    for many). `claim` names the claim under which it was made, which is given back. The others
    come with the answer to our own start, whose row in the start log, (`slot`, `idempotency_key`),
    is closed in the same transaction; `reserved_cost` is the price of this run, in USD.
    `counted_before` says that the run's end was counted before retention removed it.
    """

    observation: Observation
    reads: int = 0
    claim: str | None = None
    inputs: list[dict[str, Any]] | None = None
    tags: Tags | None = None
    reserved_at: datetime | None = None
    reserved_cost: Decimal | None = None
    callback_expected: bool = False
    slot: str | None = None
    idempotency_key: str | None = None
    counted_before: bool = False


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """A read made for this run alone showed nothing.

    `missing` is true where FLORA answered that the run does not exist, while it could be read in
    that workspace; else `error` says what went wrong, in words fit for a person. `reads` counts the
    reads made.
    """

    run_id: str
    at: datetime
    error: str
    missing: bool = False
    reads: int = 1
    claim: str | None = None


Entry = Seen | Unseen


LOST_AFTER_READS: Final = 5
LOST_AFTER: Final = timedelta(hours=1)
LOST_READ_EVERY: Final = timedelta(days=1)
"""How often a lost run is read: FLORA may have been wrong."""

_API: Final = (Source.POLL, Source.HISTORY)
"""Sources that show how a run stands at this moment."""
_WANTS_READ: Final = (Source.CALLBACK, Source.TRACK)
"""Sources after which the API is asked at once."""

DurationsOf = Callable[[str | None], Durations | None]
"""What is known of the durations of a technique, by its id."""


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A tracked run.

    `looks` counts the sights by the API since the last news of another kind, and so sets the wait;
    `checks` counts the API reads made for this run alone, for ever. `missing` counts the reads that
    answered "no such run" since the run was last shown, the first of them at `missing_since`.
    `cost_final` tells that a read long enough after the end has shown the bill; until then, and
    while a completed run lacks outputs, both are read again at `recheck_at`: `None` where that was
    given up. `tags`, and when and at which price (USD) it was reserved in the budgets, are known of
    our own starts alone.
    """

    run: Run
    source: Source
    first_seen_at: datetime
    callback_at: datetime | None = None
    callback_expected: bool = False
    ended_via: Source | None = None
    end_seen_at: datetime | None = None
    settled_at: datetime | None = None
    cost_final: bool = False
    recheck_at: datetime | None = None
    inputs: list[dict[str, Any]] | None = None
    tags: Tags | None = None
    reserved_at: datetime | None = None
    reserved_cost: Decimal | None = None
    next_check_at: datetime | None = None
    looks: int = 0
    checks: int = 0
    missing: int = 0
    missing_since: datetime | None = None
    lost: bool = False
    last_error: str | None = None
    lease_until: datetime | None = None
    lease_holder: str | None = None

    @property
    def tracking(self) -> Tracking:
        """`settled`, `lost`, or still `active`."""
        if self.run.settled:
            return Tracking.SETTLED
        return Tracking.LOST if self.lost else Tracking.ACTIVE

    @property
    def created_at(self) -> datetime:
        """FLORA's time of creation; until it is known, when the run was first seen."""
        return self.run.created_at or self.first_seen_at

    @property
    def spent_at(self) -> datetime:
        """In which period what it costs counts."""
        return self.reserved_at or self.created_at

    @property
    def billed_whole(self) -> bool:
        """Whether nothing of cost and outputs is to be read again."""
        return _billed_whole(self.run, self.cost_final)


def apply(
    record: Record | None, entry: Entry, *, policy: Policy, durations_of: DurationsOf
) -> Record | None:
    """The record after `entry`. `record` is `None` for a run never heard of.

    Returns `record` itself where nothing changes, and `None` where the entry is about no run that
    is known (an unseen run that was never tracked).
    """
    if isinstance(entry, Unseen):
        return None if record is None else _unseen(record, entry, policy)
    return _sighted(record, entry, policy, durations_of)


def _sighted(
    before: Record | None, entry: Seen, policy: Policy, durations_of: DurationsOf
) -> Record:
    seen = entry.observation
    old = before or Record(run=Run(run_id=seen.run_id), source=seen.source, first_seen_at=seen.at)
    run = merge(old.run, seen)
    if old.cost_final and shows_the_same(old.run, run):
        run = old.run  # a bill that stands is not written anew with every page that shows it
    wants_read = seen.source in _WANTS_READ
    just_ended = run.standing.ended and run.standing > old.run.standing
    looked = _is_a_look(before, entry, run)
    looks = 0 if wants_read or just_ended else old.looks + looked
    callback_expected = old.callback_expected or entry.callback_expected
    moves = looked or wants_read or just_ended or before is None or before.lost
    next_check_at = old.next_check_at
    if moves or run.settled:
        next_check_at = next_check(
            run,
            policy=policy,
            now=seen.at,
            first_seen=old.first_seen_at,
            looks=looks,
            callback_expected=callback_expected,
            durations=durations_of(run.technique_id),
            at_once=wants_read,
        )
    end_seen_at = old.end_seen_at or (seen.at if run.standing.ended else None)
    cost_final, recheck_at = False, None
    if end_seen_at is not None and run.standing.ended_at_api:
        since = since_end(run, end_seen_at, seen.read_at, seen.clock_skew or 0.0)
        late_enough = seen.shows_bill and since >= policy.cost_recheck
        shown = run.charged_cost is not None or run.status is RunStatus.FAILED
        cost_final = shown and (old.cost_final or late_enough)
        if run.settled and not _billed_whole(run, cost_final):
            recheck_at = _recheck_at(old, entry, since, policy)
    keeps_lease = entry.claim is None or entry.claim != old.lease_holder
    # Each field by its name, not `replace`, which takes four times as long: this is done for each
    # callback, and hardly anything stays as it was.
    after = Record(
        run=run,
        # Our own start came before whatever was heard of it first: a callback may overtake its
        # answer.
        source=Source.START if seen.source is Source.START else old.source,
        first_seen_at=old.first_seen_at,
        callback_at=_callback_at(old, seen),
        callback_expected=callback_expected,
        ended_via=_ended_via(old, entry, run),
        end_seen_at=end_seen_at,
        settled_at=(old.settled_at or seen.at) if run.settled else None,
        cost_final=cost_final,
        recheck_at=recheck_at,
        inputs=old.inputs if entry.inputs is None else entry.inputs,
        tags=old.tags if entry.tags is None else entry.tags,
        reserved_at=entry.reserved_at or old.reserved_at,
        reserved_cost=old.reserved_cost if entry.reserved_at is None else entry.reserved_cost,
        next_check_at=next_check_at,
        looks=looks,
        checks=old.checks + entry.reads,
        missing=0,
        missing_since=None,
        lost=False,
        last_error=None if seen.source in _API else old.last_error,
        lease_until=old.lease_until if keeps_lease else None,
        lease_holder=old.lease_holder if keeps_lease else None,
    )
    return before if before is not None and after == before else after


def _ended_via(old: Record, entry: Seen, run: Run) -> Source | None:
    """How the end became known first. Of a run that was removed and is tracked again that is not
    known any more, and its end is not counted again."""
    if old.run.standing.ended:
        return old.ended_via
    return entry.observation.source if run.standing.ended and not entry.counted_before else None


def since_end(
    run: Run, end_seen_at: datetime, at: datetime, skew: float | None = None
) -> timedelta:
    """How long the run had ended at that moment.

    By FLORA's time of the end, on whose clock `skew` seconds more have passed; where one of them is
    not known, at least since the end was seen here. (A callback may tell of an end that comes.)
    """
    since = at - end_seen_at
    if run.completed_at is not None:
        by_flora = at + timedelta(seconds=skew or 0.0) - run.completed_at
        since = by_flora if skew is not None else max(since, by_flora)
    return max(since, timedelta(0))


def _billed_whole(run: Run, cost_final: bool) -> bool:
    """Whether nothing is left to read of a settled run.

    A failed run that shows a cost is read on: FLORA refunds it, if late (flora-api.md, 8).
    """
    refund_due = run.status is RunStatus.FAILED and bool(run.charged_cost)
    return cost_final and not run.lacks_outputs and not refund_due


def _recheck_at(old: Record, entry: Seen, since: timedelta, policy: Policy) -> datetime | None:
    """When to read cost and outputs of a settled run again, which lacks something of them.

    Only a read made for it puts that off: a page that was read for others may leave costs out.
    """
    open_before = old.run.settled and not old.billed_whole
    if open_before and (old.recheck_at is None or not (entry.reads or entry.claim)):
        return old.recheck_at
    return next_recheck(policy, since_end=since, now=entry.observation.read_at)


def _callback_at(old: Record, seen: Observation) -> datetime | None:
    """When the first callback was received: they need not be applied in the order in which they
    came."""
    if seen.source is not Source.CALLBACK:
        return old.callback_at
    return seen.at if old.callback_at is None else min(old.callback_at, seen.at)


def _is_a_look(before: Record | None, entry: Seen, run: Run) -> bool:
    """Whether this sight stands for a look at the run, so that the next one may wait.

    A read made for it does, and a list read because it was due. A list read for others does so too
    for a run that is new or due. Not for one that has ended, though: that waits for its details,
    which the list does not have. And what was read before a callback came says nothing about after.
    """
    seen = entry.observation
    if run.settled or seen.source not in _API:
        return False
    if before is None:
        return True
    if before.callback_at is not None and seen.at < before.callback_at:
        return False
    if entry.reads or entry.claim is not None:
        return True
    due = before.next_check_at is not None and before.next_check_at <= seen.at
    return due and not run.standing.ended


def _unseen(record: Record, entry: Unseen, policy: Policy) -> Record:
    if record.run.settled:  # meanwhile, by another way; or its cost was to be read again
        recheck_at = record.recheck_at
        if recheck_at is not None and record.end_seen_at is not None:
            passed = since_end(record.run, record.end_seen_at, entry.at)
            recheck_at = next_recheck(policy, since_end=passed, now=entry.at)
        after = replace(record, checks=record.checks + entry.reads, recheck_at=recheck_at)
        return _given_back(after, entry.claim)
    after = replace(
        record,
        checks=record.checks + entry.reads,
        looks=record.looks + 1,
        last_error=entry.error,
    )
    if entry.missing:
        since = record.missing_since or entry.at
        missing = record.missing + 1
        after = replace(
            after,
            missing=missing,
            missing_since=since,
            lost=missing >= LOST_AFTER_READS and entry.at - since >= LOST_AFTER,
        )
    after = _given_back(after, entry.claim)
    due = next_check(
        after.run,
        policy=policy,
        now=entry.at,
        first_seen=after.first_seen_at,
        looks=after.looks,
        callback_expected=after.callback_expected,
    )
    return replace(after, next_check_at=entry.at + LOST_READ_EVERY if after.lost else due)


def _given_back(record: Record, claim: str | None) -> Record:
    """The record without its lease, where `claim` holds it."""
    if claim is None or claim != record.lease_holder:
        return record
    return replace(record, lease_until=None, lease_holder=None)
