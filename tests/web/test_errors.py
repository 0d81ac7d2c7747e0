"""Which error of the tracker is which answer."""

import pytest

from tracker.core.errors import (
    FieldFault,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    IdempotencyConflict,
    InvalidRequest,
    KeyRefused,
    NotFound,
    RateLimited,
    SchemaOutdated,
    ServerFault,
    SettingsError,
    StartNotStored,
    StartUnresolved,
    StoreError,
    StoreUnavailable,
)
from tracker.web.http.responses import to_fault


def _refusal(
    status: int,
    kind: type[FloraRefusal] = FloraRefusal,
    code: str = "flora_code",
    retry_after: float | None = None,
) -> FloraRefusal:
    return kind(status=status, code=code, message="FLORA's words", retry_after=retry_after)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (InvalidRequest("no"), 400, "input_validation_error", None),
        (IdempotencyConflict("no"), 422, "idempotency_conflict", None),
        (StartUnresolved("no"), 409, "start_unresolved", None),
        (StoreUnavailable("no"), 503, "service_unavailable", "5"),
        (SchemaOutdated("no"), 503, "service_unavailable", "5"),
        (SettingsError("no"), 503, "not_configured", None),
        (_refusal(400, code="input_validation_error"), 400, "input_validation_error", None),
        (_refusal(402, code="insufficient_credits"), 402, "insufficient_credits", None),
        (_refusal(404, NotFound, "not_found"), 404, "not_found", None),
        (_refusal(422), 422, "flora_code", None),
        (_refusal(401, KeyRefused), 502, "flora_key_refused", None),
        (_refusal(403, KeyRefused), 502, "flora_key_refused", None),
        (_refusal(409), 502, "flora_error", None),
        (_refusal(429, RateLimited), 503, "service_unavailable", "5"),
        (_refusal(429, RateLimited, retry_after=17.2), 503, "service_unavailable", "18"),
        (_refusal(503, ServerFault, retry_after=0), 503, "service_unavailable", "1"),
        (_refusal(500, ServerFault), 502, "flora_error", None),
        (_refusal(504, ServerFault), 504, "flora_timeout", None),
        (FloraUnreachable("no", may_have_acted=True, timed_out=True), 504, "flora_timeout", None),
        (FloraUnreachable("no", may_have_acted=True), 502, "flora_unreachable", None),
        (FloraUnreadable("no"), 502, "flora_error", None),
    ],
)
def test_each_error_has_its_answer(
    error: Exception, status: int, code: str, retry_after: str | None
) -> None:
    """The status, the code and, where another try makes sense, when."""
    fault = to_fault(error)
    assert fault is not None
    assert (fault.status, fault.code) == (status, code)
    assert fault.headers.get("Retry-After") == retry_after


def test_a_run_that_could_not_be_stored_is_named() -> None:
    """The caller learns which run is paid for, and asks again."""
    fault = to_fault(StartNotStored("no", run_id="run_1"))
    assert fault is not None
    assert (fault.status, fault.code, fault.headers["Retry-After"]) == (503, "not_stored", "5")
    assert fault.body()["error"]["run_id"] == "run_1"


def test_what_flora_says_of_a_request_comes_through_as_it_is() -> None:
    """Code, message and fields are FLORA's own."""
    fields = [FieldFault("inputs[0].value", "is too long")]
    error = FloraRefusal(
        status=400, code="input_validation_error", message="Check the inputs", fields=fields
    )
    fault = to_fault(error)
    assert fault is not None
    assert fault.body() == {
        "error": {
            "code": "input_validation_error",
            "message": "Check the inputs",
            "fields": [{"field": "inputs[0].value", "message": "is too long"}],
        }
    }


@pytest.mark.parametrize("error", [StoreError("a bad row"), KeyError("run"), ZeroDivisionError()])
def test_what_nobody_foresaw_has_none(error: Exception) -> None:
    """It becomes a 500, whose words are not the error's."""
    assert to_fault(error) is None
