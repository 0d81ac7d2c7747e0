"""The one rule by which sights become a run.

`merge` is a join: for any set of observations, contradictory ones too, the result depends neither
on their order nor on how often each was seen. So a late, repeated or stale observation is harmless,
and nothing here needs a timestamp to decide who is right.

How it comes about:

* `standing` is a maximum: pending < running < ended as a callback says < ended as the API says, and
  between two ends of equal rank completed beats failed.
* Each register is a maximum too, of (standing of the sight, canonical order of the value). A sight
  that does not show a fact says nothing about it, so nothing known is ever emptied.
* `progress` is a maximum, `conflict` an "or".
* A run that the API calls completed has no error: a callback's or an earlier sight's is dropped.
  That keeps the join, because nothing stands above `Standing.COMPLETED`.
"""

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final
from urllib.parse import urlsplit

from tracker.core.observation import Observation
from tracker.core.run import REGISTERS, Details, Output, Run, RunError, RunStatus, Standing

_DIGIT: Final = {name: 3 * position for position, name in enumerate(REGISTERS)}
_PLACES: Final = tuple(_DIGIT.items())
_SHOWN: Final = attrgetter(*REGISTERS)
# `replace` would look the fields up each time, and take three times as long.
_FIELDS: Final = tuple(field.name for field in fields(Run))
_VALUES: Final = attrgetter(*_FIELDS)


def rank(run: Run, register: str) -> Standing:
    """The standing of the sight from which `run` has the value of `register`."""
    return Standing(run.ranks >> _DIGIT[register] & 0o7)


def merge(run: Run | None, seen: Observation) -> Run:
    """Join one observation into what is known. Returns `run` itself where it says nothing new.

    `run` is `None` for a run never heard of. Raises `ValueError` where the two are not the same
    run.
    """
    if run is None:
        run = Run(run_id=seen.run_id)
    elif run.run_id != seen.run_id:
        raise ValueError(f"cannot merge a sight of {seen.run_id} into {run.run_id}")
    news: dict[str, Any] = {}
    standing = seen.standing
    conflict = run.conflict or (
        run.standing.ended and standing.ended and run.status is not standing.status
    )
    ranks = run.ranks
    for (name, digit), theirs in zip(_PLACES, _SHOWN(seen), strict=True):
        if theirs is None or _says_nothing(seen, name, theirs):
            continue
        ours = getattr(run, name)
        if ours is not None:
            our_rank = ranks >> digit & 0o7
            if our_rank == standing and ours != theirs and standing.ended_at_api:
                conflict = conflict or _contradict(name, ours, theirs)
            if (our_rank, ours) >= (standing, theirs):
                continue
        if ours != theirs:
            news[name] = theirs
        ranks = ranks & ~(0o7 << digit) | standing << digit

    details = _joined_details(run, seen)
    top = max(run.standing, standing)
    if top is Standing.COMPLETED:
        news.pop("error", None)
        if run.error is not None:
            news["error"] = None
        ranks &= ~(0o7 << _DIGIT["error"])
    progress = run.progress if seen.progress is None else max(run.progress, seen.progress)
    if (
        not news
        and (top, details, progress) == (run.standing, run.details, run.progress)
        and (conflict, ranks) == (run.conflict, run.ranks)
    ):
        return run
    news |= {
        "standing": top,
        "details": details,
        "progress": progress,
        "conflict": conflict,
        "ranks": ranks,
    }
    return Run(**dict(zip(_FIELDS, _VALUES(run), strict=True)) | news)


def _says_nothing(seen: Observation, register: str, value: Any) -> bool:
    """Whether what this sight shows in a register means nothing."""
    if register == "outputs":
        return not value  # it may mean that the details were left out: never an end of outputs
    if register == "error":
        # The reference's examples carry error fields even on pending runs.
        return seen.status is not RunStatus.FAILED or value == RunError()
    return False


def _joined_details(run: Run, seen: Observation) -> Details:
    """A single read settles for good; a listing settles only the end that it shows."""
    ours, theirs = run.details, seen.details
    if Details.READ in (ours, theirs):
        return Details.READ
    if run.standing == seen.standing:
        return max(ours, theirs)
    return ours if run.standing > seen.standing else theirs


def _same_links(ours: tuple[Output, ...], theirs: tuple[Output, ...]) -> bool:
    """Whether two sights show the same outputs, links signed anew (another query) apart."""
    return [_bare(output) for output in ours] == [_bare(output) for output in theirs]


def _bare(output: Output) -> tuple[str, str, str]:
    if output.type == "text":
        return (output.output_id, output.type, output.url)
    try:
        parts = urlsplit(output.url)
    except ValueError:  # foreign text: whatever it is, it is compared as it stands
        return (output.output_id, output.type, output.url)
    return (output.output_id, output.type, parts._replace(query="", fragment="").geturl())


_DISAGREE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "charged_cost": lambda ours, theirs: ours != theirs,
    "error": lambda ours, theirs: ours.code != theirs.code,
    "outputs": lambda ours, theirs: not _same_links(ours, theirs),
}
"""Which registers belong to the end, so that two equal ranks that differ are a conflict. Times do
not: FLORA may give them in seconds here and in milliseconds there, and the finer one is the
greater."""


def _contradict(register: str, ours: Any, theirs: Any) -> bool:
    disagree = _DISAGREE.get(register)
    return disagree is not None and disagree(ours, theirs)
