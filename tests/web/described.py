"""Answers of the API against the models that describe them in `/openapi.json`."""

import re
from functools import cache

import httpx
from pydantic import BaseModel, ValidationError

from tracker.web.api import Operation
from tracker.web.api.responses import Error
from tracker.web.api.routes import OPERATIONS


@cache
def _patterns() -> list[tuple[re.Pattern[str], Operation]]:
    return [(re.compile(re.sub(r"{\w+}", "[^/]+", one.path)), one) for one in OPERATIONS]


async def check_described(response: httpx.Response) -> None:
    """A hook of a client: an answer of `/api` has exactly the fields of its model."""
    request, path = response.request, response.request.url.raw_path.decode().partition("?")[0]
    is_json = response.headers.get("content-type", "").startswith("application/json")
    if not path.startswith("/api/") or request.method == "HEAD" or not is_json:
        return
    await response.aread()
    if response.is_error:
        _check(Error, response.content)
        return
    operation = next(
        one
        for pattern, one in _patterns()
        if one.method == request.method and pattern.fullmatch(path)
    )
    model = operation.answers[response.status_code].model
    assert model is not None, f"{request.method} {path} is described as text"
    _check(model, response.content)


def _check(model: type[BaseModel], content: bytes) -> None:
    try:
        model.model_validate_json(content, strict=True)
    except ValidationError as error:
        # A word that only a newer version knows is shown as it is stored.
        if any(one["type"] not in ("enum", "literal_error") for one in error.errors()):
            raise
