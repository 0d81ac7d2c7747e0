"""FLORA's errors: a status, a code, a message and, for bad input, the fields."""

from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import JSONResponse

CODES: Final[Mapping[str, int]] = {
    "invalid_json": 400,
    "input_validation_error": 400,
    "unauthorized": 401,
    "invalid_api_key": 401,
    "insufficient_credits": 402,
    "forbidden": 403,
    "paid_plan_required": 403,
    "not_found": 404,
    "conflict": 409,
    "rate_limited": 429,
    "internal_error": 500,
    "unknown_error": 500,
    "service_unavailable": 503,
}
"""FLORA's error codes, each with its status."""


class ErrorAnswer(Exception):
    """A handler raises it to answer with one of FLORA's errors.

    `fields` are pairs of a field's name and what is wrong with it.
    """

    def __init__(
        self, status: int, code: str, message: str, fields: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.fields = fields

    @classmethod
    def invalid(cls, *fields: tuple[str, str]) -> "ErrorAnswer":
        """A 400 for input that cannot be used, with the fields at fault."""
        return cls(400, "input_validation_error", "The input is not valid.", fields)

    @classmethod
    def not_found(cls, what: str) -> "ErrorAnswer":
        """A 404."""
        return cls(404, "not_found", f"There is no such {what}.")

    def response(self, *, details: bool = False) -> JSONResponse:
        """The answer in FLORA's shape; with `details` each field has a code and valid values."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.fields:
            error["fields"] = [
                {"field": name, "message": text} | (_details(text) if details else {})
                for name, text in self.fields
            ]
        return JSONResponse({"error": error}, self.status)


def _details(message: str) -> dict[str, Any]:
    start, _, values = message.partition("must be one of ")
    if not start and values:
        return {"code": "invalid_value", "valid_values": values.split(", ")}
    return {"code": "required" if message == "is required" else "invalid"}
