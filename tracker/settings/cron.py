"""A cron expression: five fields as cron reads them, 0 and 7 both Sunday."""

import re
from typing import Final

_MONTHS: Final = (
    "jan",
    "feb",
    "mar",
    "apr",
    "may",
    "jun",
    "jul",
    "aug",
    "sep",
    "oct",
    "nov",
    "dec",
)
_DAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")

_FIELDS: Final[tuple[tuple[str, int, int, dict[str, int]], ...]] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of week", 0, 7, {name: number for number, name in enumerate(_DAYS)}),
)
_PART: Final = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?", re.ASCII)


def check_cron(expression: str) -> str:
    """The expression in lower case, single-spaced. Raises `ValueError` naming the wrong field."""
    fields = expression.lower().split()
    if len(fields) != len(_FIELDS):
        raise ValueError(
            "must have five fields (minute, hour, day of month, month, day of week), "
            f"as */5 * * * * has; this has {len(fields)}"
        )
    for field, (name, low, high, names) in zip(fields, _FIELDS, strict=True):
        if not all(_reads(part, low, high, names) for part in field.split(",")):
            raise ValueError(
                f"has a {name} that cron does not read, {field!r}: "
                f"numbers from {low} to {high}, ranges, lists and steps"
            )
    return " ".join(fields)


def _reads(part: str, low: int, high: int, names: dict[str, int]) -> bool:
    """Whether a part of a list is `*`, a number or name, or a range of them, maybe with a step."""
    found = _PART.fullmatch(part)
    if found is None:
        return False
    first, last, step = found.groups()
    ends = [_number(end, names) for end in (first, last) if end is not None]
    return (
        all(low <= end <= high for end in ends)
        and ends == sorted(ends)
        and (step is None or 1 <= int(step) <= high)
    )


def _number(text: str, names: dict[str, int]) -> int:
    return names.get(text, int(text) if text.isdecimal() else -1)
