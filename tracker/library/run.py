"""Runs, their events and their spending as frozen values, and as HTML.

Notebooks show the HTML for the value of a cell. Every text in it is escaped, only a plain `http(s)`
address becomes a link, and media are loaded by https.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Self, TypeVar

from tracker.core.formatting import counted, duration, money, unturned
from tracker.core.net import is_loopback_url
from tracker.core.record import Record
from tracker.core.run import Output, RetryAdvice, RunStatus, Tracking, known
from tracker.errors import TrackerNotOpen
from tracker.views import output_names, plain_http_origin, presentation, run_columns, web_link

if TYPE_CHECKING:
    from tracker.library.reading import RunCalls
    from tracker.polling.changes import Change
    from tracker.store.queries import runs as read
    from tracker.store.queries.spending import Spending, Usage
    from tracker.store.writing.messages import Claim


_UNKNOWN: Final[Mapping[str, Any]] = {
    "tracking": Tracking.ACTIVE.value,
    "progress": 0.0,
    "checks": 0,
    "tags": {},
    "cost_final": False,
    "conflict": False,
}
"""The fields of a run that are never `None`, where its JSON leaves them out."""

Owner = TypeVar("Owner")
AnyRun = TypeVar("AnyRun", bound="RunFields")
"""The runs of `tracker.Tracker` or of `tracker.sync.Tracker`."""

MOST_CHARACTERS: Final = 4000
"""The longest text of an output that is shown as HTML; the rest is counted."""
MOST_ROWS: Final = 100
"""Most runs in one table; the rest are counted."""

ACTOR: Final = "python"
"""Who starts runs from Python, in the start log and the audit log."""


def acting_here() -> AbstractContextManager[None]:
    """The audit log names `ACTOR` for what is done in the block."""
    from tracker.store.queries.audit import Principal, acting

    return acting(Principal(name=ACTOR))


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the database by name, with the text of each member of an enumeration."""
    return {name: one.value if isinstance(one, Enum) else one for name, one in values.items()}


