"""Models of the bodies and queries of the API. They also describe it in `/openapi.json`."""

from collections import Counter
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from starlette.datastructures import QueryParams

from tracker.core.errors import FieldFault
from tracker.core.events import EventType, MessageState
from tracker.core.formatting import requirement
from tracker.core.record import DeliveryOutcome
from tracker.core.run import RetryAdvice, Tracking
from tracker.core.starts import check_tag_key, check_tags, parse_tag
from tracker.store.queries.sheet_rows import RowOutcome
from tracker.store.queries.spending import check_by
from tracker.store.queries.starts import LISTED
from tracker.web.http.responses import invalid

M = TypeVar("M", bound=BaseModel)

_NO_NUL: Final = r"^[^\u0000]*$"
_KEY: Final = r"^[!-~]([ -~]*[!-~])?$"
"""A key is also sent as a header, which carries ASCII and loses outer spaces."""
_MESSAGES: Final = {
    _NO_NUL: "must not contain NUL characters",
    _KEY: "must be printable ASCII characters without spaces at the ends",
}
"""Messages for fields that do not match a pattern."""
MOST_ROWS: Final = 10_000
"""Rows of one batch."""
_ROW: Final = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [
            {"type": ["string", "number", "null"]},
            {"type": "array", "items": {"type": "string"}},
        ]
    },
}


def validate(model: type[M], values: Any) -> M:
    """`values` as a `model`. Raises `Fault` 400, which names every wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
    messages = [
        _MESSAGES.get(one.get("ctx", {}).get("pattern", "")) or requirement(one["type"], one["msg"])
        for one in faults
    ]
    places = [".".join(map(str, one["loc"])) or "body" for one in faults]
    raise invalid(*map(FieldFault, places, messages))


def validate_query(model: type[M], parameters: QueryParams) -> M:
    """A query as a `model`. Raises `Fault` 400, also for a repeated parameter."""
    counts = Counter(name for name, _ in parameters.multi_items() if name in model.model_fields)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise invalid(*(FieldFault(name, "is repeated") for name in repeated))
    return validate(model, dict(parameters))


def validate_key(values: list[str]) -> str | None:
    """The key in the `Idempotency-Key` headers of a request. Raises `Fault` 400."""
    if len(set(values)) > 1:
        raise invalid(FieldFault("Idempotency-Key", "is repeated with different values"))
    return validate(KeyHeader, {"Idempotency-Key": values[0]}).key if values else None


def one_of(values: Any) -> WithJsonSchema:
    """The schema of an optional parameter with these values."""
    return WithJsonSchema({"type": "string", "enum": [*map(str, values), ""]})


Name = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=_NO_NUL)]
"""An id or a slug."""
Key = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=_KEY)]
Filter = Annotated[
    Name | None, WithJsonSchema({"type": "string", "maxLength": 255, "pattern": _NO_NUL})
]
Cursor = Annotated[
    str | None,
    WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]*$"}),
    Field(description="The `next_cursor` of the previous page."),
]
Limit = Annotated[int, Field(ge=1, le=100, description="Maximum number of entries.")]


BY_TAG: Final = WithJsonSchema(
    {
        "type": "object",
        "maxProperties": 16,
        "propertyNames": {"pattern": "^[A-Za-z0-9._-]{1,64}$"},
        "additionalProperties": {"type": "string", "minLength": 1, "maxLength": 255},
    }
)
"""The schema of a text for each tag."""
TagsField = Annotated[dict[str, str], AfterValidator(check_tags), BY_TAG]


class Body(BaseModel):
    """Unknown fields are refused: a mistyped `idempotency_key` would cost money."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Query(BaseModel):
    """Unknown parameters are ignored, and an empty one counts as omitted."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in values.items() if value}


class PageQuery(Query):
    """The query of a list, which comes a page at a time."""

    cursor: Cursor = None
    limit: Limit = 50


class KeyHeader(BaseModel):
    """The header `Idempotency-Key`."""

    key: Key = Field(alias="Idempotency-Key", description="Like the field `idempotency_key`.")


class InputBody(Body):
    """One input of a run."""

    model_config = ConfigDict(title="Input")

    id: Name = Field(description="The id in the technique's definition.")
    type: Name = Field(description="`text`, `imageUrl` or `videoUrl`.")
    value: str = Field(description="The text, or an `https` link.")


class StartBody(Body):
    """A run to start. Unknown fields are refused."""

    model_config = ConfigDict(
        title="Start",
        json_schema_extra={
            "examples": [
                {
                    "technique": "icon-pack",
                    "inputs": [{"id": "prompt", "type": "text", "value": "garden tools"}],
                    "idempotency_key": "order-1234",
                }
            ]
        },
    )

    technique: Name = Field(description="Its id or its slug.")
    inputs: list[InputBody] = Field(min_length=1, max_length=1000)
    workspace_id: Name | None = Field(
        None, description="Required if several workspaces are configured."
    )
    idempotency_key: Key | None = Field(
        None, description="The same key always returns the same run and starts no other."
    )
    tags: TagsField = Field({}, description="Labels of the run, for filters and budgets.")


class TrackBody(Body):
    """A run to track, such as FLORA's answer to a start: other fields are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        title="Track",
        json_schema_extra={
            "examples": [{"run_id": "run_abc123", "technique_id": "tech_icon-pack"}]
        },
    )

    run_id: Name
    technique_id: Name | None = Field(None, description="Its id or its slug.")
    technique: Any = Field(
        None, description="Where FLORA shows the id in an object, as its other starts do."
    )
    workspace_id: Name | None = None
    poll_url: Annotated[str, StringConstraints(max_length=2048, pattern=_NO_NUL)] | None = Field(
        None, description="Used only if it is on FLORA's own origin."
    )


