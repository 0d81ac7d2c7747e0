"""When to poll a run next: a pure function of the run, the time and its technique's durations.

The first poll waits for the callback (grace) or, without a callback, one poll interval. Each poll
without an end doubles the wait, up to the maximum. A callback makes the run due at once. Known
durations of the technique move the first poll by a factor of ten at most, and later polls until the
end is expected, by the longest wait at most.

docs/performance.md has the figures behind the defaults.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import blake2b
from math import ceil
from typing import Final, NamedTuple

from tracker.core.run import RunState

LEARNED_FROM: Final = 20
"""Completed runs of a technique that are needed before its durations are used."""
LEARNED_FACTOR: Final = 10
"""Durations move the first poll by this factor at most."""
CALLBACK_MARGIN: Final = timedelta(seconds=5)
"""How long after the end a callback may take before it counts as missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The configured waits."""

    grace: timedelta = timedelta(seconds=30)
    interval: timedelta = timedelta(seconds=5)
    interval_max: timedelta = timedelta(seconds=300)
    cost_recheck: timedelta = timedelta(seconds=60)
    cost_give_up: timedelta = timedelta(hours=24)

    @property
    def longest_wait(self) -> timedelta:
        """The next poll of an open run is at most this far ahead."""
        return max(self.interval_max, LEARNED_FACTOR * max(self.grace, self.interval))


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds from creation to end of a technique's last `count` runs, or from event to delivery of
    an endpoint's last `count` messages."""

    count: int
    p50: float
    p95: float

    @classmethod
    def between(cls, spans: Iterable[tuple[datetime, datetime]]) -> "Durations":
        """The durations of these spans."""
        return cls.of((end - begin).total_seconds() for begin, end in spans)

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Durations":
        """These durations, with quantiles by nearest rank; none is below 0."""
        took = sorted(max(each, 0.0) for each in seconds)
        if not took:
            return cls(count=0, p50=0.0, p95=0.0)
        p50, p95 = (took[max(ceil(share * len(took)) - 1, 0)] for share in (0.5, 0.95))
        return cls(count=len(took), p50=p50, p95=p95)


def first_wait(policy: Policy, learned: timedelta | None, *, callback_expected: bool) -> timedelta:
    """How long after its creation a run is first polled; `learned` is its `learned_wait`."""
    base = policy.grace if callback_expected else policy.interval
    if learned is None:
        return base
    return min(max(learned, base / LEARNED_FACTOR), base * LEARNED_FACTOR)


def learned_wait(durations: Durations | None, *, callback_expected: bool) -> timedelta | None:
    """How long after creation a poll pays off; `None` with too few known durations.

    With a callback expected the poll serves the rare lost callback, so it waits for the 95th
    percentile; without one it finds the end, so it waits for the median.
    """
    if durations is None or durations.count < LEARNED_FROM:
        return None
    if callback_expected:
        return timedelta(seconds=durations.p95) + CALLBACK_MARGIN
    return timedelta(seconds=durations.p50)


def wait_after(policy: Policy, run_id: str, polls: int) -> timedelta:
    """The wait after the `polls`-th poll (from 1) without an end: doubling, capped, with jitter.

    The jitter takes off up to a fifth, so that runs started together spread out. It is derived from
    the run id and the count, so that the function stays pure.
    """
    doublings = min(polls - 1, 30)
    wait: timedelta = min(policy.interval * 2**doublings, policy.interval_max)
    return wait * (1 - 0.2 * jitter_share(run_id, polls))


class PollReason(StrEnum):
    """The rule that set the time of a run's next poll."""

    GRACE = "grace"
    """Its callback is awaited, for the configured time."""
    LEARNED_GRACE = "learned_grace"
    """Its callback is awaited, until the 95th percentile of the technique's durations."""
    INTERVAL = "interval"
    """No callback is expected: one poll interval after the first observation."""
    LEARNED_INTERVAL = "learned_interval"
    """No callback is expected: at the median of the technique's durations."""
    LEARNED_WAIT = "learned_wait"
    """Polled before, and put off until the end is expected, by the longest wait at most."""
    WAIT = "wait"
    """Each poll without an end doubles the wait."""
    ENDED = "ended"
    """It has ended; its details are read at once."""
    ASKED = "asked"
    """A callback or a request to track it asks for a poll at once."""
    LOST = "lost"
    """Not found at FLORA: read once a day."""
    CLOCK_SET = "clock_set"
    """Read at once: the time was further ahead than any wait allows, because the clock was set back
    or the waits were shortened."""


class NextPoll(NamedTuple):
    """When a run is polled next, UTC, and why then; `None` if that is not known. While an older
    version runs too, the reason may be that of an earlier poll."""

    at: datetime
    why: PollReason | None


def next_poll(
    run: RunState,
    *,
    policy: Policy,
    now: datetime,
    first_seen: datetime,
    polls: int,
    callback_expected: bool,
    durations: Durations | None = None,
    at_once: bool = False,
) -> NextPoll | None:
    """When to read the run next, and why then; `None` if nothing is left to read.

    `first_seen` is when the tracker first heard of the run, by its own clock. `polls` is the number
    of polls since the last other news. `at_once` says that a callback or a request to track the
    run asks for a read now.
    """
    if run.settled:
        return None
    learned = learned_wait(durations, callback_expected=callback_expected)
    if polls > 0:
        later, why = now + wait_after(policy, run.run_id, polls), PollReason.WAIT
        if run.precedence.ended:
            return NextPoll(later, why)
        if learned is not None and first_seen + learned > now:
            # Until the end is expected in steps from `first_seen`, so that runs started together
            # become due together and share history pages.
            passed = max((now - first_seen) // policy.interval_max, 0)
            put_off = first_seen + min(learned, (passed + 1) * policy.interval_max)
            if put_off > later:
                later, why = put_off, PollReason.LEARNED_WAIT
        return NextPoll(min(later, now + policy.longest_wait), why)
    if run.precedence.ended:
        return NextPoll(now, PollReason.ENDED)
    if at_once:
        return NextPoll(now, PollReason.ASKED)
    if callback_expected:
        why = PollReason.GRACE if learned is None else PollReason.LEARNED_GRACE
    else:
        why = PollReason.INTERVAL if learned is None else PollReason.LEARNED_INTERVAL
    first = first_seen + first_wait(policy, learned, callback_expected=callback_expected)
    # `first_seen` may lie in the future after the clock was set back.
    return NextPoll(min(max(first, now), now + policy.longest_wait), why)


def next_recheck(
    policy: Policy, *, since_end: timedelta, now: datetime, was_answered: bool = True
) -> datetime | None:
    """When to read cost and outputs again, UTC, after a read at `now` that left them incomplete.

    FLORA bills after the end (flora-api.md, 8): the first recheck is `cost_recheck` after it, then
    the wait doubles, and the last is at `cost_give_up`; `None` after that. Only an answer of FLORA
    can be the last: until there is one (`was_answered`), each wait adds an eighth to the time, or
    `cost_give_up` if that is less.
    """
    if since_end >= policy.cost_give_up:
        return None if was_answered else now + min(since_end / 8, policy.cost_give_up)
    first = since_end < policy.cost_recheck
    due = policy.cost_recheck if first else 2 * since_end + policy.cost_recheck
    return now + min(due, policy.cost_give_up) - since_end


def jitter_share(of: str, number: int) -> float:
    """A share from 0 to 1, random but always the same for one id and number."""
    digest = blake2b(f"{of}:{number}".encode(errors="replace"), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32