class Owned(Generic[Owner]):
    """A run or batch of the tracker that read it; a copy has none.

    Classes have the slot `_owner`, which is no field: neither compared, shown, copied nor pickled.
    """

    __slots__ = ()

    def _given_to(self, owner: Owner) -> Self:
        object.__setattr__(self, "_owner", owner)
        return self

    @property
    def _tracker(self) -> Owner:
        """The tracker that read it. Raises `TrackerNotOpen` for a copy."""
        owner: Owner | None = getattr(self, "_owner", None)
        if owner is None:
            raise TrackerNotOpen(
                f"this copy of a {type(self).__name__.lower()} belongs to no tracker: use "
                "tracker.get(run_id) or tracker.batch(batch_id)"
            )
        return owner


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event of a run's timeline: what one `source` showed at one time.

    `id` ascends over all runs. `detail` is the whole observation.
    """

    id: int
    run_id: str
    at: datetime
    source: str
    status: str
    progress: float | None
    detail: Mapping[str, Any]

    @classmethod
    def _of(cls, event: "read.TimelineEvent") -> Self:
        """The value of a stored event."""
        return cls(**_plain_values(event._asdict()))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunFields:
    """The state of a run when it was read, with the fields that `/api/runs/{run_id}` shows.

    Times are aware, in UTC; costs are USD; `progress` is 0 to 100. `status` is FLORA's (`pending`,
    `running`, `completed`, `failed`, or one that this version does not know), `tracking` the
    tracker's: `active`, `settled` when end and details are stored, `lost` when FLORA has no such
    run. `charged_cost` is FLORA's bill and `None` until it was read; `cost_final` says that it does
    not change any more, `quoted_cost` is FLORA's quote, `reserved_cost` what budgets reserved. The
    `url` of an output of type `text` is the text itself.

    `created_at`, `started_at` and `completed_at` are FLORA's times. The others are the tracker's:
    `settled_at`, `first_seen_at`, `callback_at` (its callback came), `cost_read_at`, `reserved_at`,
    `next_check_at` (its next poll). `source` is how the run was first heard of (`start`, `track`,
    `callback`, `history`), `ended_via` how its end became known. `conflict` is set where callback
    and API disagreed. `checks` counts the API reads made for it, `last_error` is why the last one
    failed. `retry_advice` of a failed run is `retry_now`, `retry_later`, `change_input` or
    `not_retryable`. `idempotency_key` is that of its start, if that was made here.
    """

    run_id: str
    status: str
    tracking: str
    progress: float
    technique_id: str | None
    technique_name: str | None
    run_type: str | None
    workspace_id: str | None
    project_id: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    settled_at: datetime | None
    outputs: tuple[Output, ...]
    inputs: tuple[Mapping[str, str], ...]
    idempotency_key: str | None
    tags: Mapping[str, str]
    error_code: str | None
    error_message: str | None
    retry_advice: str | None
    quoted_cost: Decimal | None
    charged_cost: Decimal | None
    cost_read_at: datetime | None
    cost_final: bool
    source: str
    first_seen_at: datetime
    callback_at: datetime | None
    ended_via: str | None
    conflict: bool
    poll_url: str | None
    reserved_at: datetime | None
    reserved_cost: Decimal | None
    next_check_at: datetime | None
    checks: int
    last_error: str | None

    @classmethod
    def _of(cls, record: Record) -> Self:
        """The value of a stored run."""
        values = _plain_values(run_columns(record))
        values["inputs"] = tuple(record.inputs or ())
        return cls(**values)

    @classmethod
    def from_json(cls, shown: Mapping[str, Any]) -> Self:
        """The value of a run as `/api/runs/{run_id}` and messages show it, without a tracker.

        What is missing is unknown: a test names the fields that it needs.
        """
        values: dict[str, Any] = {one.name: shown.get(one.name) for one in fields(cls)}
        values |= {name: value for name, value in _UNKNOWN.items() if values[name] is None}
        for name, value in values.items():
            if value is None:
                continue
            if name.endswith("_at"):
                values[name] = datetime.fromisoformat(value)
            elif name.endswith("_cost"):
                values[name] = Decimal(str(value))
        outputs = (
            Output(output_id=one["output_id"], type=one["type"], url=one["url"])
            for one in shown.get("outputs") or ()
        )
        values |= {"outputs": tuple(outputs), "inputs": tuple(shown.get("inputs") or ())}
        return cls(**values)

    @property
    def settled(self) -> bool:
        """Whether the run has ended and its details are stored."""
        return self.tracking == Tracking.SETTLED

    @property
    def succeeded(self) -> bool:
        """Whether the run completed and is settled."""
        return self.settled and self.status == RunStatus.COMPLETED

    def __hash__(self) -> int:
        return hash(self.run_id)

    def __repr__(self) -> str:
        # Neither inputs, links nor messages: they are long, and may be confidential.
        shown = [self.run_id, self.status]
        if not self.settled:
            shown.append(f"{self.progress:g} %" if self.tracking == Tracking.ACTIVE else "lost")
        if self.technique_id:
            shown.append(self.technique_id)
        if self.error_code:
            shown.append(self.error_code)
        if self.outputs:
            shown.append(counted(len(self.outputs), "output"))
        if self.charged_cost is not None:
            shown.append(money(self.charged_cost))
        return f"<Run {' · '.join(shown)}>"

    def _repr_html_(self) -> str:
        """The run with its state, cost, times, tags, error and outputs."""
        outputs = [
            (one, name, _kind(one))
            for one, name in zip(self.outputs, output_names(self.outputs, ()), strict=True)
        ]
        advice = self.retry_advice and known(RetryAdvice, self.retry_advice)
        if isinstance(advice, RetryAdvice):
            advice = advice.sentence
        return str(html_macros().card(self, outputs, advice))


def _kind(output: Output) -> str:
    """How to show an output. By plain http only what is on this machine is loaded, as the files of
    a local FLORA are: other addresses may be those of devices in the reader's network."""
    link = web_link(output.url)
    local = link is not None and is_loopback_url(link)
    return presentation(output, media_origin=plain_http_origin(output.url) if local else None)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunChange(Generic[AnyRun]):
    """A change of a run, and the run as it is now.

    `event_id` continues from here after an interruption (`tracker.events(after=event_id)`); it is
    `None` where a run was lost or came back, which is no event. `at`, `source` and `status` are
    those of the event: the run may be further by now.
    """

    event_id: int | None
    at: datetime | None
    source: str | None
    status: str
    run: AnyRun

    @classmethod
    def _of(cls, change: "Change", bound: Callable[[Record], AnyRun]) -> "RunChange[AnyRun]":
        """The value of a change; `bound` makes its run."""
        event = change.event
        return RunChange(
            event_id=event and event.id,
            at=event and event.at,
            source=event and str(event.source),
            status=str((event or change.record.run).status),
            run=bound(change.record),
        )


