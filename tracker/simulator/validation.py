"""What a start must look like; everything else is refused with FLORA's `fields`."""

import json
from dataclasses import dataclass
from itertools import product
from typing import Any, Final
from urllib.parse import urlsplit

from tracker.simulator.catalogue import Port, Technique
from tracker.simulator.destination import refusal
from tracker.simulator.problems import Problem

INPUT_TYPES: Final = ("text", "imageUrl", "videoUrl")
MODES: Final = ("async", "stream")
GENERATION_TYPES: Final = ("image", "video", "audio", "text")

Fields = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class TechniqueStart:
    """A start of a technique that may run."""

    inputs: tuple[dict[str, Any], ...]
    callback_url: str | None
    idempotency_key: str | None

    @property
    def unreachable(self) -> bool:
        """Whether an input links to a host under `.invalid`, which never answers."""
        return any(
            item["type"] != "text" and (urlsplit(item["value"]).hostname or "").endswith(".invalid")
            for item in self.inputs
        )

    def each(self, technique: Technique, *, apart: bool) -> list[tuple[dict[str, Any], ...]]:
        """The inputs of each run: of one, or with `apart` of one for each value of an input."""
        if not apart:
            return [self.inputs]
        several = {port.id for port in technique.inputs if port.several}
        values: dict[object, list[dict[str, Any]]] = {}
        for number, item in enumerate(self.inputs):
            values.setdefault(item["id"] if item["id"] in several else number, []).append(item)
        return list(product(*values.values()))


@dataclass(frozen=True, slots=True)
class GenerationStart:
    """A start of a generation that may run."""

    type: str
    model: str
    callback_url: str | None
    idempotency_key: str | None


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. Raises `Problem` where there is none."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise Problem(400, "invalid_json", "The body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise Problem.invalid(("body", "must be an object"))
    return body


async def check_technique_start(body: dict[str, Any], technique: Technique) -> TechniqueStart:
    """The start in `body`. Raises `Problem` with every field that is wrong."""
    wrong = _wrong_inputs(body.get("inputs"), technique)
    if body.get("mode") not in MODES:
        wrong.append(("mode", f"must be one of {', '.join(MODES)}"))
    callback_url, key = await _common(body, wrong)
    if wrong:
        raise Problem.invalid(*wrong)
    return TechniqueStart(tuple(body["inputs"]), callback_url, key)


async def check_generation_start(body: dict[str, Any], workspace_id: str) -> GenerationStart:
    """The start in `body`. Raises `Problem` with every field that is wrong."""
    wrong: Fields = []
    prompt = body.get("prompt")
    if not (isinstance(prompt, str) and prompt.strip()):
        wrong.append(("prompt", "is required"))
    kind = body.get("type", "image")
    if kind not in GENERATION_TYPES:
        wrong.append(("type", f"must be one of {', '.join(GENERATION_TYPES)}"))
    model = body.get("model", f"{kind}-standard")
    if not isinstance(model, str):
        wrong.append(("model", "must be a string"))
    if body.get("workspace_id", workspace_id) != workspace_id:
        wrong.append(("workspace_id", "is not the workspace of this key"))
    callback_url, key = await _common(body, wrong)
    if wrong:
        raise Problem.invalid(*wrong)
    return GenerationStart(kind, model, callback_url, key)


async def _common(body: dict[str, Any], wrong: Fields) -> tuple[str | None, str | None]:
    """The callback address and the idempotency key, which every start may carry."""
    callback_url, key = body.get("callback_url"), body.get("idempotency_key")
    if callback_url is not None:
        text = isinstance(callback_url, str)
        reason = await refusal(callback_url) if text else "must be a string"
        if reason is not None:
            wrong.append(("callback_url", reason))
    if key is not None and not (isinstance(key, str) and key):
        wrong.append(("idempotency_key", "must be a string that is not empty"))
    return callback_url, key


def _wrong_inputs(inputs: object, technique: Technique) -> Fields:
    if not isinstance(inputs, list) or not inputs:
        return [("inputs", "must be a list of at least one input")]
    ports = {port.id: port for port in technique.inputs}
    wrong: Fields = []
    given: set[str] = set()
    for position, item in enumerate(inputs):
        at = f"inputs[{position}]"
        if not isinstance(item, dict) or not isinstance(item.get("id"), str):
            wrong.append((at, "must be an object with id, type and value"))
            continue
        port = ports.get(item["id"])
        if port is None:
            wrong.append((f"{at}.id", f"the technique has no input {item['id']!r}"))
            continue
        if port.id in given and not port.several:
            wrong.append((f"{at}.id", f"the input {port.id!r} takes one value only"))
        given.add(port.id)
        wrong += _wrong_value(at, item, port)
    missing = [port.id for port in technique.inputs if not port.optional and port.id not in given]
    return wrong + [(f"inputs.{name}", "is required") for name in missing]


def _wrong_value(at: str, item: dict[str, Any], port: Port) -> Fields:
    kind, value = item.get("type"), item.get("value")
    if kind not in INPUT_TYPES:
        return [(f"{at}.type", f"must be one of {', '.join(INPUT_TYPES)}")]
    if kind != port.accepts:
        return [(f"{at}.type", f"the input {port.id!r} takes {port.accepts}")]
    if not isinstance(value, str) or not value:
        return [(f"{at}.value", "must be a string that is not empty")]
    if port.takes_link and not _is_link(value):
        return [(f"{at}.value", "must be an http or https link")]
    return []


def _is_link(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False
