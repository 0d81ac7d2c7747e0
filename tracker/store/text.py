"""Text and JSON made fit for both databases.

PostgreSQL's text holds neither NUL nor half a surrogate pair, and UTF-8 none of the latter. Both
are replaced by U+FFFD before observations are merged, so that the merged values are the stored
ones.
"""

import math
from dataclasses import replace
from typing import Any, Final, TypeVar

import orjson

from tracker.core.formatting import clean
from tracker.core.observation import Observation
from tracker.core.record import Entry, Observed
from tracker.core.run import Output

T = TypeVar("T")

_INT64: Final = 2**63


def dump_json(value: Any) -> str:
    """`value` as JSON text that both engines take.

    Numbers that JSON or the databases cannot hold become floats or null. Raises `ValueError` for
    values that are no JSON, or are nested too deep.
    """
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # orjson refuses surrogates and integers of more than 64 bits
        text = _dump_cleaned(value)
    else:
        if "\\u0000" in text:
            text = _dump_cleaned(value)
    return text


def clean_json(value: T) -> T:
    """`value` as a database returns it; `value` itself if that is equal."""
    fit: T = orjson.loads(dump_json(value))
    return value if fit == value else fit


def clean_entry(entry: Entry) -> Entry:
    """`entry` with all its text cleaned; `entry` itself if nothing changes."""
    if isinstance(entry, Observed):
        seen = clean_observation(entry.observation)
        inputs = None if entry.inputs is None else clean_json(entry.inputs)
        if seen is entry.observation and inputs is entry.inputs:
            return entry
        return replace(entry, observation=seen, inputs=inputs)
    changes = _cleaned(entry, ("run_id", "error"))
    return replace(entry, **changes) if changes else entry


def clean_observation(seen: Observation) -> Observation:
    """`seen` with all its text cleaned; `seen` itself if nothing changes."""
    changes = _cleaned(seen, _OBSERVATION_TEXTS)
    if seen.error is not None and (texts := _cleaned(seen.error, ("code", "message"))):
        changes["error"] = replace(seen.error, **texts)
    if seen.outputs is not None:
        outputs = tuple(
            Output(clean(output.output_id), clean(output.type), clean(output.url))
            for output in seen.outputs
        )
        if outputs != seen.outputs:
            changes["outputs"] = outputs
    return replace(seen, **changes) if changes else seen


_OBSERVATION_TEXTS: Final = (
    *("run_id", "run_type", "workspace_id", "project_id"),
    *("technique_id", "technique_name", "poll_url"),
)


def _cleaned(holder: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the attributes whose text changes, with the cleaned text."""
    changes: dict[str, Any] = {}
    for name in names:
        text = getattr(holder, name)
        if text is not None and (fit := clean(text)) != text:
            changes[name] = fit
    return changes


def _dump_cleaned(value: Any) -> str:
    try:
        return orjson.dumps(_clean_value(value)).decode()
    except (TypeError, RecursionError) as exc:
        raise ValueError(f"this cannot be stored as JSON: {exc}") from exc


def _clean_value(value: Any) -> Any:
    match value:
        case str():
            return clean(value)
        case bool():
            return value
        case int() if not -_INT64 <= value < _INT64:
            return _float(value)
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {clean(str(key)): _clean_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_clean_value(item) for item in value]
    return value


def _float(value: int) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None
