"""What `/api` answers, as pydantic models: they only describe, and tests hold the answers to them.

The answers themselves are made by `tracker.views`.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tracker.core.observation import Source
from tracker.core.retry import RetryAdvice
from tracker.core.run import Status, Tracking

_RUN: dict[str, Any] = {
    "run_id": "run_abc123",
    "run_type": "technique",
    "workspace_id": "ws_abc123",
    "project_id": "prj_abc123",
    "technique_id": "tech_icon-pack",
    "technique_name": "Icon Pack",
    "status": "completed",
    "progress": 100,
    "created_at": "2026-06-11T12:00:00.123000Z",
    "started_at": "2026-06-11T12:00:02.000000Z",
    "completed_at": "2026-06-11T12:00:31.500000Z",
    "quoted_cost": 0.21,
    "charged_cost": 0.25,
    "cost_read_at": "2026-06-11T12:01:45.300000Z",
    "cost_final": True,
    "error_code": None,
    "error_message": None,
    "retry_advice": None,
    "poll_url": "https://app.flora.ai/api/v1/techniques/tech_icon-pack/runs/run_abc123",
    "source": "start",
    "first_seen_at": "2026-06-11T12:00:00.456000Z",
    "callback_at": "2026-06-11T12:00:31.700000Z",
    "ended_via": "callback",
    "tracking": "settled",
    "settled_at": "2026-06-11T12:00:32.100000Z",
    "conflict": False,
    "inputs": [{"id": "prompt", "type": "text", "value": "garden tools"}],
    "tags": {"team": "red"},
    "reserved_at": "2026-06-11T12:00:00.100000Z",
    "reserved_cost": 0.25,
    "next_check_at": None,
    "checks": 1,
    "last_error": None,
    "outputs": [
        {
            "position": 0,
            "output_id": "icon_1",
            "type": "imageUrl",
            "url": "https://media.example.com/icon_1.png",
        }
    ],
}
_EVENT: dict[str, Any] = {
    "run_id": "run_abc123",
    "at": "2026-06-11T12:00:31.700000Z",
    "source": "callback",
    "status": "completed",
    "progress": None,
    "detail": {"run_id": "run_abc123", "source": "callback", "status": "completed"},
}
_TECHNIQUE: dict[str, Any] = {
    "technique_id": "tech_icon-pack",
    "slug": "icon-pack",
    "name": "Icon Pack",
    "description": "Generate matched icon sets from a prompt",
    "run_cost": 0.25,
    "inputs": [{"id": "prompt", "name": "Prompt", "type": "text"}],
    "outputs": [
        {"id": "icon_1", "name": "Icon 1", "type": "imageUrl", "specified_aspect_ratio": "1:1"}
    ],
    "obstacle": None,
    "synced_at": "2026-06-11T12:00:00.000000Z",
    "defined_at": "2026-06-11T12:00:00.000000Z",
    "gone_at": None,
}


class Shape(BaseModel):
    """Exactly these fields, all of them there."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Output(Shape):
    """One output of a run."""

    position: Annotated[int, Field(ge=0)]
    output_id: str
    type: Annotated[str, Field(description="`imageUrl`, `videoUrl`, `audioUrl`, `text`, …")]
    url: Annotated[str, Field(description="The link; of a `text` the text itself.")]


class Given(BaseModel):
    """One input, as the run was started with it."""

    id: str
    type: str
    value: str


class Run(Shape):
    """A tracked run. Times are UTC, costs USD."""

    model_config = ConfigDict(json_schema_extra={"examples": [_RUN]})

    run_id: str
    run_type: Annotated[str | None, Field(description="`technique` or `generation`.")]
    workspace_id: str | None
    project_id: str | None
    technique_id: str | None
    technique_name: str | None
    status: Status
    progress: Annotated[float, Field(ge=0, le=100)]
    created_at: Annotated[
        datetime, Field(description="FLORA's; until it is known, when the run was first seen.")
    ]
    started_at: datetime | None
    completed_at: datetime | None
    quoted_cost: Annotated[
        float | None, Field(ge=0, description="What was shown before the end; not a charge.")
    ]
    charged_cost: Annotated[
        float | None,
        Field(ge=0, description="What FLORA billed, as the latest read of the ended run shows."),
    ]
    cost_read_at: Annotated[datetime | None, Field(description="When that read was sent.")]
    cost_final: Annotated[
        bool,
        Field(description="That read came long enough after the end for the bill to be there."),
    ]
    error_code: str | None
    error_message: str | None
    retry_advice: Annotated[
        RetryAdvice | None, Field(description="Of a failed run, whether to start it again.")
    ]
    poll_url: str | None
    source: Annotated[Source, Field(description="How it was first heard of.")]
    first_seen_at: datetime
    callback_at: Annotated[datetime | None, Field(description="The first authentic callback.")]
    ended_via: Annotated[
        Literal["start", "callback", "poll", "history"] | None,
        Field(description="How its end became known first."),
    ]
    tracking: Annotated[
        Tracking,
        Field(
            description="`settled` once its end and its details have been read; `lost` where FLORA "
            "has said for an hour that it does not exist; `active` until then."
        ),
    ]
    settled_at: datetime | None
    conflict: Annotated[bool, Field(description="Two sources disagreed about its end.")]
    inputs: Annotated[
        list[Given] | None, Field(description="What it was started with, where we started it.")
    ]
    tags: Annotated[dict[str, str], Field(description="What it is for, where we started it.")]
    reserved_at: Annotated[
        datetime | None, Field(description="When it was reserved in the budgets: its period.")
    ]
    reserved_cost: Annotated[
        float | None, Field(ge=0, description="The price that was reserved for it.")
    ]
    next_check_at: datetime | None
    checks: Annotated[int, Field(ge=0, description="API reads made for this run alone.")]
    last_error: str | None
    outputs: list[Output]


