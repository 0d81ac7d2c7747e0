"""`merge`: how observations become a run.

`merge` is a join: for any set of observations, contradictory ones too, the result depends neither
on their order nor on repetition. So a late, repeated or stale observation is harmless.

* Status is a maximum: pending < running < ended by callback < ended by the API. Between two ends of
  one precedence completed beats failed. An unknown status counts as running, or
  with `completed_at` as failed, just below these; of two unknown ones the greater text counts.
* Each field is a maximum of (precedence of the observation, value). An observation that does not
  show a field leaves it alone, so no known value is removed.
* `workspace_id` has the highest precedence when FLORA shows it to the workspace's own key. What a
  callback or `track` says is a claim below it.
* Cost and outputs of an ended run change afterwards, down as well as up. They are maxima of (when
  the read was sent, single read above list, value): the latest counts. The time is part of the
  observation, in the database's time, so that neither order nor hosts matter. A failed run without
  a cost has the cost "none".
* `quoted_cost` is the greatest quote; a different bill is no contradiction.
* `progress` is a maximum, `conflict` an "or": two ends differ in status or error code.
* A run that the API reports as completed has no error. That keeps the join, because nothing has a
  higher precedence.
"""

from dataclasses import fields
from datetime import UTC, datetime
from decimal import Decimal
from operator import attrgetter
from typing import Any, Final

from tracker.core.observation import Observation, Source
from tracker.core.run import (
    LISTED,
    MERGED_FIELDS,
    READ,
    WORKSPACE_KNOWN,
    Details,
    Output,
    Precedence,
    Run,
    RunError,
    RunStatus,
)

_DIGIT: Final = {name: 3 * position for position, name in enumerate(MERGED_FIELDS)}
_LATEST: Final = ("charged_cost", "outputs")
"""Fields for which the latest read counts."""
_PLACES: Final = tuple(item for item in _DIGIT.items() if item[0] not in _LATEST)
_CLAIMS: Final = (Source.CALLBACK, Source.TRACK)
"""Sources whose `workspace_id` is not confirmed by the workspace's key."""
_SHOWN: Final = attrgetter(*(name for name, _ in _PLACES))
_NEVER: Final = datetime.min.replace(tzinfo=UTC)
_READ_TIMES: Final = ("cost_read_at", "outputs_read_at", "precedences")
# `replace` would determine the fields each time, and take three times as long.
_FIELDS: Final = tuple(field.name for field in fields(Run))
_VALUES: Final = attrgetter(*_FIELDS)


def merge(run: Run | None, seen: Observation) -> Run:
    """`run` with one more observation; `run` itself if that changes nothing.

    `run` is `None` for an unknown run. Raises `ValueError` if the ids differ.
    """
    if run is None:
        run = Run(run_id=seen.run_id)
    elif run.run_id != seen.run_id:
        raise ValueError(f"cannot merge an observation of {seen.run_id} into {run.run_id}")
    news: dict[str, Any] = {}
    precedence = seen.precedence
    conflict = run.conflict or (
        run.precedence.ended and precedence.ended and run.status != seen.status
    )
    precedences = run.precedences
    for (name, digit), theirs in zip(_PLACES, _SHOWN(seen), strict=True):
        if theirs is None:
            continue
        if name == "error" and (
            # The reference's examples carry error fields even on pending runs.
            not precedence.ended or seen.status is RunStatus.COMPLETED or theirs == RunError()
        ):
            continue
        weight: int = precedence
        if name == "workspace_id" and seen.source not in _CLAIMS:
            weight = WORKSPACE_KNOWN
        ours = getattr(run, name)
        if ours is not None:
            our_rank = precedences >> digit & 0o7
            if our_rank == precedence and ours != theirs and precedence.ended_at_api:
                # Times may differ in resolution (seconds, milliseconds): no conflict.
                conflict = conflict or (name == "error" and ours.code != theirs.code)
            if (our_rank, ours) >= (weight, theirs):
                continue
        if ours != theirs:
            news[name] = theirs
        precedences = precedences & ~(0o7 << digit) | weight << digit

    if seen.charged_cost is not None or seen.status is RunStatus.FAILED:
        precedences = _join_cost(run, seen, precedences, news)
    if seen.outputs:
        precedences = _join_outputs(run, seen, seen.outputs, precedences, news)
    details = _joined_details(run, seen)
    top, unknown = max(run.precedence, precedence), None
    if run.unknown_status is not None or seen.unknown_status is not None:
        top, unknown = max(
            (run.precedence, run.unknown_status), (precedence, seen.unknown_status), key=_by_height
        )
    if top is Precedence.COMPLETED:
        news.pop("error", None)
        if run.error is not None:
            news["error"] = None
        precedences &= ~(0o7 << _DIGIT["error"])
    progress = run.progress if seen.progress is None else max(run.progress, seen.progress)
    if (
        not news
        and (top, unknown) == (run.precedence, run.unknown_status)
        and (details, progress) == (run.details, run.progress)
        and (conflict, precedences) == (run.conflict, run.precedences)
    ):
        return run
    news |= {
        "precedence": top,
        "unknown_status": unknown,
        "details": details,
        "progress": progress,
        "conflict": conflict,
        "precedences": precedences,
    }
    return Run(**dict(zip(_FIELDS, _VALUES(run), strict=True)) | news)


