"""What may be asked of `/api/runs`, as pydantic models, and what is wrong with what was asked."""

from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from tracker.core.errors import FieldFault
from tracker.core.run import RunStatus, Tracking
from tracker.web.faults import invalid

M = TypeVar("M", bound=BaseModel)

_PRINTABLE: Final = frozenset(map(chr, range(0x20, 0x7F)))


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


def _none_if_empty(value: Any) -> Any:
    return value or None


Name = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_without_nul)]
"""An id, or a name that stands for one."""
Key = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_key)]
Link = Annotated[str, StringConstraints(max_length=2048), AfterValidator(_without_nul)]
Filter = Annotated[Name | None, BeforeValidator(_none_if_empty)]


class InputBody(BaseModel):
    """One input of a run."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Name
    type: Name
    value: str


class StartBody(BaseModel):
    """The body of `POST /api/runs`.

    Unknown fields are refused, because a mistyped `idempotency_key` would cost money.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    technique: Name
    inputs: Annotated[list[InputBody], Field(min_length=1, max_length=1000)]
    workspace_id: Name | None = None
    idempotency_key: Key | None = None


class TrackBody(BaseModel):
    """The body of `POST /api/runs/track`: FLORA's answer to a start will do, whatever is in it.

    Only ids are taken, and where the run is read.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    run_id: Name
    technique_id: Name | None = None
    workspace_id: Name | None = None
    poll_url: Link | None = None


class ListQuery(BaseModel):
    """The query of `GET /api/runs`. A filter that is given as nothing is not given."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    status: Annotated[RunStatus | None, BeforeValidator(_none_if_empty)] = None
    technique_id: Filter = None
    workspace_id: Filter = None
    tracking: Annotated[Tracking | None, BeforeValidator(_none_if_empty)] = None
    cursor: Annotated[str | None, BeforeValidator(_none_if_empty)] = None
    limit: Annotated[int, Field(ge=1, le=100)] = 50


def checked(model: type[M], values: Any) -> M:
    """`values` as a `model`; raises `Fault` 400 that names every field which is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [_fault(one) for one in error.errors(include_url=False, include_input=False)]
    raise invalid(*faults)


def checked_key(values: list[str]) -> str | None:
    """The key of the `Idempotency-Key` headers of a request; raises `Fault` 400."""
    if not values:
        return None
    if len(set(values)) > 1:
        raise invalid(FieldFault("Idempotency-Key", "stands twice with different values"))
    try:
        return _KeyHeader(key=values[0]).key
    except ValidationError as error:
        message = error.errors(include_url=False, include_input=False)[0]["msg"]
    raise invalid(FieldFault("Idempotency-Key", message))


class _KeyHeader(BaseModel):
    key: Key


def _fault(error: ErrorDetails) -> FieldFault:
    where = ".".join(map(str, error["loc"])) or "body"
    return FieldFault(where, error["msg"])
