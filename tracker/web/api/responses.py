"""Models of the API's responses. They only describe: `tracker.views` makes the responses, and tests
compare both."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tracker.core.events import EventType, MessageState
from tracker.core.observation import Source
from tracker.core.record import DeliveryOutcome
from tracker.core.run import RetryAdvice, Status, Tracking

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
    "idempotency_key": "order-17",
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
    "id": 17,
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


def schema_name(model: type) -> str:
    """The name of a model in the OpenAPI document: `Run` for `RunResponse`."""
    return model.__name__.removesuffix("Response")


class ResponseModel(BaseModel):
    """Exactly these fields, all of them present."""

    model_config = ConfigDict(extra="forbid", frozen=True, model_title_generator=schema_name)


class Meta(ResponseModel):
    """Pagination."""

    next_cursor: str | None = Field(description="`null` on the last page.")


class OutputResponse(ResponseModel):
    """One output of a run."""

    position: int = Field(ge=0)
    output_id: str
    type: str = Field(description="`imageUrl`, `videoUrl`, `audioUrl`, `text`, …")
    url: str = Field(description="The link; for `text` the text itself.")


class RunInput(BaseModel):
    """One input with which the run was started."""

    id: str
    type: str
    value: str


class RunResponse(ResponseModel):
    """A tracked run. Times are UTC, costs USD."""

    model_config = ConfigDict(json_schema_extra={"examples": [_RUN]})

    run_id: str
    run_type: str | None = Field(description="`technique` or `generation`.")
    workspace_id: str | None
    project_id: str | None
    technique_id: str | None
    technique_name: str | None
    status: Status
    progress: float = Field(ge=0, le=100)
    created_at: datetime = Field(
        description="FLORA's time; until it is known, when the run was first seen."
    )
    started_at: datetime | None
    completed_at: datetime | None
    quoted_cost: float | None = Field(ge=0, description="Shown before the end; not a charge.")
    charged_cost: float | None = Field(
        ge=0, description="Billed by FLORA, according to the latest read of the ended run."
    )
    cost_read_at: datetime | None = Field(description="When that read was sent.")
    cost_final: bool = Field(
        description="That read came long enough after the end to include the bill."
    )
    error_code: str | None
    error_message: str | None
    retry_advice: RetryAdvice | None = Field(
        description="For a failed run: whether to start it again."
    )
    poll_url: str | None
    source: Source = Field(description="How the tracker first learnt of it.")
    first_seen_at: datetime
    callback_at: datetime | None = Field(description="Receipt of the first authentic callback.")
    ended_via: Literal["start", "callback", "poll", "history"] | None = Field(
        description="How the tracker first learnt of its end."
    )
    tracking: Tracking = Field(
        description="`settled`: its end and its details have been read. `lost`: FLORA has answered "
        "for an hour that it does not exist. `active`: everything else."
    )
    settled_at: datetime | None
    conflict: bool = Field(description="Two sources disagree about its end.")
    inputs: list[RunInput] | None = Field(description="Null unless the tracker started it.")
    idempotency_key: str | None = Field(
        description="The key of the start that it belongs to. A start with several values for an "
        "input has several runs."
    )
    tags: dict[str, str] = Field(description="Empty unless the tracker started it.")
    reserved_at: datetime | None = Field(description="Start of the reservation in the budgets.")
    reserved_cost: float | None = Field(ge=0, description="The reserved price.")
    next_check_at: datetime | None
    checks: int = Field(ge=0, description="API reads made for this run alone.")
    last_error: str | None
    outputs: list[OutputResponse]


class EventResponse(ResponseModel):
    """One observation of a run."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EVENT]})

    id: int
    run_id: str
    at: datetime
    source: Source
    status: Status
    progress: float | None = Field(ge=0, le=100)
    detail: dict[str, Any] = Field(description="The whole observation.")


class Timeline(ResponseModel):
    """A run's events, oldest first."""

    events: list[EventResponse]


class PortResponse(BaseModel):
    """An input or output of a technique: FLORA's own object, with all of its fields."""

    model_config = ConfigDict(model_title_generator=schema_name)

    id: Any = Field(default=None, examples=["prompt"])
    name: Any = Field(default=None, examples=["Prompt"])
    type: Any = Field(default=None, examples=["text"])


class TechniqueResponse(ResponseModel):
    """A technique of FLORA's catalogue. Times are UTC, costs USD."""

    model_config = ConfigDict(json_schema_extra={"examples": [_TECHNIQUE]})

    technique_id: str
    slug: str | None = Field(description="Its other name, accepted in place of the id.")
    name: str
    description: str | None
    run_cost: float | None = Field(ge=0, description="Per run.")
    inputs: list[PortResponse] = Field(description="Empty until its definition has been read.")
    outputs: list[PortResponse]
    obstacle: str | None = Field(
        description="Why the tracker cannot start it: an input is audio or a document."
    )
    synced_at: datetime | None = Field(description="When it was last read, in a list or alone.")
    defined_at: datetime | None = Field(description="When its definition was last read.")
    gone_at: datetime | None = Field(description="Since when FLORA does not list it.")


