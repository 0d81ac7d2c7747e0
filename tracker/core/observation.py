"""Observations: what one source showed of one run at one time.

Start answers, callbacks, polls and history pages all produce observations; `merge` joins them. They
are kept in `run_events` as JSON, so that a run can be merged again from its timeline.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from operator import attrgetter
from typing import Any, Final

from tracker.core.formatting import iso_time
from tracker.core.run import (
    Details,
    Output,
    Precedence,
    RunError,
    RunStatus,
    Status,
    fast_dataclass,
    known,
    status_of,
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
            self.source in _READS
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


_READS: Final = (Source.POLL, Source.HISTORY)
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
    "status": status_of,
    "charged_cost": Decimal,
    "error": lambda error: RunError(error.get("code", ""), error.get("message", "")),
    "outputs": lambda outputs: tuple(Output(*output[:3]) for output in outputs),
}
