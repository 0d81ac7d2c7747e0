"""Which error is which answer: the one place where an error of the tracker gets an HTTP status.

Every error answer has FLORA's own shape, `{"error": {"code", "message", "fields"?}}`, so that what
FLORA says to a start can come through as it is.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, Final

from starlette.exceptions import HTTPException

from tracker.core.errors import (
    BudgetExceeded,
    FieldFault,
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    Forbidden,
    IdempotencyConflict,
    InvalidRequest,
    KeyRefused,
    PlanRequired,
    RateLimited,
    SchemaOutdated,
    SettingsError,
    StartNotStored,
    StartPending,
    StartUnresolved,
    StoreUnavailable,
)

RETRY_AFTER: Final = 5
"""Seconds to wait where nobody named a time: what FLORA's own documentation says."""

_PASSED_ON: Final = (400, 402, 404, 422)
"""The statuses of FLORA's that are about what the caller asked for."""


class Fault(Exception):
    """An error answer, raised where it is found and sent by `edge`.

    `linger` is false where the client is not worth waiting for: its connection is closed at once.
    `more` is said besides the code and the message.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fields: Sequence[FieldFault] = (),
        headers: Mapping[str, str] | None = None,
        linger: bool = True,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.headers = dict(headers or {})
        self.linger = linger
        self.more = dict(more or {})

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, **self.more}
        if self.fields:
            error["fields"] = [_field(fault) for fault in self.fields]
        return {"error": error}


def _field(fault: FieldFault) -> dict[str, Any]:
    shown: dict[str, Any] = {"field": fault.field, "message": fault.message}
    return shown | {"valid_values": list(fault.valid_values)} if fault.valid_values else shown


def invalid(*fields: FieldFault, message: str = "The request is not valid.") -> Fault:
    """400 with the fields that are wrong."""
    return Fault(400, "input_validation_error", message, fields=fields)


def not_found(message: str) -> Fault:
    """404 for a thing that is not here."""
    return Fault(404, "not_found", message)


def unavailable(message: str, *, retry_after: float | None = None) -> Fault:
    """503 with the seconds after which another try makes sense."""
    seconds = RETRY_AFTER if retry_after is None else max(1, ceil(retry_after))
    return Fault(503, "service_unavailable", message, headers={"Retry-After": str(seconds)})


def fault_of(error: Exception) -> Fault | None:
    """The answer for an error that was foreseen; `None` for one that was not."""
    match error:
        case Fault():
            return error
        case HTTPException():
            return _of_route(error)
        case InvalidRequest():
            return invalid(*error.fields, message=str(error))
        case IdempotencyConflict():
            return Fault(422, "idempotency_conflict", str(error))
        case BudgetExceeded():
            more = {"budget": error.budget, "left": float(error.left), "renews_at": None}
            if error.renews_at is not None:
                more["renews_at"] = f"{error.renews_at:%Y-%m-%dT%H:%M:%S.%fZ}"
            return Fault(402, "budget_exceeded", str(error), more=more)
        case StartPending():
            seconds = str(max(1, ceil(error.retry_after)))
            return Fault(504, "start_pending", str(error), headers={"Retry-After": seconds})
        case StartNotStored():
            return Fault(
                503,
                "not_stored",
                str(error),
                headers={"Retry-After": str(RETRY_AFTER)},
                more={"run_id": error.run_id},
            )
        case StartUnresolved():
            return Fault(409, "start_unresolved", str(error))
        case StoreUnavailable() | SchemaOutdated():
            return unavailable(str(error))
        case SettingsError():
            return Fault(503, "not_configured", str(error))
        case FloraError():
            return _of_flora(error)
    return None


def _of_flora(error: FloraError) -> Fault:
    match error:
        case KeyRefused() | Forbidden():
            return Fault(502, "flora_key_refused", str(error))
        case PlanRequired():
            return Fault(402, error.code, error.message, fields=error.fields)
        case RateLimited():
            return unavailable(str(error), retry_after=error.retry_after)
        case FloraRefusal(status=status) if status in _PASSED_ON:
            return Fault(status, error.code, error.message, fields=error.fields)
        case FloraRefusal(status=503):
            return unavailable(str(error), retry_after=error.retry_after)
        case FloraRefusal(status=504) | FloraUnreachable(timed_out=True):
            return Fault(504, "flora_timeout", str(error))
        case FloraUnreachable():
            return Fault(502, "flora_unreachable", str(error))
    return Fault(502, "flora_error", str(error))


def _of_route(error: HTTPException) -> Fault:
    """What the router itself says: no such route, or not with this method."""
    if error.status_code == 405:
        allowed = sorted(method.strip() for method in (error.headers or {})["Allow"].split(","))
        return Fault(
            405,
            "method_not_allowed",
            f"This route takes {', '.join(allowed)}.",
            headers={"Allow": ", ".join(allowed)},
        )
    if error.status_code == 404:
        return not_found("There is no such route.")
    return Fault(error.status_code, "http_error", error.detail, headers=error.headers)
