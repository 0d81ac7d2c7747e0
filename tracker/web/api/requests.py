"""What may be asked of `/api`, as pydantic models, and what is wrong with what was asked.

The same models describe the API in `/openapi.json`: see `openapi`.
"""

from collections import Counter
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.datastructures import QueryParams

from tracker.core.errors import FieldFault
from tracker.core.retry import RetryAdvice
from tracker.core.run import Tracking
from tracker.core.tags import check_tags, parse_tag
from tracker.store.queries.spending import check_by
from tracker.store.queries.starts import LISTED
from tracker.web.http.errors import invalid

M = TypeVar("M", bound=BaseModel)

_PRINTABLE: Final = frozenset(map(chr, range(0x20, 0x7F)))
_NO_NUL: Final = r"^[^\u0000]*$"


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "NUL characters are not allowed")
    return text


def _key(text: str) -> str:
    """A key travels in a header as well, which carries printable ASCII and drops outer spaces."""
    if not _PRINTABLE.issuperset(text) or text != text.strip():
        raise PydanticCustomError(
            "key", "must be printable ASCII characters without spaces at the ends"
        )
    return text


def _tag(text: str | None) -> str | None:
    """A tag as a filter: how it has to look, and blanks around it do not matter."""
    return None if text is None else "=".join(parse_tag(text))


def _none_if_empty(value: Any) -> Any:
    return value or None


def _text(most: int, *, least: int = 0, pattern: str = _NO_NUL) -> WithJsonSchema:
    """How a text of at most so many characters is described."""
    bounds = {"minLength": least} if least else {}
    return WithJsonSchema({"type": "string", **bounds, "maxLength": most, "pattern": pattern})


Name = Annotated[
    str,
    StringConstraints(min_length=1, max_length=255),
    AfterValidator(_without_nul),
    _text(255, least=1),
]
"""An id, or a name that stands for one."""
Key = Annotated[
    str,
    StringConstraints(min_length=1, max_length=255),
    AfterValidator(_key),
    _text(255, least=1, pattern=r"^[!-~]([ -~]*[!-~])?$"),
]
Link = Annotated[str, StringConstraints(max_length=2048), AfterValidator(_without_nul), _text(2048)]
Filter = Annotated[Name | None, BeforeValidator(_none_if_empty), _text(255)]
"""What a list is narrowed to; one that is given as nothing is not given."""
Cursor = Annotated[
    str | None,
    BeforeValidator(_none_if_empty),
    WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]*$"}),
    Field(description="The `next_cursor` of the page before."),
]
Limit = Annotated[int, Field(ge=1, le=100, description="So many at most.")]


def _one_of(values: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "enum": [*map(str, values), ""]})


Tag = Annotated[
    str | None,
    BeforeValidator(_none_if_empty),
    AfterValidator(_tag),
    Field(description="`key=value`.", json_schema_extra={"maxLength": 320}),
]


class InputBody(BaseModel):
    """One input of a run."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, title="Input")

    id: Annotated[Name, Field(description="The id that the technique's definition gives it.")]
    type: Annotated[Name, Field(description="`text`, `imageUrl` or `videoUrl`.")]
    value: Annotated[str, Field(description="The text, or an `https` link.")]


class StartBody(BaseModel):
    """What to start.

    Unknown fields are refused, because a mistyped `idempotency_key` would cost money.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
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

    technique: Annotated[Name, Field(description="Its id or its slug.")]
    inputs: Annotated[list[InputBody], Field(min_length=1, max_length=1000)]
    workspace_id: Annotated[
        Name | None, Field(description="Needed where several workspaces are configured.")
    ] = None
    idempotency_key: Annotated[
        Key | None, Field(description="The same key again gives the same run, not another one.")
    ] = None
    tags: Annotated[
        dict[str, str],
        AfterValidator(check_tags),
        Field(description="What the run is for: kept with it, filtered and budgeted by."),
        WithJsonSchema(
            {
                "type": "object",
                "maxProperties": 16,
                "propertyNames": {"pattern": "^[A-Za-z0-9._-]{1,64}$"},
                "additionalProperties": {"type": "string", "minLength": 1, "maxLength": 255},
            }
        ),
    ] = {}


