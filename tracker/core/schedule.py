"""When to look at a run next: a pure function of the run, the clock and what its technique takes.

A run is looked at because nobody said that it ended. The first look waits for the callback (grace);
where no callback was asked for, one poll interval. Each look that brings nothing doubles the wait,
up to the longest. A callback makes the run due at once. What is known of a technique's durations
moves the first look, by a factor of ten at most, and puts off the ones after it, by the longest
wait at most, until the end may be expected.

Why the defaults stand where they do is told, with the figures, in docs/performance.md.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Final

from tracker.core.run import Run

LEARNED_FROM: Final = 20
"""So many ended runs of a technique are needed before their durations count."""
LEARNED_FACTOR: Final = 10
"""What is learned moves the first look by this factor at most."""
CALLBACK_MARGIN: Final = timedelta(seconds=5)
"""How long a callback may take after the end before its absence means something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The waits that the settings give."""

    grace: timedelta = timedelta(seconds=30)
    interval: timedelta = timedelta(seconds=5)
    interval_max: timedelta = timedelta(seconds=300)
    cost_recheck: timedelta = timedelta(seconds=60)
    cost_give_up: timedelta = timedelta(hours=24)

    @property
    def longest_wait(self) -> timedelta:
        """No poll of an open run lies further ahead than this."""
        return max(self.interval_max, LEARNED_FACTOR * max(self.grace, self.interval))


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """How long a technique's runs took from creation to end, in seconds, over the last `count`."""

    count: int
    p50: float
    p95: float


def first_wait(
    policy: Policy, durations: Durations | None, *, callback_expected: bool
) -> timedelta:
    """How long after its creation a run is first looked at, if nothing is heard of it.

    With a callback on its way the look is for the rare run whose callback is lost, so it waits
    until nearly all runs have ended; without one it is how the end is found, so it waits for the
    median.
    """
    base = policy.grace if callback_expected else policy.interval
    learned = learned_wait(durations, callback_expected=callback_expected)
    if learned is None:
        return base
    return min(max(learned, base / LEARNED_FACTOR), base * LEARNED_FACTOR)


def learned_wait(durations: Durations | None, *, callback_expected: bool) -> timedelta | None:
    """How long after its creation a look is worth its cost; `None` where too little is known."""
    if durations is None or durations.count < LEARNED_FROM:
        return None
    if callback_expected:
        return timedelta(seconds=durations.p95) + CALLBACK_MARGIN
    return timedelta(seconds=durations.p50)


def put_off_until(
    policy: Policy,
    durations: Durations | None,
    *,
    now: datetime,
    first_seen: datetime,
    callback_expected: bool,
) -> datetime | None:
    """Until when looks after the first are put off, UTC; `None` where the end may be expected.

    That is at most the longest wait away, counted from `first_seen`, so that the same runs are put
    off until the same moment and share their pages.
    """
    learned = learned_wait(durations, callback_expected=callback_expected)
    if learned is None or first_seen + learned <= now:
        return None
    passed = max((now - first_seen) // policy.interval_max, 0)
    return first_seen + min(learned, (passed + 1) * policy.interval_max)


def wait_after(policy: Policy, run_id: str, looks: int) -> timedelta:
    """How long to wait after the `looks`-th look (from 1) that brought no end: doubling, capped.

    The jitter takes up to a fifth off, so that runs started together drift apart. It is drawn from
    the run and the count, so that the same question has the same answer.
    """
    return whole_wait(policy, looks) * (1 - 0.2 * _share(run_id, looks))


def whole_wait(policy: Policy, looks: int) -> timedelta:
    """The wait after the `looks`-th look (from 1), before the jitter takes its part."""
    doublings = min(looks - 1, 30)
    wait: timedelta = min(policy.interval * 2**doublings, policy.interval_max)
    return wait


def next_check(
    run: Run,
    *,
    policy: Policy,
    now: datetime,
    first_seen: datetime,
    looks: int,
    callback_expected: bool,
    durations: Durations | None = None,
    at_once: bool = False,
) -> datetime | None:
    """When to read the run next, in UTC; `None` where nothing is left to read.

    `first_seen` is when we first heard of the run, by our clock: FLORA's time of creation is by
    another. `looks` is how many times the API has shown it since the last news, `at_once` whether
    news of another kind (a callback, somebody's request to track it) wants a read now.
    """
    if run.settled:
        return None
    if looks > 0:
        later = now + wait_after(policy, run.run_id, looks)
        if run.standing.ended:
            return later
        put_off = put_off_until(
            policy,
            durations,
            now=now,
            first_seen=first_seen,
            callback_expected=callback_expected,
        )
        return min(max(later, put_off or later), now + policy.longest_wait)
    if at_once or run.standing.ended:
        return now
    first = first_seen + first_wait(policy, durations, callback_expected=callback_expected)
    # A run may have been seen first in what is the future since the clock was set back.
    return min(max(first, now), now + policy.longest_wait)


def next_recheck(policy: Policy, *, since_end: timedelta, now: datetime) -> datetime | None:
    """When to read cost and outputs again, UTC, after a read at `now` that left them open.

    FLORA's bill comes after the end (flora-api.md, 8): `cost_recheck` after it the first time, then
    after waits twice as long each, and a last time at `cost_give_up`. `None` once that has passed.
    """
    if since_end >= policy.cost_give_up:
        return None
    first = since_end < policy.cost_recheck
    due = policy.cost_recheck if first else 2 * since_end + policy.cost_recheck
    return now + min(due, policy.cost_give_up) - since_end


def _share(run_id: str, looks: int) -> float:
    digest = blake2b(f"{run_id}:{looks}".encode(errors="replace"), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32
