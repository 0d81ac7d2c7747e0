"""Observations (what one source showed of one run at one time), and how they become a run.

Start answers, callbacks, polls and history pages all produce observations. They are kept in
`run_events` as JSON, so that a run can be merged again from its timeline.

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

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from operator import attrgetter
from typing import Any, Final

from tracker.core.formatting import iso_time
from tracker.core.run import (
    LISTED,
    READ,
    WORKSPACE_KNOWN,
    Details,
    Output,
    Precedence,
    Precedences,
    RunError,
    RunState,
    RunStatus,
    Status,
    fast_dataclass,
    known,
)


class Source(StrEnum):
    """Where an observation comes from."""

    START = "start"
    """FLORA's answer to our own start."""
    TRACK = "track"
    """A request to track a run; only its ids are believed."""
    CALLBACK = "callback"
    """A verified callback: the end, without details."""
    POLL = "poll"
    """A read of this one run."""
    HISTORY = "history"
    """An item of a history page."""


API_READS: Final = (Source.POLL, Source.HISTORY)
"""Sources that show the current state of a run."""


@fast_dataclass
class Observation:
    """One observation. `None` means "not shown", never "empty".

    `at` is when it was received, `sent_at` when its request was sent, both in the database's time;
    `sent_at` decides which cost and outputs are the latest. Times are aware UTC. `charged_cost` is
    FLORA's field in USD: a quote or the bill. `clock_skew` is how many seconds FLORA's clock was
    ahead, if the clocks differed. `lacks_status` is true for a list item without one: it shows that
    the run exists, and its `status` says nothing. `source` is a text where a newer version stored
    one that this version does not know.
    """

    run_id: str
    source: Source | str
    at: datetime
    status: Status = RunStatus.PENDING
    progress: float | None = None
    run_type: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    technique_id: str | None = None
    technique_name: str | None = None
    poll_url: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    charged_cost: Decimal | None = None
    error: RunError | None = None
    outputs: tuple[Output, ...] | None = None
    sent_at: datetime | None = None
    clock_skew: float | None = None
    lacks_status: bool | None = None

    @property
    def read_at(self) -> datetime:
        """When the request was sent; if unknown, when the answer was received."""
        return self.sent_at or self.at

    @property
    def shows_bill(self) -> bool:
        """Whether `charged_cost` is the bill: it is on an API read of the ended run.

        Start answers and runs in progress show a quote (flora-api.md, 8). A failed run without a
        cost is billed nothing; a completed run without a cost is not billed yet.
        """
        return (
            self.source in API_READS
            and self.precedence.ended
            and (self.charged_cost is not None or self.status is RunStatus.FAILED)
        )

    @property
    def precedence(self) -> Precedence:
        """The precedence of this observation. An unknown status with `completed_at` is an end."""
        if self.source is Source.CALLBACK:
            return _BY_CALLBACK[self.status]
        unknown = Precedence.RUNNING if self.completed_at is None else Precedence.FAILED
        return _BY_API.get(self.status, unknown)

    @property
    def may_have_ended(self) -> bool:
        return self.precedence.ended or bool(self.lacks_status)

    @property
    def unknown_status(self) -> str | None:
        return None if self.status in _BY_API else self.status

    @property
    def details(self) -> Details:
        """Whether this observation alone has the details of an ended run."""
        if not self.precedence.ended_at_api:
            return Details.UNKNOWN
        if self.source is Source.POLL:
            return Details.READ
        whole = bool(self.outputs) and self.charged_cost is not None
        return Details.LISTED if self.status is RunStatus.FAILED or whole else Details.UNKNOWN

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without `None`; `from_json` reads it back."""
        return {
            name: value if form is None else form(value)
            for (name, form), value in zip(_FORMS, _VALUES(self), strict=True)
            if value is not None
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Observation":
        """The inverse of `to_json`, without the fields that only a newer version knows. Raises
        `KeyError`, `TypeError` or `ValueError` for other input."""
        return cls(
            **{
                name: _FROM_JSON[name](value) if name in _FROM_JSON else value
                for name, value in values.items()
                if name in _NAMES
            }
        )


_BY_API: Final[dict[Status, Precedence]] = {one: Precedence[one.name] for one in RunStatus}
_BY_CALLBACK: Final = _BY_API | {
    RunStatus.FAILED: Precedence.CALLBACK_FAILED,
    RunStatus.COMPLETED: Precedence.CALLBACK_COMPLETED,
}


_TIMES: Final = ("at", "created_at", "started_at", "completed_at", "sent_at")
_TO_JSON: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(_TIMES, iso_time),
    **dict.fromkeys(("source", "status", "charged_cost"), str),
    "error": lambda error: {"code": error.code, "message": error.message},
    "outputs": lambda outputs: [[o.output_id, o.type, o.url] for o in outputs],
}
_FORMS: Final = tuple((field.name, _TO_JSON.get(field.name)) for field in fields(Observation))
_NAMES: Final = frozenset(name for name, _ in _FORMS)
_VALUES: Final = attrgetter(*(name for name, _ in _FORMS))
_FROM_JSON: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(_TIMES, lambda text: datetime.fromisoformat(text).astimezone(UTC)),
    "source": lambda text: known(Source, text),
    "status": lambda text: known(RunStatus, text),
    "charged_cost": Decimal,
    "error": lambda error: RunError(error.get("code", ""), error.get("message", "")),
    "outputs": lambda outputs: tuple(Output(*output[:3]) for output in outputs),
}


_BY_PRECEDENCE: Final = tuple(
    name for name in Precedences._fields if name not in ("charged_cost", "outputs")
)
_SHOWN: Final = attrgetter(*_BY_PRECEDENCE)
_CLAIMS: Final = (Source.CALLBACK, Source.TRACK)
"""Sources whose `workspace_id` is not confirmed by the workspace's key."""
_NEVER: Final = datetime.min.replace(tzinfo=UTC)
# `replace` would determine the fields each time, and take three times as long.
_RUN_FIELDS: Final = tuple(field.name for field in fields(RunState))
_RUN_VALUES: Final = attrgetter(*_RUN_FIELDS)