class StartResponse(ResponseModel):
    """A start under one idempotency key. Times are UTC."""

    idempotency_key: str
    workspace_id: str
    technique_id: str
    state: Literal["stored", "sent", "in_doubt", "unresolved"] = Field(
        description="`in_doubt`: FLORA may have started it; it is not sent again before that is "
        "safe. `unresolved`: a person has to decide."
    )
    run_id: str | None
    created_at: datetime
    first_sent_at: datetime | None
    sent_at: datetime | None = Field(description="When it was last sent.")
    started_by: str | None = Field(description="The token's name, or `cli`, `batch`, `python`.")
    tags: dict[str, str]
    reserved_at: datetime | None = Field(description="Decides in which budget period it counts.")
    reserved_cost: float | None = Field(description="The amount reserved in the budgets.")
    inputs: list[dict[str, Any]]
    error: dict[str, Any] | None = Field(description="The last error answer.")
    possible_runs: list[str] = Field(
        description="The only runs that it may have become; empty while that is not known."
    )


class AttemptResponse(ResponseModel):
    """One attempt to deliver a message."""

    number: int = Field(description="From 1.")
    at: datetime
    seconds: float = Field(ge=0, description="Until it ended.")
    status: int | None = Field(description="The HTTP status of the answer, if there was one.")
    answer: str | None = Field(description="The beginning of the answer.")
    error: str | None = Field(description="Why it failed.")


class DeliveryResponse(ResponseModel):
    """A callback as it was received. Times are UTC."""

    delivery_id: str
    run_id: str | None
    event_type: str | None
    api_version: str | None
    workspace_id: str | None
    created_at: datetime | None = Field(description="FLORA's time.")
    received_at: datetime
    last_received_at: datetime
    receipts: int = Field(ge=1, description="How many times it came.")
    outcome: DeliveryOutcome
    reason: str | None = Field(description="Why it is quarantined.")
    applied_at: datetime | None = Field(description="When its effect was on its run.")
    body_removed_at: datetime | None = Field(description="When retention removed the body.")
    acknowledged_at: datetime | None = Field(
        description="When a person marked the quarantined callback as seen."
    )


class Replayed(ResponseModel):
    """The result of a replay."""

    delivery_id: str
    run_id: str | None
    outcome: DeliveryOutcome
    reason: str | None = Field(description="Why it is still quarantined, or nothing was done.")
    already: bool = Field(description="Whether it had been applied before.")


class MessageResponse(ResponseModel):
    """An event for one endpoint. Times are UTC."""

    message_id: str = Field(description="Sent as `webhook-id`, the same in all attempts.")
    endpoint_id: str
    event: EventType
    run_id: str
    event_at: datetime = Field(description="When the event happened.")
    created_at: datetime = Field(description="When the message was made of it.")
    state: MessageState = Field(
        description="`failed`: given up after the last attempt, until it is resent."
    )
    attempts: int = Field(ge=0)
    last_attempt_at: datetime | None
    next_attempt_at: datetime | None = Field(description="Of a pending message.")
    delivered_at: datetime | None
    last_status: int | None = Field(description="The HTTP status of the last attempt.")
    last_error: str | None


class MessageDetail(MessageResponse):
    """A message with its body and its attempts."""

    body: dict[str, Any] = Field(description="The JSON as it is sent.")
    attempt_log: list[AttemptResponse] = Field(description="Oldest first.")


class Spent(ResponseModel):
    """The cost of a group of runs, in USD."""

    of: str | None = Field(
        description="The day, the technique or the tag's value; `null` for all other runs."
    )
    name: str | None = Field(description="The technique's name.")
    runs: int
    charged: float = Field(description="Billed by FLORA.")
    quoted: float = Field(description="Quoted for runs without a bill.")
    unpriced: int = Field(
        description="Runs that were never billed; `quoted` has the price of those started here."
    )


class BudgetUsage(ResponseModel):
    """Usage of a budget in its current period. Amounts are USD, times UTC."""

    budget: str = Field(description="Its name.")
    usd: float = Field(description="The maximum.")
    period: Literal["day", "month", "total"]
    workspace_id: str | None
    technique_id: str | None
    tag: str | None
    since: datetime | None
    renews_at: datetime | None = Field(description="Start of the next period.")
    charged: float
    quoted: float
    reserved: float = Field(description="For starts under way or in doubt.")
    used: float
    left: float
    used_share: float = Field(description="1 is all of it; bills can exceed it.")


class SpendingReport(ResponseModel):
    """Spending since a day, grouped as requested, and the budgets."""

    by: str
    since: str = Field(description="The first day, UTC.")
    spending: list[Spent]
    total: Spent
    budgets: list[BudgetUsage]


class WrongField(ResponseModel):
    """One invalid field."""

    field: str
    message: str
    valid_values: list[str] = Field([], description="The accepted values, if known.")
    rows: list[int] = Field([], description="For `invalid_rows`: the rows, from 1.")


class ErrorDetail(ResponseModel):
    """An error; `fields` lists the invalid fields."""

    code: str
    message: str
    fields: list[WrongField] = []
    budget: str | None = Field(None, description="For `budget_exceeded`: the budget.")
    left: float | None = Field(None, description="What is left of it, in USD.")
    renews_at: datetime | None = Field(None, description="When its next period starts.")


class Error(ResponseModel):
    """An error, in FLORA's shape."""

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
