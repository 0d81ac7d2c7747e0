"""Numbers, amounts, durations and sizes for people, and untrusted text.

An unknown value is never shown as 0.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal, InvalidOperation
from typing import Any, Final

UNKNOWN: Final = "unknown"
_REQUIREMENTS: Final = {
    "missing": "is missing",
    "extra_forbidden": "is not a known field",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "frozen_set_type": "must be a list",
}
_DETAIL: Final = re.compile(r" after validation, not \d+$|, unable to parse .*$")
_TIMEDELTA: Final = re.compile(r"datetime\.timedelta\((?:days=(\d+))?(?:, )?(?:seconds=(\d+))?0?\)")


def requirement(kind: str, message: str) -> str:
    """What a value must be, from the type and message of a validation error of pydantic.

    It is the predicate of a sentence whose subject is the field: `must be a valid integer`.
    """
    message = re.sub(r"^[A-Z][a-z]+ should ", "must ", message.removeprefix("Value error, "))
    message = _TIMEDELTA.sub(_as_written, message)
    if kind == "too_short" and "at least 1 " in message:
        return "must not be empty"
    return _REQUIREMENTS.get(kind) or _DETAIL.sub("", message)


def _as_written(found: re.Match[str]) -> str:
    """A timedelta as settings have it: `110m`, `7d`."""
    seconds = int(found[1] or 0) * 86400 + int(found[2] or 0)
    for unit, length in (("d", 86400), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def iso_time(value: datetime) -> str:
    """A time for programs, as the API shows it: ISO 8601 in UTC, to the microsecond, with `Z`."""
    return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def moment(at: datetime) -> str:
    """A time for people, in UTC, to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def money(value: Decimal | float) -> str:
    """USD to the cent, with up to nine digits where there are any: `$0.25`, `$0.0125`."""
    exact = Decimal(str(value))
    cents = exact.quantize(Decimal("0.01"), context=_ANY_AMOUNT)
    if exact == cents:
        return f"${cents:,}"
    digits = exact.quantize(Decimal("0.000000001"), context=_ANY_AMOUNT)
    return f"${digits.normalize(_ANY_AMOUNT):,f}"


_ANY_AMOUNT: Final = Context(prec=400)
"""With digits for every amount that FLORA can show, a 64-bit float: the default has 28."""


def parse_usd(value: str | float | Decimal) -> Decimal:
    """An amount of USD, 0 or more, as a person writes it. Raises `ValueError`."""
    try:
        amount = Decimal(str(value).strip().removeprefix("$"))
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or amount < 0:
        raise ValueError(f"{str(value)!r} is not an amount of USD")
    return amount


def number(value: int | float) -> str:
    """A number with thousands separators."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def percent(value: float) -> str:
    """A share of 1 as a percentage; 0 % and 100 % only where it is exactly that."""
    if 0 < value < 0.001:
        return "< 0.1 %"
    if 0.999 < value < 1:
        return "> 99.9 %"
    return f"{100 * value:.1f} %" if value not in (0, 1) else f"{100 * value:.0f} %"


def duration(value: timedelta | float) -> str:
    """A duration, in seconds or as a timedelta, in its two largest units: `3 h 12 min`, `1.4 s`."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 1:
        return f"{round(1000 * seconds)} ms"
    if seconds < 10:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    rest = round(seconds)
    parts = []
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def size(count: int) -> str:
    """A number of bytes: `812 bytes`, `24.0 KiB`, `1.5 GiB`."""
    if count < 10_000:
        return f"{count:,} bytes"
    amount, units = count / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:,.1f} {units[0]}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: `1 run`, `2,000 runs`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def line_numbers(lines: Sequence[int], noun: str = "line", most: int = 10) -> str:
    """Lines of a file: `line 2`, `lines 2 and 5-9`; beyond `most` parts the rest is counted."""
    parts: list[list[int]] = []
    for line in sorted(lines):
        if parts and line == parts[-1][-1] + 1:
            parts[-1].append(line)
        else:
            parts.append([line])
    # Two lines are no range: `lines 3 and 4`.
    parts = [one for part in parts for one in ([[n] for n in part] if len(part) == 2 else [part])]
    shown = [f"{part[0]}-{part[-1]}" if part[1:] else str(part[0]) for part in parts[:most]]
    if rest := sum(map(len, parts[most:])):
        shown.append(f"{rest:,} more")
    text = " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
    return f"{noun} {text}" if len(lines) == 1 else f"{noun}s {text}"


# Untrusted text in a spreadsheet.

_FORMULA: Final = re.compile(
    r"[=+\-@\t\r\n"
    r"\uff1d\uff0b\uff0d\uff20]"  # the same signs in full width, which some Excels read alike
)
_NUMBER: Final = re.compile(r"[+-]?\d[\d.,]*")


def safe_cell(value: Any) -> str:
    """A cell of CSV; text that a spreadsheet would take for a formula gets a `'` in front.

    Truth values are written as in JSON, which every spreadsheet reads.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    text = str(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def csv_text(rows: Iterable[Iterable[Any]], *, delimiter: str = ",") -> str:
    """Rows of cells as lines of CSV, each cell as `safe_cell` writes it."""
    lines = io.StringIO()
    writer = csv.writer(lines, delimiter=delimiter, lineterminator="\n")
    writer.writerows(map(safe_cell, row) for row in rows)
    return lines.getvalue()


# Untrusted text on a terminal: control characters are escaped.
#
# Names, messages, headers and links may hold characters that move the cursor, change the title,
# clear the screen or reverse the direction of a line.

_STEERS: Final = (
    "\0-\x1f\x7f-\x9f"  # control characters, the escape among them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of the text that follows
    "\u2028\u2029"  # line ends
    "\ud800-\udfff"  # halves of characters, which no terminal's encoding holds
)
_IN_A_LINE: Final = re.compile(f"[{_STEERS}]")
_IN_LINES: Final = re.compile(f"(?![\t\n])[{_STEERS}]")


_UNFIT: Final = re.compile("[\0\ud800-\udfff]")
_TURNS: Final = re.compile("[\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """`text` with NUL and lone surrogates, which no database stores, replaced by U+FFFD; `text`
    itself where there are none."""
    if text.isascii() and "\0" not in text:  # nearly always, and quick
        return text
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


def plain(text: str) -> str:
    """`text` on one line, with escapes such as `\\x1b` in place of control characters."""
    return text if text.isprintable() else _IN_A_LINE.sub(_escape, text)


def plain_lines(text: str) -> str:
    """Like `plain`, but keeps tabs and line ends."""
    return text if text.isprintable() else _IN_LINES.sub(_escape, text)


def unturned(text: str) -> str:
    """`text` with escapes such as `\\u202e` in place of the characters that turn the direction of
    what follows them, with which a name can look like another one. Right-to-left letters stay."""
    return text if text.isascii() else _TURNS.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
