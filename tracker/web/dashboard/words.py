"""Values as a person reads them. What is not known is said so, and never shown as 0."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from markupsafe import Markup

from tracker.store.text import clean

UNKNOWN: Final = "not known yet"
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


def money(value: Decimal | float | None) -> str:
    """USD: cents, and more digits only where there are any."""
    if value is None:
        return UNKNOWN
    exact = Decimal(str(value))
    cents = exact.quantize(Decimal("0.01"))
    if exact == cents:
        return f"${cents:,}"
    return f"${exact.quantize(Decimal('0.000001')).normalize():,f}"


def number(value: int | float | None) -> str:
    """A number with its thousands apart."""
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def percent(value: float | None) -> str:
    """A share as per cent: none and all only where it is exactly that."""
    if value is None:
        return UNKNOWN
    if 0 < value < 0.001:
        return "< 0.1 %"
    if 0.999 < value < 1:
        return "> 99.9 %"
    return f"{100 * value:.1f} %" if value not in (0, 1) else f"{100 * value:.0f} %"


def span(value: timedelta | float | None) -> str:
    """A duration, to two parts: `3 h 12 min`, `1.4 s`."""
    if value is None:
        return UNKNOWN
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if seconds < 0:
        return f"-{span(-seconds)}"
    if seconds < 1:
        return f"{round(1000 * seconds)} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    parts = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def size(count: int) -> str:
    """A number of bytes."""
    return f"{count:,} bytes" if count < 10_000 else f"{count / 1024:,.1f} KiB"


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
    "span": span,
    "size": size,
    "pretty": pretty,
    "raw": raw,
    "compact": compact,
}
"""By these names the templates know them."""