def merge(run: RunState | None, observation: Observation) -> RunState:
    """`run` with one more observation; `run` itself if that changes nothing.

    `run` is `None` for an unknown run. Raises `ValueError` if the ids differ.
    """
    if run is None:
        run = RunState(run_id=observation.run_id)
    elif run.run_id != observation.run_id:
        raise ValueError(f"cannot merge an observation of {observation.run_id} into {run.run_id}")
    precedence = observation.precedence
    top, unknown = max(run.precedence, precedence), None
    if run.unknown_status is not None or observation.unknown_status is not None:
        top, unknown = max(
            (run.precedence, run.unknown_status),
            (precedence, observation.unknown_status),
            key=_by_height,
        )
    conflict = run.conflict or (
        run.precedence.ended and precedence.ended and run.status != observation.status
    )
    # The reference's examples carry error fields even on pending runs.
    has_failed = precedence.ended and observation.status is not RunStatus.COMPLETED
    new: dict[str, Any] = {}
    precedences: dict[str, int] = {}
    for name, value in zip(_BY_PRECEDENCE, _SHOWN(observation), strict=True):
        if value is None:
            continue
        if name == "error" and not has_failed:
            continue
        its_precedence: int = precedence
        if name == "workspace_id" and observation.source not in _CLAIMS:
            its_precedence = WORKSPACE_KNOWN
        known = getattr(run, name)
        if known is not None:
            known_precedence = getattr(run.precedences, name)
            if name == "error" and known_precedence == precedence and precedence.ended_at_api:
                conflict = conflict or known.code != value.code
            if (known_precedence, known) >= (its_precedence, value):
                continue
        new[name], precedences[name] = value, its_precedence
    if top is Precedence.COMPLETED:
        new["error"], precedences["error"] = None, 0
    if observation.charged_cost is not None or observation.status is RunStatus.FAILED:
        _merge_cost(run, observation, new, precedences)
    if observation.outputs:
        _merge_outputs(run, observation, observation.outputs, new, precedences)
    new |= {
        "precedence": top,
        "unknown_status": unknown,
        "details": _merged_details(run, observation),
        "progress": max(run.progress, observation.progress or 0),
        "conflict": conflict,
    }
    if precedences:
        new["precedences"] = run.precedences._replace(**precedences)
    if all(getattr(run, name) == value for name, value in new.items()):
        return run
    return RunState(**dict(zip(_RUN_FIELDS, _RUN_VALUES(run), strict=True)) | new)


def shows_the_same(run: RunState, other: RunState, *, signed: bool = False) -> bool:
    """Whether two states of a run differ only in when cost and outputs were last read; if `signed`
    also in the queries of links, whose signatures may be new with each read."""
    outputs = other.outputs
    if signed and _without_queries(run) == _without_queries(other):
        outputs = run.outputs
    return run == replace(
        other,
        cost_read_at=run.cost_read_at,
        outputs=outputs,
        outputs_read_at=run.outputs_read_at,
        precedences=other.precedences._replace(
            charged_cost=run.precedences.charged_cost, outputs=run.precedences.outputs
        ),
    )


def _without_queries(run: RunState) -> list[tuple[str, str, str]]:
    return [
        (one.output_id, one.type, one.url if one.type == "text" else one.url.partition("?")[0])
        for one in run.outputs or ()
    ]


def _merge_cost(
    run: RunState, observation: Observation, new: dict[str, Any], precedences: dict[str, int]
) -> None:
    cost = observation.charged_cost
    if not observation.shows_bill:
        if cost is not None and (run.quoted_cost is None or cost > run.quoted_cost):
            new["quoted_cost"] = cost
        return
    known = (
        run.cost_read_at or _NEVER,
        run.precedences.charged_cost,
        *_comparable(run.charged_cost),
    )
    precedence = _of_a_read(observation)
    if (observation.read_at, precedence, *_comparable(cost)) > known:
        new |= {"charged_cost": cost, "cost_read_at": observation.read_at}
        precedences["charged_cost"] = precedence


def _of_a_read(observation: Observation) -> int:
    return READ if observation.source is Source.POLL else LISTED


def _comparable(cost: Decimal | None) -> tuple[bool, Decimal]:
    return (cost is not None, cost or Decimal(0))


def _merge_outputs(
    run: RunState,
    observation: Observation,
    outputs: tuple[Output, ...],
    new: dict[str, Any],
    precedences: dict[str, int],
) -> None:
    read_at, precedence = None, int(observation.precedence)
    if observation.precedence.ended_at_api:
        read_at, precedence = observation.read_at, _of_a_read(observation)
    known = (run.outputs_read_at or _NEVER, run.precedences.outputs, run.outputs or ())
    if (read_at or _NEVER, precedence, outputs) > known:
        new |= {"outputs": outputs, "outputs_read_at": read_at}
        precedences["outputs"] = precedence


def _by_height(status: tuple[Precedence, str | None]) -> tuple[Precedence, bool, str]:
    precedence, unknown = status
    return (precedence, unknown is None, unknown or "")


def _merged_details(run: RunState, observation: Observation) -> Details:
    """A single read settles the run; a list item settles only the end that it shows."""
    known, shown = run.details, observation.details
    if Details.READ in (known, shown):
        return Details.READ
    if run.precedence == observation.precedence:
        return max(known, shown)
    return known if run.precedence > observation.precedence else shown
