"""Text and JSON made fit for both databases.

PostgreSQL's text holds neither NUL nor half a surrogate pair, and UTF-8 none of the latter. Both
are replaced by U+FFFD before observations are merged, so that the merged values are the stored
ones.
"""

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, TypeVar

import orjson

from tracker.core.formatting import clean
from tracker.core.observation import Observation
from tracker.core.record import FailedRead, Observed
from tracker.core.run import Output, RunError

T = TypeVar("T")

_INT64: Final = 2**63


def dump_json(value: Any) -> str:
    """`value` as JSON text that both engines take.

    Numbers that JSON or the databases cannot hold become floats or null. Raises `ValueError` for
    values that are no JSON, or are nested too deep.
    """
    with suppress(TypeError):  # orjson refuses surrogates and integers of more than 64 bits
        text = orjson.dumps(value).decode()
        if "\\u0000" not in text:
            return text
    try:
        return orjson.dumps(_clean_value(value)).decode()
    except (TypeError, RecursionError) as exc:
        raise ValueError(f"this cannot be stored as JSON: {exc}") from exc


_TEXTS: Final[dict[type, tuple[str, ...]]] = {
    Observed: ("observation", "inputs"),
    FailedRead: ("run_id", "error"),
    Observation: (
        *("run_id", "run_type", "workspace_id", "project_id", "technique_id", "technique_name"),
        *("poll_url", "error", "outputs"),
    ),
    RunError: ("code", "message"),
    Output: ("output_id", "type", "url"),
}
"""The attributes with text in them."""


def cleaned(value: T) -> T:
    """`value`, an entry or any text or JSON in one, as a database returns it; `value` itself if
    that is equal."""
    made: Any = value
    if isinstance(value, str):
        made = clean(value)
    elif isinstance(value, tuple):
        made = tuple(map(cleaned, value))
    elif (names := _TEXTS.get(type(value))) is None:
        made = orjson.loads(dump_json(value))
    else:
        changes = {}
        for name in names:
            one = getattr(value, name)
            if one is not None and (fit := cleaned(one)) is not one:
                changes[name] = fit
        if changes:
            made = replace(made, **changes)
    return value if made is value or made == value else made


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