class TrackBody(BaseModel):
    """What to track: FLORA's answer to a start will do, whatever is in it.

    Only ids are taken, and where the run is read.
    """

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        title="Track",
        json_schema_extra={
            "examples": [{"run_id": "run_abc123", "technique_id": "tech_icon-pack"}]
        },
    )

    run_id: Name
    technique_id: Annotated[Name | None, Field(description="Its id or its slug.")] = None
    workspace_id: Name | None = None
    poll_url: Annotated[
        Link | None, Field(description="Followed only where it is on FLORA's own origin.")
    ] = None


class ListQuery(BaseModel):
    """The query of `GET /api/runs`. A filter that is given as nothing is not given."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    status: Annotated[
        Filter,
        Field(
            description="`pending`, `running`, `completed`, `failed`, or another that a run has."
        ),
    ] = None
    technique_id: Filter = None
    workspace_id: Filter = None
    project_id: Filter = None
    tag: Tag = None
    tracking: Annotated[Tracking | None, BeforeValidator(_none_if_empty), _one_of(Tracking)] = None
    retry_advice: Annotated[
        RetryAdvice | None, BeforeValidator(_none_if_empty), _one_of(RetryAdvice)
    ] = None
    cursor: Cursor = None
    limit: Limit = 50


class StartsQuery(BaseModel):
    """The query of `GET /api/starts`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    state: Annotated[
        Literal["stored", "sent", "in_doubt", "unresolved"] | None,
        BeforeValidator(_none_if_empty),
        _one_of(LISTED),
        Field(description="Without it those whose outcome is not known."),
    ] = None
    workspace_id: Filter = None
    cursor: Cursor = None
    limit: Limit = 50


class SpendingQuery(BaseModel):
    """The query of `GET /api/spending`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    by: Annotated[
        str,
        BeforeValidator(lambda value: value or "day"),
        AfterValidator(check_by),
        WithJsonSchema(
            {"type": "string", "pattern": "^(|day|technique|tag:[A-Za-z0-9._-]{1,64})$"}
        ),
        Field(description="`day`, `technique` or `tag:KEY`."),
    ] = "day"
    days: Annotated[
        int, Field(ge=0, le=36500, description="How many UTC days before today to begin with.")
    ] = 30
    workspace_id: Filter = None


class TechniqueQuery(BaseModel):
    """The query of `GET /api/techniques`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    query: Annotated[
        str,
        StringConstraints(max_length=255),
        AfterValidator(_without_nul),
        _text(255),
        Field(description="Words that all stand in the id, the slug, the name or the description."),
    ] = ""
    gone: Annotated[bool, Field(description="Also those that FLORA no longer has.")] = False
    cursor: Cursor = None
    limit: Limit = 50


def checked(model: type[M], values: Any) -> M:
    """`values` as a `model`; raises `Fault` 400 that names every field which is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [_fault(one) for one in error.errors(include_url=False, include_input=False)]
    raise invalid(*faults)


def checked_query(model: type[M], given: QueryParams) -> M:
    """A query as a `model`; raises `Fault` 400, also for a parameter that stands twice."""
    counts = Counter(name for name, _ in given.multi_items() if name in model.model_fields)
    twice = [FieldFault(name, "stands twice") for name, count in counts.items() if count > 1]
    if twice:
        raise invalid(*twice)
    return checked(model, dict(given))


def checked_key(values: list[str]) -> str | None:
    """The key of the `Idempotency-Key` headers of a request; raises `Fault` 400."""
    if not values:
        return None
    if len(set(values)) > 1:
        raise invalid(FieldFault("Idempotency-Key", "stands twice with different values"))
    try:
        return KeyHeader(key=values[0]).key
    except ValidationError as error:
        message = error.errors(include_url=False, include_input=False)[0]["msg"]
    raise invalid(FieldFault("Idempotency-Key", message))


class KeyHeader(BaseModel):
    """The header `Idempotency-Key`."""

    key: Key


def _fault(error: ErrorDetails) -> FieldFault:
    where = ".".join(map(str, error["loc"])) or "body"
    return FieldFault(where, error["msg"])
