"""What is known of a run in plain words: one sight of it, a contradiction, its next look.

Other people's text (error messages, ids) stands in these sentences as it came: whoever shows them
escapes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from tracker.core.next_poll import NextLook, Why
from tracker.core.observation import Observation, Source
from tracker.core.run import Run, RunStatus
from tracker.core.schedule import Durations

_BY: Final = {
    Source.START: "FLORA's answer to our start",
    Source.TRACK: "somebody's word",
    Source.CALLBACK: "a callback",
    Source.POLL: "a read of this run alone",
    Source.HISTORY: "a page of FLORA's history",
}
_FACTS: Final = {
    "run_type": "its type",
    "workspace_id": "its workspace",
    "project_id": "its project",
    "technique_id": "its technique",
    "technique_name": "its technique's name",
    "poll_url": "where it is read",
    "created_at": "when it was created",
    "started_at": "when it began",
}


class Kind(StrEnum):
    """What a sentence is about."""

    START = "start"
    SIGHT = "sight"
    CONFLICT = "conflict"
    DELIVERY = "delivery"
    CALLBACK = "callback"
    CHECKS = "checks"
    STATE = "state"
    CLAIM = "claim"
    TROUBLE = "trouble"
    NEXT = "next"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One thing to tell. `at` is when it happened, UTC; `None` for how things stand now.

    `text` holds other people's words, unescaped.
    """

    kind: Kind
    text: str
    at: datetime | None = None
    source: Source | None = None


def by(source: Source) -> str:
    """Who brought the news."""
    return _BY[source]


