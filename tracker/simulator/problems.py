"""FLORA's errors: a status, a code, a message and, for bad input, the fields."""

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse


class Problem(Exception):
    """What a handler raises to answer with one of FLORA's errors.

    `fields` are pairs of a field's name and what is wrong with it.
    """

    def __init__(
        self, status: int, code: str, message: str, fields: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.fields = tuple(fields)

    @classmethod
    def invalid(cls, *fields: tuple[str, str]) -> "Problem":
        """A 400 for input that cannot be used, with the fields at fault."""
        return cls(400, "input_validation_error", "The input is not valid.", fields)

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
    """`code` and `valid_values` of a field, which follow from what is wrong with it."""
    start, _, values = message.partition("must be one of ")
    if not start and values:
        return {"code": "invalid_value", "valid_values": values.split(", ")}
    return {"code": "required" if message == "is required" else "invalid"}