class OrderBody(Body):
    """What starts rows of a batch."""

    max_cost: float | None = Field(
        None,
        ge=0,
        le=1e9,
        allow_inf_nan=False,
        description="Start nothing if the rows could cost more than this, in USD.",
    )
    wait_for_budget: bool = Field(
        False, description="Wait for a used-up budget to start again, in place of an error."
    )
    dry_run: bool = Field(False, description="Only return what would be started, and its price.")


class BatchBody(OrderBody):
    """Rows to start a run of each. Unknown fields are refused."""

    model_config = ConfigDict(
        title="NewBatch",
        json_schema_extra={
            "examples": [
                {
                    "technique": "icon-pack",
                    "name": "Spring icons",
                    "rows": [
                        {"prompt": "garden tools", "sku": "SKU-0001"},
                        {"prompt": "beach toys", "sku": "SKU-0002"},
                    ],
                    "tag_columns": {"sku": "sku"},
                    "max_cost": 5,
                }
            ]
        },
    )

    technique: Name = Field(description="Its id or its slug.")
    rows: list[Annotated[dict[str, Any], WithJsonSchema(_ROW)]] = Field(
        min_length=1,
        max_length=MOST_ROWS,
        description="An object for each run. A field with the id or name of an input is that "
        "input: a text, or several in a list. All other fields are carried into the results.",
    )
    columns: dict[str, Name] = Field(
        {}, description="The field of an input, by the input's id, where their names differ."
    )
    name: Name | None = Field(None, description="What lists and pages call it.")
    workspace_id: Name | None = Field(
        None, description="Required if several workspaces are configured."
    )
    tags: TagsField = Field({}, description="Labels of all runs, for filters and budgets.")
    tag_columns: Annotated[
        dict[Annotated[str, AfterValidator(check_tag_key)], Name],
        BY_TAG,
    ] = Field({}, description="Fields whose values tag the runs of their rows, by tag.")
    retry: Literal["failed", "all"] | None = Field(
        None,
        description="Also start rows again that failed: temporarily (`failed`), or for any reason "
        "(`all`).",
    )
    accept_changes: bool = Field(
        False,
        description="Start rows again whose fields are other inputs since the technique changed.",
    )


class RetryBody(OrderBody):
    """Which rows of a batch to start again. Unknown fields are refused."""

    model_config = ConfigDict(
        title="Retry", json_schema_extra={"examples": [{"which": "failed", "max_cost": 2.5}]}
    )

    which: Literal["unstarted", "failed", "all"] = Field(
        description="`unstarted`: rows without a run. `failed`: also rows that failed temporarily, "
        "once, after a wait where advised. `all`: also every other row that failed."
    )
    only_failed: bool = Field(
        False, description="Leave rows without a run out, as of a batch that was interrupted."
    )


class RunsQuery(PageQuery):
    """The query of `GET /api/runs`."""

    status: Filter = Field(
        None, description="`pending`, `running`, `completed`, `failed`, or another status of a run."
    )
    technique_id: Filter = Field(None, description="Its id or its slug.")
    workspace_id: Filter = None
    project_id: Filter = None
    tag: Annotated[str | None, AfterValidator(lambda tag: tag and "=".join(parse_tag(tag)))] = (
        Field(None, description="`key=value`.", json_schema_extra={"maxLength": 320})
    )
    tracking: Annotated[Tracking | None, one_of(Tracking)] = None
    retry_advice: Annotated[RetryAdvice | None, one_of(RetryAdvice)] = None


class RowsQuery(PageQuery):
    """The query of `GET /api/batches/{batch_id}/rows`."""

    outcome: Annotated[RowOutcome | None, one_of(RowOutcome)] = Field(
        None, description="Default: all rows."
    )
    code: Filter = Field(None, description="Rows of the error group with this code.")


class ResultsQuery(Query):
    """The query of `GET /api/batches/{batch_id}/results.csv`."""

    bom: bool = Field(False, description="Begin with a byte order mark, as Excel needs it.")


class StartsQuery(PageQuery):
    """The query of `GET /api/starts`."""

    state: Annotated[Literal["stored", "sent", "in_doubt", "unresolved"] | None, one_of(LISTED)] = (
        Field(None, description="Default: all whose outcome is not known.")
    )
    workspace_id: Filter = None


class DeliveriesQuery(PageQuery):
    """The query of `GET /api/deliveries`."""

    outcome: Annotated[DeliveryOutcome | None, one_of(DeliveryOutcome)] = None
    run_id: Filter = None
    workspace_id: Filter = None


class MessagesQuery(PageQuery):
    """The query of `GET /api/messages`."""

    endpoint_id: Filter = None
    state: Annotated[MessageState | None, one_of(MessageState)] = None
    event: Annotated[EventType | None, one_of(EventType)] = None
    run_id: Filter = None


class SpendingQuery(Query):
    """The query of `GET /api/spending`."""

    by: Annotated[
        str,
        AfterValidator(check_by),
        WithJsonSchema(
            {"type": "string", "pattern": "^(|day|technique|tag:[A-Za-z0-9._-]{1,64})$"}
        ),
    ] = Field("day", description="`day`, `technique` or `tag:KEY`.")
    days: int = Field(30, ge=0, le=36500, description="Number of UTC days before today.")
    workspace_id: Filter = None


class TechniquesQuery(PageQuery):
    """The query of `GET /api/techniques`."""

    query: str = Field(
        "",
        max_length=255,
        pattern=_NO_NUL,
        description="Words that must all occur in id, slug, name or description.",
    )
    gone: bool = Field(False, description="Include retired techniques.")
