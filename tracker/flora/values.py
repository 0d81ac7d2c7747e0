"""One JSON value at a time: what may be believed of it, and what it becomes.

Each reader takes whatever stands in a field and gives `None` where it is of the wrong kind or says
nothing, so that one odd value never costs a whole answer. None of them knows a field's name.
"""

import json
import math
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import orjson

from tracker.core.errors import FloraUnreadable

LONGEST_ID: Final = 255
_LONGEST_INTEGER: Final = 40
"""Digits."""
LARGEST_NUMBER: Final = 1e15
"""Beyond the year 9999 in milliseconds, and still exact as a float."""
MILLISECONDS_FROM: Final = 1e11
"""A time of this size or more is in milliseconds."""
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


def decode(body: bytes) -> object:
    """The JSON value that `body` holds. Raises `FloraUnreadable`.

    What orjson refuses is given to the standard library, which reads lone surrogates as well:
    JavaScript writes them where it has cut a text in the middle of an emoji.
    """
    try:
        return orjson.loads(body)
    except ValueError:
        pass
    try:
        return json.loads(body.decode(), parse_int=_integer)
    except (ValueError, RecursionError) as exc:
        raise FloraUnreadable("the body is not JSON") from exc


def _integer(digits: str) -> int | float:
    """Python refuses to read integers of thousands of digits; nothing that FLORA counts is one."""
    return int(digits) if len(digits) <= _LONGEST_INTEGER else math.inf


def as_object(value: object) -> dict[str, Any]:
    """A JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def as_objects(value: object) -> tuple[dict[str, Any], ...]:
    """The objects among the items of a list."""
    if not isinstance(value, list):
        return ()
    return tuple(item for item in value if isinstance(item, dict))


def depth_within(value: object, levels: int) -> bool:
    """Whether lists and objects are nested no deeper than so."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(depth_within(item, levels - 1) for item in inner)


def as_text(value: object) -> str | None:
    """A text that is not empty.

    NUL and lone surrogates, which no database holds, are replaced here already: what is read again
    must equal what was stored, or every sight would look like news.
    """
    if not isinstance(value, str) or not value:
        return None
    return value if value.isprintable() else _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value)


def as_id(value: object) -> str | None:
    """A text short enough to name something."""
    if type(value) is str and 0 < len(value) <= LONGEST_ID and value.isprintable():
        return value  # as nearly all are
    text = as_text(value)
    return text if text is not None and len(text) <= LONGEST_ID else None


def as_number(value: object) -> int | float | None:
    """A number of a sane size: not NaN, nor a truth value, which to Python is a number, too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -LARGEST_NUMBER < value < LARGEST_NUMBER else None


def as_percent(value: object) -> float | None:
    """A number, brought between 0 and 100."""
    number = as_number(value)
    return None if number is None else float(min(max(number, 0), 100))


def as_time(value: object) -> datetime | None:
    """A Unix time in seconds or milliseconds, as aware UTC; 0, FLORA's "never", is none."""
    number = as_number(value)
    if number is None or number <= 0:
        return None
    try:
        seconds = number / 1000 if number >= MILLISECONDS_FROM else number
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # after the year 9999
        return None


def as_dollars(value: object) -> Decimal | None:
    """An amount of USD, 0 or more, by way of the number's shortest decimal form."""
    number = as_number(value)
    return None if number is None or number < 0 else Decimal(str(number))
