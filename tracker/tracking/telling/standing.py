"""How things stand with a run now: its callback, its checks, who works on it, what comes next."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from tracker.core.next_poll import NextLook
from tracker.core.observation import Source
from tracker.core.record import LOST_AFTER, LOST_AFTER_READS, Record
from tracker.core.run import Tracking
from tracker.core.schedule import Policy
from tracker.tracking.telling import words
from tracker.tracking.telling.words import Kind, Sentence

OVERDUE: Final = timedelta(seconds=30)
"""A run that is due for so long is read by nobody: a worker that runs looks within half of it."""


def standing(
    record: Record,
    look: NextLook,
    obstacles: Sequence[str],
    *,
    policy: Policy,
    now: datetime,
) -> list[Sentence]:
    """All of it; the next look comes last. `obstacles` says what keeps the run from being read."""
    return [
        *_callback(record, policy, now),
        *_checks(record),
        *_state(record),
        *(Sentence(kind=Kind.TROUBLE, text=text) for text in obstacles),
        *_claim(record, look, now),
        Sentence(kind=Kind.NEXT, text=words.next_sentence(look, now)),
    ]


def _callback(record: Record, policy: Policy, now: datetime) -> list[Sentence]:
    """Whether its callback came, and how late."""
    run = record.run
    if record.callback_at is not None:
        text = f"Its callback came{_lag(record, policy)}."
        seen = record.end_seen_at
        if record.ended_via is not Source.CALLBACK and seen is not None:
            text += f" By then its end had been known for {words.span(record.callback_at - seen)}."
    elif not record.callback_expected:
        if record.source is not Source.START:
            return []
        text = "No callback was asked for when it was started."
    elif run.standing.ended:
        text = "A callback was asked for, but none has come; its end was found without it."
    elif now > record.first_seen_at + policy.grace:
        waited = words.span(now - record.first_seen_at)
        text = f"A callback was asked for and has not come for {waited}, so it is looked for."
    else:
        text = "A callback was asked for and is waited for."
    return [Sentence(kind=Kind.CALLBACK, text=text, source=Source.CALLBACK)]


def _lag(record: Record, policy: Policy) -> str:
    """How long after the run's end the callback came, by the clocks of both sides."""
    came, end = record.callback_at, record.run.completed_at
    if came is None or end is None:
        return ""
    if came < end:
        return f" {words.span(end - came)} before its end, as the two clocks tell it"
    return f" {words.span(came - end)} after its end{', late' if came - end > policy.grace else ''}"


def _checks(record: Record) -> list[Sentence]:
    told = []
    if record.checks:
        requests = words.counted(record.checks, "request was", "requests were")
        text = f"{requests} made for this run alone; one that showed nothing new is only counted."
        told.append(Sentence(kind=Kind.CHECKS, text=text, source=Source.POLL))
    if record.last_error is not None and not record.run.settled:
        text = f"The last look failed: {record.last_error.rstrip('.')}."
        told.append(Sentence(kind=Kind.TROUBLE, text=text, source=Source.POLL))
    return told


def _state(record: Record) -> list[Sentence]:
    """How the tracker stands to it."""
    run = record.run
    if record.tracking is Tracking.SETTLED:
        first = (
            ""
            if record.ended_via is None
            else f" Its end was first told by {words.by(record.ended_via)}."
        )
        text = f"It is settled: {run.status}, with all its details.{first}{_bill(record)}"
        return [Sentence(kind=Kind.STATE, text=text)]
    told = []
    if record.missing and record.missing_since is not None:
        reads = words.counted(record.missing, "time")
        since = words.moment(record.missing_since)
        text = f"FLORA has answered {reads} since {since} that there is no such run."
        if record.lost:
            text += " So it counts as lost, until anything shows it."
        else:
            limit = f"{LOST_AFTER_READS} over at least {words.span(LOST_AFTER)}"
            text += f" After {limit} it counts as lost."
        told.append(Sentence(kind=Kind.STATE, text=text, source=Source.POLL))
    if run.standing.ended and record.ended_via is not None:
        text = (
            f"It has ended ({run.status}, as {words.by(record.ended_via)} told first), but its "
            "details (outputs, cost, times) have not been read yet."
        )
        told.append(Sentence(kind=Kind.STATE, text=text))
    return told


def _bill(record: Record) -> str:
    """What is still to come of cost and outputs."""
    wanted = [] if record.cost_final else ["cost"]
    wanted += ["outputs"] if record.run.lacks_outputs else []
    if record.recheck_at is not None:
        what = f"{' and '.join(wanted) or 'refund'} {'are' if 'outputs' in wanted else 'is'}"
        return f" Its {what} read again at {words.moment(record.recheck_at)}."
    if record.run.charged_cost is None and not record.cost_final:
        return " FLORA has not told what it cost, and is not asked again."
    return ""


def _claim(record: Record, look: NextLook, now: datetime) -> list[Sentence]:
    """Who reads it now, or that nobody does although it is time."""
    if record.lease_until is not None and record.lease_until > now:
        text = (
            f"A worker ({record.lease_holder}) is reading it now; its claim runs out at "
            f"{words.moment(record.lease_until)}."
        )
        return [Sentence(kind=Kind.CLAIM, text=text)]
    if look.at is None or now - look.at <= OVERDUE:
        return []
    text = (
        f"It has been due for {words.span(now - look.at)}: as it seems nobody polls. "
        "`tracker serve` and `tracker worker` do, `tracker poll` does once."
    )
    return [Sentence(kind=Kind.TROUBLE, text=text)]