def moment(at: datetime) -> str:
    """A moment in UTC, to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def span(length: timedelta) -> str:
    """A length of time in the two units that say most about it."""
    seconds = abs(length.total_seconds())
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    for name, size, small, unit in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            rest = whole % size // unit
            return f"{whole // size} {name}" + (f" {rest} {small}" if rest else "")
    rest = whole % 60
    return f"{whole // 60} min" + (f" {rest} s" if rest else "")


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def state(seen: Observation) -> str:
    """The state that a sight showed: with its progress while it runs, with its error if it
    failed."""
    words = str(seen.status)
    if not seen.standing.ended and seen.progress:
        words += f" at {seen.progress:g} %"
    if seen.standing.ended and seen.error is not None:
        parts = [part for part in (seen.error.code, seen.error.message) if part]
        words += f" ({': '.join(parts)})" if parts else ""
    return words


def news(seen: Observation, before: Run | None, after: Run) -> list[str]:
    """What a sight added to what was known, in sentences."""
    said = []
    if before is not None and seen.standing < before.standing:
        known = f"the run was known to be {before.status} already, and stays so."
        same = seen.status == before.status
        said.append("Its end was known already." if same else f"That is older news: {known}")
    found = _details(seen, before, after)
    if found:
        said.append(f"It brought {_listed(found)}.")
    elif before is not None and seen.standing <= before.standing and not said:
        facts = [
            words for name, words in _FACTS.items() if getattr(before, name) != getattr(after, name)
        ]
        if facts:
            said.append(f"New was {_listed(facts)}.")
    was_settled = before is not None and before.settled
    if after.settled and not was_settled:
        said.append("With that its end and its details are known: it is settled.")
    elif was_settled and not after.settled:
        said.append("So it is not settled any more: its details have to be read again.")
    elif seen.standing.ended and not after.settled:
        said.append("Outputs, cost and times are not in this: they are still to be read.")
    return said


def contradiction(seen: Observation, earlier: Sequence[Observation], after: Run) -> str:
    """Both sights of a contradiction about the end, and which of them stands.

    `earlier` are the sights before it, oldest first.
    """
    ends = [one for one in earlier if one.standing.ended]
    against = [one for one in ends if one.status != seen.status]
    if against:
        other = against[-1]
        return (
            f"Two sights contradict each other: {by(other.source)} at {moment(other.at)} said "
            f"{state(other)}, {by(seen.source)} says {state(seen)}. "
            f"What stands is {after.status}: {_why_it_stands(seen, other)}."
        )
    for other in reversed([one for one in ends if one.standing == seen.standing]):
        if parts := _differences(other, seen):
            return (
                f"Two sights of the same end differ: {by(other.source)} at {moment(other.at)} and "
                f"{by(seen.source)} disagree on {_listed(parts)}."
            )
    return f"This sight ({state(seen)}) contradicts an earlier one."


def next_sentence(look: NextLook, now: datetime) -> str:
    """When the run is looked at next, and why then."""
    if look.at is None:
        if look.why is Why.SETTLED:
            return "It is not looked at again: nothing is left to read."
        return "It is not polled again, unless something shows that it exists after all."
    when = f"at {moment(look.at)}" if look.at > now else f"now (since {moment(look.at)})"
    return f"The next look is due {when}, {_reason(look)}."


def _reason(look: NextLook) -> str:
    wait = span(look.wait or timedelta())
    known = look.durations
    match look.why:
        case Why.GRACE:
            return f"{wait} after it was first heard of: so long its callback is waited for"
        case Why.INTERVAL:
            return (
                f"{wait} after it was first heard of: no callback is on its way, as far as is "
                "known here, so it is polled"
            )
        case Why.LEARNED_GRACE if known is not None:
            return f"{wait} after it was first heard of: {_nearly_all(known)}{_bounded(look)}"
        case Why.LEARNED_INTERVAL if known is not None:
            return f"{wait} after it was first heard of: {_half(known)}{_bounded(look)}"
        case Why.LEARNED_WAIT if known is not None:
            learned = _nearly_all(known) if look.callback_expected else _half(known)
            until = "the longest wait is over" if look.bounded else "then"
            return (
                f"{wait} after it was first heard of: {learned}, and after a look that brought no "
                f"end none is worth its cost until {until}"
            )
        case Why.WAIT:
            looks = counted(look.number or 1, "look has", "looks in a row have")
            less = look.jitter or timedelta()
            return (
                f"{wait} after the last look: {looks} brought no end, and each doubles the wait up "
                f"to the longest; {span(less)} were taken off, so that runs drift apart"
            )
        case Why.LOST:
            return "as FLORA does not know it: it is read once a day, should FLORA be wrong"
        case Why.ENDED:
            return "at once: it has ended, and its details have not been read"
        case Why.ASKED:
            return "at once: somebody asked for it, or a callback told of it"
    return (
        f"{wait} after it was first heard of: that was decided under other settings, or by other "
        "durations than are known now"
    )


def _nearly_all(known: Durations) -> str:
    return (
        f"95 of 100 runs of its technique end within {span(timedelta(seconds=known.p95))} (learned "
        f"from {counted(known.count, 'run')}), and a callback takes a moment more"
    )


def _half(known: Durations) -> str:
    return (
        f"half of the runs of its technique end within {span(timedelta(seconds=known.p50))} "
        f"(learned from {counted(known.count, 'run')})"
    )


def _bounded(look: NextLook) -> str:
    return "; what is learned moves a look by a factor of ten at most" if look.bounded else ""


def _details(seen: Observation, before: Run | None, after: Run) -> list[str]:
    """The details of an end that a sight brought."""
    found = []
    old = before or Run(run_id=after.run_id)
    if after.outputs and after.outputs != old.outputs:
        found.append(counted(len(after.outputs), "output"))
    if after.charged_cost is not None and after.charged_cost != old.charged_cost:
        found.append(f"a cost of {after.charged_cost:f} USD")
    elif after.charged_cost is None and old.charged_cost is not None:
        found.append("a refund: it costs nothing")
    if after.completed_at is not None and after.completed_at != old.completed_at:
        end = f"its end at {moment(after.completed_at)}"
        if after.created_at is not None:
            end += f" (it took {span(after.completed_at - after.created_at)})"
        found.append(end)
    if after.error is not None and after.error != old.error and seen.status is not RunStatus.FAILED:
        found.append("its error")
    return found


def _differences(one: Observation, other: Observation) -> list[str]:
    found = []
    if one.error and other.error and one.error.code != other.error.code:
        found.append(f"the error ({one.error.code} and {other.error.code})")
    if one.outputs and other.outputs and one.outputs != other.outputs:
        found.append("the outputs")
    return found


def _why_it_stands(one: Observation, other: Observation) -> str:
    if one.standing.ended_at_api != other.standing.ended_at_api:
        return "the API's word replaces a callback's"
    return "between two words of equal weight, completed counts"


def _listed(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