class RunList(list[AnyRun]):
    """A list of runs that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        rest = counted(len(self) - MOST_ROWS, "more run") if len(self) > MOST_ROWS else ""
        return str(html_macros().table(self[:MOST_ROWS], rest))


@cache
def html_macros() -> Any:
    """The macros of `notebook.html`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("tracker.library", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_turned_back,
    )
    pages.filters.update(money=money, duration=duration, shortened=_shortened)
    return pages.get_template("notebook.html").module


def _turned_back(value: object) -> object:
    """A value as it is inserted: no text turns the direction of another."""
    return unturned(value) if type(value) is str else value


def _shortened(text: str) -> str:
    rest = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]}… ({rest:,} more characters)" if rest > 0 else text


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendingSummary:
    """What was spent since the UTC day that begins at `since` (`None`: ever): a row for each day,
    technique or tag value, the total, and the use of each budget. Costs are USD."""

    by: str
    since: datetime | None
    rows: "tuple[Spending, ...]"
    total: "Spending"
    budgets: "tuple[Usage, ...]"


class Run(RunFields, Owned["RunCalls"]):
    """A run, as it was when it was read, and what can be done with it."""

    __slots__ = ("_owner",)

    @classmethod
    def _bound(cls, record: Record | Mapping[str, Any], owner: "RunCalls") -> Self:
        """The value of a stored run, or of one as JSON, with the tracker that read it."""
        run = cls._of(record) if isinstance(record, Record) else cls.from_json(record)
        return run._given_to(owner)

    async def wait(self, timeout: float | None = None, *, raise_on_failure: bool = True) -> "Run":
        """The run when it has ended; see `Tracker.wait`."""
        return await self._tracker.wait(self, timeout=timeout, raise_on_failure=raise_on_failure)

    async def refresh(self) -> "Run":
        """The run as it is stored now. Raises `RunUnknown` and `StoreUnavailable`."""
        return await self._tracker.get(self.run_id)

    async def events(self) -> list[Event]:
        """The timeline of the run, oldest event first. Raises `StoreUnavailable`."""
        return await self._tracker.events_of(self)


EventName = Literal["run.settled", "run.lost", "run.cost_changed"]
"""What a handler can get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEventFields:
    """What the events of both trackers, asynchronous and blocking, have beside their run."""

    type: EventName
    timestamp: datetime
    message_id: str
    attempt: int

    @classmethod
    def _of(cls, claim: "Claim", run_of: Callable[[Mapping[str, Any]], object]) -> Self:
        """The event of a message; `run_of` makes the run of its JSON."""
        body = json.loads(claim.body)
        values: dict[str, Any] = {
            "type": body["type"],
            "timestamp": datetime.fromisoformat(body["timestamp"]),
            "message_id": claim.message_id,
            "attempt": claim.attempts + 1,
            "run": run_of(body["data"]),
        }
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent(RunEventFields):
    """An event of a run, as a handler gets it.

    `type` is `run.settled`, `run.lost` or `run.cost_changed`; `timestamp` is when it happened.
    `message_id` is the same in every attempt to deliver the event to this handler; `attempt` counts
    them from 1. `run` is the run when the event's message was made; `await event.run.refresh()` is
    its present state.
    """

    run: Run
