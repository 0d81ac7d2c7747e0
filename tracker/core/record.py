"""A tracked run as the database stores it, and the entries that change it.

A `Record` is the merged run and what the tracker knows about receiving it: who reported it first,
when, how often it was polled. `apply` is pure: the writer passes the row and an entry, and writes
what it returns.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from tracker.core.observation import API_READS, Observation, Source, merge, shows_the_same
from tracker.core.run import RunState, RunStatus, Tracking, fast_dataclass
from tracker.core.schedule import Durations, NextPoll, Policy, PollReason, next_poll, next_recheck
from tracker.core.starts import Tags

TEST_DELIVERY: Final = "tracker.doctor"
"""The type of the test deliveries of `tracker doctor`. They are signed, stored and answered like
any other, name no run, and are left out of statistics."""
TEST_DELIVERY_IDS: Final = "whd_doctor_"
"""The prefix of their ids; hexadecimal digits follow."""


class DeliveryOutcome(StrEnum):
    """The state of a callback with a valid signature.

    It is stored as waiting and acknowledged. Applying it makes it applied, in one transaction with
    its effect on the run, or quarantined, with a reason. A replay makes it wait again.
    """

    WAITING = "waiting"
    APPLIED = "applied"
    QUARANTINED = "quarantined"


@fast_dataclass
class Delivery:
    """A verified callback as received. `body` is the raw bytes; `created_at` is FLORA's time.

    `workspace_id` is the workspace whose secret signed it, or the one that the body names if that
    is unknown. `callback_token` is the last path segment below the callback address, if any.
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


@fast_dataclass
class StartFacts:
    """What is known of a run because it was started here: its start in the log, and what that has.

    `reserved_cost` is the price of this run in USD, `reserved_at` the time of its reservation.
    """

    workspace_id: str
    idempotency_key: str
    inputs: list[dict[str, Any]] | None = None
    tags: Tags | None = None
    reserved_at: datetime | None = None
    reserved_cost: Decimal | None = None


@fast_dataclass
class Observed:
    """An observation to write.

    `reads` counts the API reads made for this run alone (0 for a list item). `claim` is the lease
    under which it was made, and which it releases. `start` is the start that the run is known to
    belong to by it, and which is closed in the same transaction. `counted_before` says that the
    run's end was counted before retention removed the run. An `incidental` observation, from a list
    that was read for other runs, is not written if it shows nothing new; one that is `only_stored`,
    of a run that was stored when it was read, not if the run has been removed since.
    """

    observation: Observation
    reads: int = 0
    claim: str | None = None
    start: StartFacts | None = None
    callback_expected: bool = False
    counted_before: bool = False
    incidental: bool = False
    only_stored: bool = False

    @property
    def run_id(self) -> str:
        return self.observation.run_id

    @property
    def at(self) -> datetime:
        return self.observation.at


@fast_dataclass
class FailedRead:
    """A read made for this run alone that brought no observation.

    `missing` is true if FLORA answered that the run does not exist while other reads of the
    workspace succeeded. `error` says what went wrong, for people. `reads` counts the reads made.
    """

    run_id: str
    at: datetime
    error: str
    missing: bool = False
    reads: int = 1
    claim: str | None = None


Entry = Observed | FailedRead


LOST_AFTER_READS: Final = 5
LOST_AFTER: Final = timedelta(hours=1)
LOST_READ_EVERY: Final = timedelta(days=1)
"""How often a lost run is read again."""

_WANTS_READ: Final = (Source.CALLBACK, Source.TRACK)
"""Sources after which the run is read at once."""

DurationsOf = Callable[[str | None], Durations | None]
"""The known durations of a technique, by its id."""


@fast_dataclass
class Record:
    """A tracked run.

    `next_poll` is `None` for a settled run. `polls` counts the polls since the last other news, and
    so sets the wait; `checks` counts all API reads of this run. `missing` counts the reads that
    answered "no such run" since the run was last shown, the first of them at `missing_since`.
    `cost_final` says that a read long enough after the end showed the bill; until then, and while
    a completed run lacks outputs, both are read again at `recheck_at` (`None` after giving up).
    `inputs`, `idempotency_key` (of the start that it belongs to), `tags` and the reservation in
    budgets (time, price in USD) are known only for our own starts; they are those of one start.
    """

    run: RunState
    source: Source | str
    first_seen_at: datetime
    callback_at: datetime | None = None
    callback_expected: bool = False
    ended_via: Source | str | None = None
    end_seen_at: datetime | None = None
    settled_at: datetime | None = None
    cost_final: bool = False
    recheck_at: datetime | None = None
    inputs: list[dict[str, Any]] | None = None
    idempotency_key: str | None = None
    tags: Tags | None = None
    reserved_at: datetime | None = None
    reserved_cost: Decimal | None = None
    next_poll: NextPoll | None = None
    polls: int = 0
    checks: int = 0
    missing: int = 0
    missing_since: datetime | None = None
    lost: bool = False
    last_error: str | None = None
    lease_until: datetime | None = None
    lease_holder: str | None = None

    @property
    def next_check_at(self) -> datetime | None:
        """When the run is polled next."""
        return None if self.next_poll is None else self.next_poll.at

    @property
    def tracking(self) -> Tracking:
        """`settled`, `lost`, or still `active`."""
        if self.run.settled:
            return Tracking.SETTLED
        return Tracking.LOST if self.lost else Tracking.ACTIVE

    @property
    def shown_status(self) -> str:
        """FLORA's status, or `lost`."""
        return "lost" if self.tracking is Tracking.LOST else self.run.status

    @property
    def created_at(self) -> datetime:
        """FLORA's creation time; until it is known, when the run was first observed."""
        return self.run.created_at or self.first_seen_at

    @property
    def spent_at(self) -> datetime:
        """The time that decides in which period its cost counts."""
        return self.reserved_at or self.created_at

    @property
    def billed_whole(self) -> bool:
        return _billed_whole(self.run, self.cost_final)


