"""Why a run is polled next at its time: the rules of `schedule.next_check`, in reverse.

Only the time and the number of polls are stored; the same rules then give the reason, for people.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.schedule import (
    LEARNED_FROM,
    Durations,
    Policy,
    first_wait,
    learned_wait,
    wait_after,
    whole_wait,
)

_SAME: Final = timedelta(milliseconds=1)
"""Databases round: times closer than this are equal."""


class PollReason(StrEnum):
    """The rule that set the time of the next poll."""

    SETTLED = "settled"
    """Nothing is left to read."""
    LOST = "lost"
    """Not found at FLORA: read once a day."""
    GRACE = "grace"
    """Waiting for the callback, for the configured time."""
    LEARNED_GRACE = "learned_grace"
    """Waiting for the callback, until the 95th percentile of the technique's durations."""
    INTERVAL = "interval"
    """No callback: one poll interval after the first observation."""
    LEARNED_INTERVAL = "learned_interval"
    """No callback: at the median of the technique's durations."""
    LEARNED_WAIT = "learned_wait"
    """Polled before, and delayed until the end is expected, or by the longest wait."""
    WAIT = "wait"
    """Each poll without an end doubles the wait."""
    ENDED = "ended"
    """It has ended; its details are read at once."""
    ASKED = "asked"
    """Read at once, on request."""
    BEFORE = "before"
    """Set under other settings or by other durations than now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextPoll:
    """When a run is polled next, UTC (`None` for never), and why.

    The wait is `wait` since `since`. For a doubled wait, `number` is the number of polls in a row
    without an end, and `jitter` what was subtracted. `durations` are those that decided, if any;
    `bounded` tells that their effect was limited, and `callback_expected` which percentile counts.
    """

    why: PollReason
    at: datetime | None = None
    since: datetime | None = None
    wait: timedelta | None = None
    number: int | None = None
    jitter: timedelta | None = None
    durations: Durations | None = None
    bounded: bool = False
    callback_expected: bool = False


def next_poll(record: Record, *, policy: Policy, durations: Durations | None) -> NextPoll:
    """When and why `record` is polled next.

    `durations` are the known durations of its technique.
    """
    at = record.next_check_at
    if record.run.settled:
        return NextPoll(why=PollReason.SETTLED)
    if record.lost or at is None:
        return NextPoll(why=PollReason.LOST, at=at)
    if record.polls > 0:
        return _delayed(record, at, policy, durations) or _doubled(record, at, policy)
    if record.run.precedence.ended:
        return NextPoll(why=PollReason.ENDED, at=at)
    return _first(record, at, policy, durations)


def _doubled(record: Record, at: datetime, policy: Policy) -> NextPoll:
    wait = wait_after(policy, record.run.run_id, record.polls)
    return NextPoll(
        why=PollReason.WAIT,
        at=at,
        since=at - wait,
        wait=wait,
        number=record.polls,
        jitter=whole_wait(policy, record.polls) - wait,
    )


def _delayed(
    record: Record, at: datetime, policy: Policy, durations: Durations | None
) -> NextPoll | None:
    """The reason, if the poll was delayed: then its time is exactly the one computed here."""
    since, expected = record.first_seen_at, record.callback_expected
    learned = learned_wait(durations, callback_expected=expected)
    wait = at - since
    if learned is None or wait > learned + _SAME or record.run.precedence.ended:
        return None
    off_a_lap = wait - round(wait / policy.interval_max) * policy.interval_max
    if min(abs(learned - wait), abs(off_a_lap)) > _SAME:
        return None
    return NextPoll(
        why=PollReason.LEARNED_WAIT,
        at=at,
        since=since,
        wait=wait,
        durations=durations,
        bounded=abs(learned - wait) > _SAME,
        callback_expected=expected,
    )


def _first(record: Record, at: datetime, policy: Policy, durations: Durations | None) -> NextPoll:
    since = record.first_seen_at
    expected = record.callback_expected
    learned = durations if durations is not None and durations.count >= LEARNED_FROM else None
    # If too few durations were known when the time was set, the settings decided.
    for known in (learned, None):
        wait = first_wait(policy, known, callback_expected=expected)
        if abs(since + wait - at) > _SAME:
            continue
        if known is None:
            why = PollReason.GRACE if expected else PollReason.INTERVAL
            return NextPoll(why=why, at=at, since=since, wait=wait)
        return NextPoll(
            why=PollReason.LEARNED_GRACE if expected else PollReason.LEARNED_INTERVAL,
            at=at,
            since=since,
            wait=wait,
            durations=known,
            bounded=wait != learned_wait(known, callback_expected=expected),
            callback_expected=expected,
        )
    # The answer to a start sets no time if the run was requested before.
    if at <= since + _SAME or record.source is Source.TRACK:
        return NextPoll(why=PollReason.ASKED, at=at)
    return NextPoll(why=PollReason.BEFORE, at=at, since=since, wait=at - since)
