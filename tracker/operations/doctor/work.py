"""Whether somebody polls and sweeps: told by what is done, for a process can be there and stuck."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from tracker.core.formatting import duration
from tracker.operations.doctor.finding import Finding, failed, ok, warning
from tracker.store.queries.attention import Gauges, SweepHealth
from tracker.store.queries.sweeps import Unread

AFTER_A_MOMENT: Final = timedelta(minutes=5)
"""How late a sweep may begin, or an overdue run be read, before nobody seems to be at work."""
LATE: Final = timedelta(minutes=10)
"""How much later than it is due a sweep may be complete: a long one takes as long as it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What the database tells of the work.

    `sweeps` are those of one workspace or, for `worker`, of all. `now` is by the clock that the
    tracker goes by; `interval` is the longest time between two sweeps. `sweeping` is true while a
    sweep is under way. `unread` is what of the history FLORA did not let us read.
    """

    now: datetime
    interval: timedelta
    sweeps: Sequence[SweepHealth]
    gauges: Gauges
    sweeping: bool
    unread: Sequence[Unread] = ()


START: Final = (
    "Start `tracker serve` (without --no-worker) or `tracker worker` with the same settings; where "
    "cron runs `tracker poll` and `tracker reconcile`, see its log."
)


def worker(seen: Ledger) -> Finding:
    """Whether somebody is at work: runs are read when they are due, and sweeps begin in time."""
    name: Final = "worker"
    oldest = seen.gauges.oldest_due_at
    waited = timedelta(0) if oldest is None else seen.now - oldest
    begun = max((one.last_started_at for one in seen.sweeps), default=None)
    stuck = (
        "If one is running, its log says what holds it up (poll.flora_down, flora.rate_limited, "
        "worker.database_down)."
    )
    if waited > AFTER_A_MOMENT:
        return failed(
            name,
            f"{seen.gauges.overdue} runs wait to be read, the oldest for {duration(waited)}.",
            f"{START} {stuck}",
        )
    if begun is None:
        return failed(name, "No process has ever polled or swept here.", START)
    since = seen.now - begun
    if since > seen.interval + AFTER_A_MOMENT and not seen.sweeping:
        return failed(
            name,
            f"No sweep has begun for {duration(since)}, and one is due every "
            f"{duration(seen.interval)}.",
            f"{START} {stuck}",
        )
    if seen.gauges.overdue:
        return warning(
            name,
            f"{seen.gauges.overdue} runs wait to be read, the oldest for {duration(waited)}.",
            f"Run the doctor again in some minutes; it should be none then. {stuck}",
        )
    return ok(name, f"No run waits to be read, and a sweep began {duration(since)} ago.")


def sweeps(seen: Ledger, *, workspace: str | None) -> Finding:
    """Whether a workspace's history was swept completely, and when."""
    name: Final = "sweeps"
    one = max(seen.sweeps, key=lambda each: each.last_started_at, default=None)
    now = "`tracker reconcile` makes one now and says what it finds."
    complete = max((each.complete_at for each in seen.sweeps if each.complete_at), default=None)
    since = None if complete is None else seen.now - complete
    error = None if one is None else one.last_error
    words = "none was ever complete"
    if since is not None:
        words = f"the last complete one ended {duration(since)} ago"
    as_sentence = f"{words[0].upper()}{words[1:]}."
    overdue = since is None or since > 3 * seen.interval + LATE
    if error is not None:
        say = failed if overdue else warning
        return say(
            name,
            f"The last sweep failed, and {words}: {error}.",
            f"{_about(error)} {now}",
            workspace=workspace,
        )
    if overdue and seen.sweeping:
        return warning(
            name,
            f"A sweep is under way; {words}.",
            "Wait for its end: a first one goes back TRACKER_HISTORY_SINCE, a hundred runs a page.",
            workspace=workspace,
        )
    if overdue:
        return failed(
            name, as_sentence, f"See to the key and to the worker; {now}", workspace=workspace
        )
    if seen.unread:
        first = seen.unread[0]
        return warning(
            name,
            f"{as_sentence} {len(seen.unread)} stretches of FLORA's history could not be read, the "
            f"newest up to {first.to_at:%Y-%m-%d %H:%M:%S} UTC ({first.run_type} runs): "
            f"{first.error}.",
            "They are tried again by themselves, after growing waits. Runs that were started there "
            "by others are missing until then: `tracker verify` names what is.",
            workspace=workspace,
        )
    if one is not None and one.generations_error is not None:
        return warning(
            name,
            f"{as_sentence} Generations could not be listed: {one.generations_error}.",
            "Technique runs are not affected. See whether the key may list generations.",
            workspace=workspace,
        )
    verified = max((each.through for each in seen.sweeps if each.through), default=None)
    if verified is not None:
        as_sentence += f" Checked against FLORA up to {verified:%Y-%m-%d %H:%M:%S} UTC."
    return ok(name, as_sentence, workspace=workspace)


def _about(error: str) -> str:
    if "FLORA" in error:
        return "If it is a 5xx or a limit it passes; else see to the key."
    return "See to the database."
