"""A run as it stands in the database: what the merge decides, and the facts about its receipt.

Who was first, when it was first seen, how often it was looked at: these lie outside the join,
because they tell how the news reached *us*. `apply` is pure: the door gives it the row and the
entry and writes what comes back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from tracker.core.entry import Delivered, Entry, Seen, Unseen
from tracker.core.merge import merge
from tracker.core.observation import Source
from tracker.core.run import Run, Tracking
from tracker.core.schedule import Durations, Policy, next_check

LOST_AFTER_READS: Final = 5
LOST_AFTER: Final = timedelta(hours=1)

DurationsOf = Callable[[str | None], Durations | None]
"""What is known of the durations of a technique, by its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A tracked run.

    `looks` counts the sights by the API since the last news of another kind, and so sets the wait;
    `checks` counts the API reads made for this run alone, for ever. `missing` counts the reads in a
    row that answered "no such run", the first of them at `missing_since`.
    """

    run: Run
    source: Source
    first_seen_at: datetime
    callback_at: datetime | None = None
    callback_expected: bool = False
    ended_via: Source | None = None
    settled_at: datetime | None = None
    inputs: list[dict[str, Any]] | None = None
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


def apply(
    record: Record | None, entry: Entry, *, policy: Policy, durations_of: DurationsOf
) -> Record | None:
    """The record after `entry`. `record` is `None` for a run never heard of.

    Returns `record` itself where nothing changes, and `None` where the entry is about no run that
    is known (a quarantined delivery, an unseen run that was never tracked).
    """
    if isinstance(entry, Unseen):
        return None if record is None else _unseen(record, entry, policy)
    if isinstance(entry, Delivered):
        if entry.observation is None:
            return record
        entry = Seen(observation=entry.observation)
    return _sighted(record, entry, policy, durations_of)


def _sighted(
    record: Record | None, entry: Seen, policy: Policy, durations_of: DurationsOf
) -> Record:
    seen = entry.observation
    before = record
    if record is None:
        record = Record(run=Run(run_id=seen.run_id), source=seen.source, first_seen_at=seen.at)
    run = merge(None if before is None else record.run, seen)
    shown_by_api = seen.source in (Source.POLL, Source.HISTORY)
    # A settled run on a history page is not looked at any more: nothing of its row changes.
    looks = record.looks + 1 if shown_by_api and not run.settled else record.looks
    wants_read = seen.source in (Source.CALLBACK, Source.TRACK)
    rose = run.standing > record.run.standing
    if wants_read or (rose and run.standing.ended):
        looks = 0
    after = replace(
        record,
        run=run,
        # Our own start came before whatever was heard of it first: a callback may overtake its
        # answer.
        source=Source.START if seen.source is Source.START else record.source,
        callback_at=record.callback_at or (seen.at if seen.source is Source.CALLBACK else None),
        callback_expected=record.callback_expected or entry.callback_expected,
        ended_via=record.ended_via or (seen.source if run.standing.ended else None),
        settled_at=(record.settled_at or seen.at) if run.settled else None,
        inputs=record.inputs if entry.inputs is None else entry.inputs,
        looks=looks,
        checks=record.checks + entry.reads,
        missing=0,
        missing_since=None,
        lost=False,
        last_error=None if shown_by_api else record.last_error,
    )
    if entry.claim is not None and entry.claim == record.lease_holder:
        after = replace(after, lease_until=None, lease_holder=None)
    if _keeps_its_time(before, after, shown_by_api=shown_by_api, wants_read=wants_read):
        return after if after != record else record
    return replace(
        after,
        next_check_at=next_check(
            run,
            policy=policy,
            now=seen.at,
            first_seen=after.first_seen_at,
            looks=looks,
            callback_expected=after.callback_expected,
            durations=durations_of(run.technique_id),
            at_once=wants_read,
        ),
    )


def _keeps_its_time(
    before: Record | None, after: Record, *, shown_by_api: bool, wants_read: bool
) -> bool:
    """Whether the sight leaves the time of the next look as it was.

    Only the answer to a start that comes after its run was heard of does: the run may be due
    already.
    """
    if before is None or after.run.settled or before.lost:
        return False
    return not shown_by_api and not wants_read and before.run.standing.ended


def _unseen(record: Record, entry: Unseen, policy: Policy) -> Record:
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
    if entry.claim is not None and entry.claim == record.lease_holder:
        after = replace(after, lease_until=None, lease_holder=None)
    due = next_check(
        after.run,
        policy=policy,
        now=entry.at,
        first_seen=after.first_seen_at,
        looks=after.looks,
        callback_expected=after.callback_expected,
    )
    return replace(after, next_check_at=None if after.lost else due)
