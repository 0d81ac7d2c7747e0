"""Answers in JSON."""

import json
from typing import Any

import orjson
from starlette.responses import Response


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of `content`."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """`content` in one line. Half a surrogate pair, which UTF-8 cannot hold, becomes its escape."""
    try:
        return orjson.dumps(content)
    except TypeError:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
