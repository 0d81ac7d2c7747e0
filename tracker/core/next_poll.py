"""Why a run is looked at next when it is: the schedule, read backwards from what it decided.

`schedule.next_check` decides when; only the moment and the count of looks are kept. Here the same
rules tell which of them gave that moment, so that a person can be told.
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
"""Databases round: two moments nearer than this are one."""


class Why(StrEnum):
    """Which rule gave the time of the next look."""

    SETTLED = "settled"
    """Nothing is left to read."""
    LOST = "lost"
    """FLORA has long answered that there is no such run: it is read once a day."""
    GRACE = "grace"
    """The callback is waited for, as long as the settings say."""
    LEARNED_GRACE = "learned_grace"
    """The callback is waited for until nearly all runs of the technique have ended."""
    INTERVAL = "interval"
    """No callback was asked for: one poll interval after the run was first heard of."""
    LEARNED_INTERVAL = "learned_interval"
    """No callback was asked for: when half of the technique's runs have ended."""
    LEARNED_WAIT = "learned_wait"
    """It was looked at, and looks are put off until its end may be expected, or the longest wait
    has passed."""
    WAIT = "wait"
    """So many looks have brought no end, and each doubles the wait."""
    ENDED = "ended"
    """It has ended, and its details are read at once."""
    ASKED = "asked"
    """Somebody asked for it, so it is read at once."""
    BEFORE = "before"
    """It was decided under other settings, or by other durations than are known now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextLook:
    """When a run is looked at next, UTC (`None` for never), and why.

    `since` and `wait` say from when how long is waited. Of a doubled wait, `number` is how many
    looks in a row brought nothing, and `jitter` what was taken off the wait. `durations` is what
    was learned, where that decided, and `bounded` that it goes further than it may move a look;
    `callback_expected` tells which of the quantiles counts.
    """

    why: Why
    at: datetime | None = None
    since: datetime | None = None
    wait: timedelta | None = None
    number: int | None = None
    jitter: timedelta | None = None
    durations: Durations | None = None
    bounded: bool = False
    callback_expected: bool = False


def next_look(record: Record, *, policy: Policy, durations: Durations | None) -> NextLook:
    """Why `record` is looked at next when it is.

    `durations` is what is known of its technique now. Pure: nothing is decided here.
    """
    at = record.next_check_at
    if record.run.settled:
        return NextLook(why=Why.SETTLED)
    if record.lost or at is None:
        return NextLook(why=Why.LOST, at=at)
    if record.looks > 0:
        return _put_off(record, at, policy, durations) or _doubled(record, at, policy)
    if record.run.standing.ended:
        return NextLook(why=Why.ENDED, at=at)
    return _first(record, at, policy, durations)


def _doubled(record: Record, at: datetime, policy: Policy) -> NextLook:
    wait = wait_after(policy, record.run.run_id, record.looks)
    return NextLook(
        why=Why.WAIT,
        at=at,
        since=at - wait,
        wait=wait,
        number=record.looks,
        jitter=whole_wait(policy, record.looks) - wait,
    )


def _put_off(
    record: Record, at: datetime, policy: Policy, durations: Durations | None
) -> NextLook | None:
    """That the look was put off, if it was: then it stands at the very moment that this gives."""
    since, expected = record.first_seen_at, record.callback_expected
    learned = learned_wait(durations, callback_expected=expected)
    wait = at - since
    if learned is None or wait > learned + _SAME or record.run.standing.ended:
        return None
    off_a_lap = wait - round(wait / policy.interval_max) * policy.interval_max
    if min(abs(learned - wait), abs(off_a_lap)) > _SAME:
        return None
    return NextLook(
        why=Why.LEARNED_WAIT,
        at=at,
        since=since,
        wait=wait,
        durations=durations,
        bounded=abs(learned - wait) > _SAME,
        callback_expected=expected,
    )


def _first(record: Record, at: datetime, policy: Policy, durations: Durations | None) -> NextLook:
    since = record.first_seen_at
    expected = record.callback_expected
    learned = durations if durations is not None and durations.count >= LEARNED_FROM else None
    # What is learned may have been too little when the look was set: then the settings decided.
    for known in (learned, None):
        wait = first_wait(policy, known, callback_expected=expected)
        if abs(since + wait - at) > _SAME:
            continue
        if known is None:
            why = Why.GRACE if expected else Why.INTERVAL
            return NextLook(why=why, at=at, since=since, wait=wait)
        return NextLook(
            why=Why.LEARNED_GRACE if expected else Why.LEARNED_INTERVAL,
            at=at,
            since=since,
            wait=wait,
            durations=known,
            bounded=wait != learned_wait(known, callback_expected=expected),
            callback_expected=expected,
        )
    # The answer to a start sets no time of its own where somebody has asked for the run before.
    if at <= since + _SAME or record.source is Source.TRACK:
        return NextLook(why=Why.ASKED, at=at)
    return NextLook(why=Why.BEFORE, at=at, since=since, wait=at - since)