class Event(Shape):
    """What one source saw of a run at one moment."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EVENT]})

    run_id: str
    at: datetime
    source: Source
    status: Status
    progress: Annotated[float | None, Field(ge=0, le=100)]
    detail: Annotated[dict[str, Any], Field(description="All that it saw.")]


class Port(BaseModel):
    """An input or output of a technique: FLORA's own object, with whatever else is in it."""

    id: Annotated[Any, Field(default=None, examples=["prompt"])]
    name: Annotated[Any, Field(default=None, examples=["Prompt"])]
    type: Annotated[Any, Field(default=None, examples=["text"])]


class Technique(Shape):
    """A technique of FLORA's catalogue. Times are UTC, costs USD."""

    model_config = ConfigDict(json_schema_extra={"examples": [_TECHNIQUE]})

    technique_id: str
    slug: Annotated[str | None, Field(description="The other name under which it was asked for.")]
    name: str
    description: str | None
    run_cost: Annotated[float | None, Field(ge=0, description="For each run.")]
    inputs: Annotated[
        list[Port], Field(description="Empty until its definition has been read, by itself.")
    ]
    outputs: list[Port]
    obstacle: Annotated[
        str | None, Field(description="Why it cannot be started: it needs a sound or a document.")
    ]
    synced_at: Annotated[datetime | None, Field(description="When anything was last read of it.")]
    defined_at: Annotated[datetime | None, Field(description="When its definition was last read.")]
    gone_at: Annotated[datetime | None, Field(description="Since when FLORA does not list it.")]


class Meta(Shape):
    """Where a list goes on."""

    next_cursor: Annotated[str | None, Field(description="`null` on the last page.")]


class RunPage(Shape):
    """A page of runs, newest first."""

    runs: list[Run]
    meta: Meta


class Timeline(Shape):
    """A run's events, oldest first."""

    events: list[Event]


class Start(Shape):
    """What was asked of FLORA under one idempotency key, and what came of it. Times are UTC."""

    idempotency_key: str
    workspace_id: str
    technique_id: str
    state: Annotated[
        Literal["stored", "sent", "in_doubt", "unresolved"],
        Field(
            description="`in_doubt`: it may have been started, and is not sent again before that "
            "is safe. `unresolved`: left to a person."
        ),
    ]
    run_id: str | None
    created_at: datetime
    first_sent_at: datetime | None
    sent_at: Annotated[datetime | None, Field(description="When it was last sent.")]
    started_by: Annotated[str | None, Field(description="The token's name, or `cli` or `batch`.")]
    tags: dict[str, str]
    reserved_at: Annotated[datetime | None, Field(description="In which period it counts.")]
    reserved_cost: Annotated[float | None, Field(description="What it takes from the budgets.")]
    inputs: list[dict[str, Any]]
    error: Annotated[dict[str, Any] | None, Field(description="The last answer that was no run.")]


class StartPage(Shape):
    """A page of starts, newest first."""

    starts: list[Start]
    meta: Meta


class Spent(Shape):
    """What runs cost together, in USD."""

    of: Annotated[
        str | None,
        Field(description="The day, the technique or the tag's value; `null` for all other runs."),
    ]
    name: Annotated[str | None, Field(description="What the technique is called.")]
    runs: int
    charged: Annotated[float, Field(description="What FLORA billed.")]
    quoted: Annotated[float, Field(description="What the runs without a bill may cost.")]
    unpriced: Annotated[int, Field(description="Ended runs whose cost is not known.")]


class BudgetUsage(Shape):
    """How far a budget is used in its present period. Amounts are USD, times UTC."""

    budget: Annotated[str, Field(description="Its name.")]
    usd: Annotated[float, Field(description="The most that may be spent.")]
    period: Literal["day", "month", "total"]
    workspace_id: str | None
    technique_id: str | None
    tag: str | None
    since: datetime | None
    renews_at: Annotated[datetime | None, Field(description="When it begins anew.")]
    charged: float
    quoted: float
    reserved: Annotated[float, Field(description="Of starts that are under way or in doubt.")]
    used: float
    left: float
    used_share: Annotated[float, Field(description="1 for all of it; more is possible.")]


class SpendingReport(Shape):
    """What was spent since a day, by what was asked for, and the budgets."""

    by: str
    since: Annotated[str, Field(description="The first day, UTC.")]
    spending: list[Spent]
    total: Spent
    budgets: list[BudgetUsage]


class TechniquePage(Shape):
    """A page of techniques, by name."""

    techniques: list[Technique]
    meta: Meta


class WrongField(Shape):
    """One field that is wrong."""

    field: str
    message: str
    valid_values: Annotated[
        list[str], Field(description="What the field takes, where FLORA names it.")
    ] = []


class ErrorDetail(Shape):
    """What went wrong. `fields` is there where the fault lies in certain fields."""

    code: str
    message: str
    fields: list[WrongField] = []
    budget: Annotated[str | None, Field(description="Of `budget_exceeded`: which.")] = None
    left: Annotated[float | None, Field(description="What it has left, in USD.")] = None
    renews_at: Annotated[datetime | None, Field(description="When it begins anew.")] = None


class Error(Shape):
    """An error, in FLORA's own shape."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "code": "input_validation_error",
                        "message": "the inputs do not fit the technique icon-pack",
                        "fields": [{"field": "inputs.prompt", "message": "is required (text)"}],
                    }
                }
            ]
        }
    )

    error: ErrorDetail
