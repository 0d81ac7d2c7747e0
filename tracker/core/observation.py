"""An observation: what one source saw of one run at one moment.

Everything that brings news (a start's answer, a callback, a poll, a history page) brings
observations and nothing else; `merge` joins them. They are kept in `run_events` as JSON, so that a
run can be folded again from what was seen of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from operator import attrgetter
from typing import Any, Final

from tracker.core.quick import quick_dataclass
from tracker.core.run import Details, Output, RunError, RunStatus, Standing, Status, status_of


class Source(StrEnum):
    """Who brought the news."""

    START = "start"
    """FLORA's answer to our own start."""
    TRACK = "track"
    """Somebody told us of a run; only its ids are believed."""
    CALLBACK = "callback"
    """An authentic callback: the end, without details."""
    POLL = "poll"
    """A read of this one run."""
    HISTORY = "history"
    """An item of a history page."""


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen. `None` means "this sight did not show it", never "it is empty".

    `at` is when the tracker saw it, `sent_at` when the request for it was sent, both in the
    database's time; the second decides which cost and which outputs are the latest. Times are aware
    UTC, `charged_cost` is USD: what FLORA's field of that name showed, a quote or the bill.
    `clock_skew` is how many seconds FLORA's clock was ahead, where the two did not agree.
    """

    run_id: str
    source: Source
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

    @property
    def read_at(self) -> datetime:
        """When the request was sent; where nothing tells, when the answer was seen."""
        return self.sent_at or self.at

    @property
    def shows_bill(self) -> bool:
        """Whether `charged_cost` is what FLORA billed: on an API read of the ended run.

        What a start answers, or a run that has not ended shows, is a quote (flora-api.md, 8). A
        failed run without a cost is billed nothing; of a completed one that says nothing.
        """
        return (
            self.source in _READS
            and self.standing.ended
            and (self.charged_cost is not None or self.status is RunStatus.FAILED)
        )

    @property
    def standing(self) -> Standing:
        """How much this observation weighs: what it says, and whether the API itself said it.

        A status that is not known is an end where the run shows when it ended.
        """
        if self.source is Source.CALLBACK:
            return _BY_CALLBACK[self.status]
        unknown = Standing.RUNNING if self.completed_at is None else Standing.FAILED
        return _BY_API.get(self.status, unknown)

    @property
    def unknown_status(self) -> str | None:
        """The status where it is none of the four that are documented."""
        return None if self.status in _BY_API else self.status

    @property
    def details(self) -> Details:
        """Whether this sight, taken alone, has the details of an ended run."""
        if not self.standing.ended_at_api:
            return Details.UNKNOWN
        if self.source is Source.POLL:
            return Details.READ
        whole = bool(self.outputs) and self.charged_cost is not None
        return Details.LISTED if self.status is RunStatus.FAILED or whole else Details.UNKNOWN

    def to_json(self) -> dict[str, Any]:
        """The observation as JSON values, without what was not seen; `from_json` reads it back."""
        return {
            name: value if form is None else form(value)
            for (name, form), value in zip(_FORMS, _VALUES(self), strict=True)
            if value is not None
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Observation":
        """The inverse of `to_json`. Raises `KeyError` or `ValueError` for what it never wrote."""
        return cls(
            **{
                name: _FROM_JSON[name](value) if name in _FROM_JSON else value
                for name, value in values.items()
            }
        )


_READS: Final = (Source.POLL, Source.HISTORY)
_BY_CALLBACK: Final[dict[Status, Standing]] = {
    RunStatus.PENDING: Standing.PENDING,
    RunStatus.RUNNING: Standing.RUNNING,
    RunStatus.FAILED: Standing.CALLBACK_FAILED,
    RunStatus.COMPLETED: Standing.CALLBACK_COMPLETED,
}
_BY_API: Final[dict[Status, Standing]] = {
    RunStatus.PENDING: Standing.PENDING,
    RunStatus.RUNNING: Standing.RUNNING,
    RunStatus.FAILED: Standing.FAILED,
    RunStatus.COMPLETED: Standing.COMPLETED,
}


def _time(value: str) -> datetime:
    return datetime.fromisoformat(value).astimezone(UTC)


_TO_JSON: Final[dict[str, Callable[[Any], Any]]] = {
    "source": str,
    "status": str,
    "at": datetime.isoformat,
    "created_at": datetime.isoformat,
    "started_at": datetime.isoformat,
    "completed_at": datetime.isoformat,
    "charged_cost": str,
    "error": lambda error: {"code": error.code, "message": error.message},
    "outputs": lambda outputs: [[o.output_id, o.type, o.url] for o in outputs],
    "sent_at": datetime.isoformat,
}
_FORMS: Final = tuple((field.name, _TO_JSON.get(field.name)) for field in fields(Observation))
_VALUES: Final = attrgetter(*(name for name, _ in _FORMS))
_FROM_JSON: Final[dict[str, Callable[[Any], Any]]] = {
    "source": Source,
    "status": status_of,
    "at": _time,
    "created_at": _time,
    "started_at": _time,
    "completed_at": _time,
    "charged_cost": Decimal,
    "error": lambda error: RunError(**error),
    "outputs": lambda outputs: tuple(Output(*output) for output in outputs),
    "sent_at": _time,
}