def apply(
    record: Record | None, entry: Entry, *, policy: Policy, durations_of: DurationsOf
) -> Record | None:
    """The record after `entry`; `record` is `None` for an unknown run.

    Returns `record` itself if nothing changes, and `None` for an unknown run that a `FailedRead`
    or an observation that is `only_stored` is about.
    """
    if isinstance(entry, FailedRead):
        return None if record is None else _unseen(record, entry, policy)
    if record is None and entry.only_stored:
        return None
    seen = entry.observation
    old = record or Record(
        run=RunState(run_id=seen.run_id), source=seen.source, first_seen_at=seen.at
    )
    run = merge(old.run, seen)
    polls, following = _schedule_of(
        run, old, entry, is_new=record is None, policy=policy, durations_of=durations_of
    )
    end_seen_at = old.end_seen_at or (seen.at if run.precedence.ended else None)
    cost_final, recheck_at = False, None
    if end_seen_at is not None and run.precedence.ended_at_api:
        cost_final, recheck_at = _bill_of(run, old, entry, end_seen_at, policy)
    # Each page that shows the bill of a settled run would write the run again.
    is_idle = old.cost_final or (entry.incidental and not cost_final)
    if is_idle and run is not old.run and shows_the_same(old.run, run, signed=entry.incidental):
        run = old.run
    callback_at, ended_via = _receipt_of(run, old, entry)
    # FLORA may answer several keys with one run. All facts are of the first start, so that budgets
    # do not count it by the price of one and the tags of another.
    start = old if entry.start is None or old.idempotency_key is not None else entry.start
    keeps_lease = entry.claim is None or entry.claim != old.lease_holder
    # Not `replace`, which takes four times as long: this runs for each callback.
    after = Record(
        run=run,
        # Our own start came first, even if a callback overtook its answer.
        source=Source.START if seen.source is Source.START else old.source,
        first_seen_at=old.first_seen_at,
        callback_at=callback_at,
        callback_expected=old.callback_expected or entry.callback_expected,
        ended_via=ended_via,
        end_seen_at=end_seen_at,
        settled_at=(old.settled_at or seen.at) if run.settled else None,
        cost_final=cost_final,
        recheck_at=recheck_at,
        inputs=start.inputs,
        idempotency_key=start.idempotency_key,
        tags=start.tags,
        reserved_at=start.reserved_at,
        reserved_cost=start.reserved_cost,
        next_poll=following,
        polls=polls,
        checks=old.checks + entry.reads,
        missing=0,
        missing_since=None,
        lost=False,
        last_error=None if seen.source in API_READS else old.last_error,
        lease_until=old.lease_until if keeps_lease else None,
        lease_holder=old.lease_holder if keeps_lease else None,
    )
    return record if record is not None and after == record else after


def _schedule_of(
    run: RunState,
    old: Record,
    entry: Observed,
    *,
    is_new: bool,
    policy: Policy,
    durations_of: DurationsOf,
) -> tuple[int, NextPoll | None]:
    """The number of polls since the last other news, and the next poll."""
    seen = entry.observation
    wants_read = seen.source in _WANTS_READ or (is_new and bool(seen.lacks_status))
    just_ended = run.precedence.ended and run.precedence > old.run.precedence
    polled = _counts_as_poll(None if is_new else old, entry, run)
    polls = 0 if wants_read or just_ended else old.polls + polled
    if not (polled or wants_read or just_ended or is_new or old.lost or run.settled):
        return polls, old.next_poll
    return polls, next_poll(
        run,
        policy=policy,
        now=seen.at,
        first_seen=old.first_seen_at,
        polls=polls,
        callback_expected=old.callback_expected or entry.callback_expected,
        durations=None if run.precedence.ended else durations_of(run.technique_id),
        at_once=wants_read,
    )


def _receipt_of(
    run: RunState, old: Record, entry: Observed
) -> tuple[datetime | None, Source | str | None]:
    """When its first callback came, and how its end became known."""
    seen = entry.observation
    callback_at, ended_via = old.callback_at, old.ended_via
    if seen.source is Source.CALLBACK:  # the first; they may be applied in another order
        callback_at = seen.at if callback_at is None else min(callback_at, seen.at)
    # Unknown for a run that retention removed and that is tracked again: its end counts once.
    if not old.run.precedence.ended:
        is_news = run.precedence.ended and not entry.counted_before
        ended_via = seen.source if is_news else None
    return callback_at, ended_via