def shown_before_the_end(precedences: int) -> bool:
    """Whether the `charged_cost` with these precedences was shown before the run ended."""
    return precedences >> _DIGIT["charged_cost"] & 0o7 < Precedence.FAILED


def shows_the_same(run: Run, other: Run) -> bool:
    """Whether two states of a run differ only in when cost and outputs were last read."""
    others = ~(0o7 << _DIGIT["charged_cost"] | 0o7 << _DIGIT["outputs"])
    return run.precedences & others == other.precedences & others and all(
        ours == theirs
        for name, ours, theirs in zip(_FIELDS, _VALUES(run), _VALUES(other), strict=True)
        if name not in _READ_TIMES
    )


def _join_cost(run: Run, seen: Observation, precedences: int, news: dict[str, Any]) -> int:
    """Merge the quote or the bill; returns the precedences."""
    cost = seen.charged_cost
    if not seen.shows_bill:
        if cost is not None and (run.quoted_cost is None or cost > run.quoted_cost):
            news["quoted_cost"] = cost
        return precedences
    place = _DIGIT["charged_cost"]
    known = run.charged_cost
    digit = READ if seen.source is Source.POLL else LISTED
    ours = (run.cost_read_at or _NEVER, precedences >> place & 0o7, *_comparable(known))
    if ours >= (seen.read_at, digit, *_comparable(cost)):
        return precedences
    news |= {"charged_cost": cost, "cost_read_at": seen.read_at}
    return precedences & ~(0o7 << place) | digit << place


def _comparable(cost: Decimal | None) -> tuple[bool, Decimal]:
    return (cost is not None, cost or Decimal(0))


def _join_outputs(
    run: Run, seen: Observation, theirs: tuple[Output, ...], precedences: int, news: dict[str, Any]
) -> int:
    """Merge the outputs; returns the precedences."""
    place = _DIGIT["outputs"]
    ours, our_digit = run.outputs, precedences >> place & 0o7
    digit: int = seen.precedence
    read_at = _NEVER
    if seen.precedence.ended_at_api:
        read_at = seen.read_at
        digit = READ if seen.source is Source.POLL else LISTED
    if ours is not None and (run.outputs_read_at or _NEVER, our_digit, ours) >= (
        read_at,
        digit,
        theirs,
    ):
        return precedences
    if ours != theirs:
        news["outputs"] = theirs
    if read_at is not _NEVER:
        news["outputs_read_at"] = read_at
    return precedences & ~(0o7 << place) | digit << place


def _by_height(status: tuple[Precedence, str | None]) -> tuple[Precedence, bool, str]:
    precedence, unknown = status
    return (precedence, unknown is None, unknown or "")


def _joined_details(run: Run, seen: Observation) -> Details:
    """A single read settles the run; a list item settles only the end that it shows."""
    ours, theirs = run.details, seen.details
    if Details.READ in (ours, theirs):
        return Details.READ
    if run.precedence == seen.precedence:
        return max(ours, theirs)
    return ours if run.precedence > seen.precedence else theirs
