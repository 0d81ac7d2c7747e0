"""Values as a person reads them. What is not known is said so, and never shown as 0."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from markupsafe import Markup

from tracker.core.formatting import UNKNOWN, duration, money, number, percent, size
from tracker.store.text import clean

FORMATTED: Final = 16 * 1024
"""JSON of more bytes is not formatted: indentation multiplies it."""
DEEPEST: Final = 32
"""Nor is JSON that is nested more deeply."""


def time(at: datetime | None, style: str = "ago") -> Markup:
    """A `<time>`: UTC as it stands, which the page's script tells in the viewer's zone.

    `style` is "ago" (how long since, or until), "clock" or "full".
    """
    if at is None:
        return Markup('<span class="unknown">{}</span>').format(UNKNOWN)
    at = at.astimezone(UTC)
    exact = f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d} UTC"
    return Markup('<time datetime="{}" title="{}" data-style="{}">{}</time>').format(
        at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        exact,
        style,
        f"{at:%Y-%m-%d %H:%M:%S} UTC",
    )


def pretty(body: bytes) -> str | None:
    """JSON, formatted; `None` for what is none, and for what is too large or too deep."""
    if len(body) > FORMATTED:
        return None
    try:
        value = json.loads(body)
        if _is_deeper(value, DEEPEST):
            return None
        return clean(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return None


def raw(body: bytes) -> str:
    """Bytes as text, with a mark for each that is none."""
    return body.decode(errors="replace")


def compact(value: Any) -> str:
    """A value of JSON, formatted; in one line where it is too large or too deep for that."""
    line = json.dumps(value, ensure_ascii=False, default=str)
    if len(line) > FORMATTED or _is_deeper(value, DEEPEST):
        return line
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether more than `depth` lists and objects contain each other."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(one, depth - 1) for one in inner)


FILTERS: Final[Mapping[str, Any]] = {
    "time": time,
    "money": money,
    "number": number,
    "percent": percent,
    "duration": duration,
    "size": size,
    "pretty": pretty,
    "raw": raw,
    "compact": compact,
}
"""By these names the templates know them."""