def _bill_of(
    run: RunState, old: Record, entry: Observed, end_seen_at: datetime, policy: Policy
) -> tuple[bool, datetime | None]:
    """Whether the cost of a run is final, and when to read the run again if it lacks something."""
    seen = entry.observation
    since = since_end(run, end_seen_at, seen.read_at, seen.clock_skew or 0.0)
    # A read that is older than the one that showed the cost, by a clock that was set back, says
    # nothing about it.
    is_latest = run.cost_read_at is None or seen.read_at >= run.cost_read_at
    late_enough = seen.shows_bill and is_latest and since >= policy.cost_recheck
    shown = run.charged_cost is not None or run.status is RunStatus.FAILED
    cost_final = shown and (old.cost_final or late_enough)
    if not run.settled or _billed_whole(run, cost_final):
        return cost_final, None
    # Only a read made for this run moves that time: a page read for others may leave costs out.
    for_this_run = bool(entry.reads or entry.claim)
    open_before = old.run.settled and not old.billed_whole
    if open_before and (old.recheck_at is None or not for_this_run):
        return cost_final, old.recheck_at
    return cost_final, next_recheck(policy, since_end=since, now=seen.read_at)


_DATE_BEHIND: Final = timedelta(seconds=30)
"""How far FLORA's clock may seem to be behind itself: `Date` is cut to seconds, and compared with
ours when the answer has come."""


def since_end(
    run: RunState, end_seen_at: datetime, at: datetime, skew: float | None = None
) -> timedelta:
    """The time from the run's end to `at`, rather too short than too long.

    FLORA's time of the end is compared with our clock, and with FLORA's, which its answer showed to
    be `skew` seconds ahead, if it showed any. Either may be wrong. One by which the run has not
    ended yet is; otherwise the shorter time counts, since a clock that is too far ahead must not
    make a bill final, or given up. If no clock fits, the run ended when that was seen.
    """
    never, since = timedelta(0), at - end_seen_at
    if run.completed_at is not None:
        ours = at - max(run.completed_at, run.created_at or run.completed_at)
        by_flora = ours + timedelta(seconds=skew or 0.0)
        if -_DATE_BEHIND <= by_flora < never:
            by_flora = never
        if ours >= never:
            since = max(since, ours)
            if skew is not None and by_flora >= never:
                since = min(since, by_flora)
        elif by_flora >= never:
            since = by_flora
    return max(since, never)


def _billed_whole(run: RunState, cost_final: bool) -> bool:
    """Whether nothing is left to read of a settled run.

    A failed run with a cost is read again: FLORA refunds it, possibly late (flora-api.md, 8).
    """
    refund_due = run.status is RunStatus.FAILED and bool(run.charged_cost)
    return cost_final and not run.lacks_outputs and not refund_due


def _counts_as_poll(before: Record | None, entry: Observed, run: RunState) -> bool:
    """Whether this observation counts as a poll (for backoff).

    A read made for this run does, and a list item if the run is new or due. A list item of an ended
    run does not: it lacks the details that the run waits for. Nor does a read that was sent before
    the callback came.
    """
    seen = entry.observation
    if run.settled or seen.source not in API_READS or seen.lacks_status:
        return False
    if before is None:
        return True
    if before.callback_at is not None and seen.read_at < before.callback_at:
        return False
    if entry.reads or entry.claim is not None:
        return True
    due = before.next_check_at is not None and before.next_check_at <= seen.at
    return due and not run.precedence.ended


def _unseen(record: Record, entry: FailedRead, policy: Policy) -> Record:
    is_released = entry.claim is not None and entry.claim == record.lease_holder
    lease: dict[str, Any] = {"lease_until": None, "lease_holder": None} if is_released else {}
    checks = record.checks + entry.reads
    if record.run.settled:  # settled by another source meanwhile, or read for its cost
        recheck_at = record.recheck_at
        if recheck_at is not None and record.end_seen_at is not None:
            passed = since_end(record.run, record.end_seen_at, entry.at)
            recheck_at = next_recheck(
                policy, since_end=passed, now=entry.at, was_answered=entry.missing
            )
        return replace(record, checks=checks, recheck_at=recheck_at, **lease)
    missing, since, lost = record.missing, record.missing_since, record.lost
    if entry.missing:
        missing, since = missing + 1, since or entry.at
        lost = missing >= LOST_AFTER_READS and entry.at - since >= LOST_AFTER
    polls = record.polls + 1
    following = next_poll(
        record.run,
        policy=policy,
        now=entry.at,
        first_seen=record.first_seen_at,
        polls=polls,
        callback_expected=record.callback_expected,
    )
    return replace(
        record,
        checks=checks,
        polls=polls,
        last_error=entry.error,
        missing=missing,
        missing_since=since,
        lost=lost,
        next_poll=NextPoll(entry.at + LOST_READ_EVERY, PollReason.LOST) if lost else following,
        **lease,
    )
