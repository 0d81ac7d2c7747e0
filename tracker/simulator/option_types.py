"""Types of options: which values an option takes, from Python, from JSON or as text.

The functions from `share` to `table` declare a dataclass field. Its metadata holds `help`, what the
option does, `parse`, which returns the checked value and raises `ValueError` with the reason for
any other, and whether it is `secret`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Final

Parse = Callable[[object], Any]

_NONE: Final = (None, "", "none")


def share(help: str, default: float = 0.0) -> Any:
    """A number from 0 to 1: the share of the runs, or of the requests, that is affected."""
    return _option(default, help, lambda value: parse_rate(str(_no_flag(value))))


def number(help: str, default: float | None = 0.0, *, low: float = 0.0) -> Any:
    """A finite number of at least `low`; also none where the default is None."""
    return _option(default, help, lambda value: parse_number(value, low))


def whole(help: str, default: int | None = 0) -> Any:
    """A whole number of at least 0; also none where the default is None."""
    return _option(default, help, _whole)


def flag(help: str, default: bool = False) -> Any:
    """True or false."""
    return _option(default, help, _flag)


def choice(help: str, *names: str) -> Any:
    """One of `names`; the first is the default."""
    return _option(names[0], help, one_of(*names))


def text(help: str, default: str, *, secret: bool = False) -> Any:
    """Text that is not empty. A secret does not appear in the `repr` of the options."""
    return _option(default, help, _text, secret=secret)


def listed(help: str, *default: Any, each: Parse | None = None) -> Any:
    """A tuple; as text its values are separated by commas."""

    def parse(value: object) -> tuple[Any, ...]:
        values = value.split(",") if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise ValueError("has to be a list")
        return tuple((each or _text)(one) for one in values if one != "")

    return _option(default, help, parse)


def table(help: str, each: Parse | None = None) -> Any:
    """A mapping from names to values; as text `name:value,name:value`."""

    def parse(value: object) -> dict[str, Any]:
        if isinstance(value, str):
            value = dict(part.partition(":")[::2] for part in value.split(",") if part)
        if not isinstance(value, Mapping):
            raise ValueError("has to be a table of names and values")
        return {_text(name): (each or _text)(one) for name, one in value.items()}

    return _option(dict, help, parse)


def parse_rate(text: str) -> float:
    """A share from `0.4` or `40%`.

    Raises `ValueError` for what is no number or lies outside 0 to 1 (0 % to 100 %).
    """
    number = text.strip()
    try:
        rate = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a share: give 0 to 1, or 0% to 100%") from None
    if not 0 <= rate <= 1:
        raise ValueError(f"{rate:g} is not a share: give 0 to 1, or 0% to 100%")
    return rate


def parse_number(value: object, low: float = 0.0) -> float:
    """A finite number of at least `low`. Raises `ValueError` for any other value."""
    try:
        found = float(_no_flag(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError("has to be a number") from None
    if not (math.isfinite(found) and found >= low):
        raise ValueError(f"has to be {low:g} or more")
    return found


def parse_positive(value: object) -> float:
    """A finite number above 0. Raises `ValueError` for any other value."""
    found = parse_number(value)
    if found == 0:
        raise ValueError("has to be above 0")
    return found


def one_of(*names: str) -> Parse:
    """One of `names`."""

    def parse(value: object) -> str:
        if str(value) not in names:
            raise ValueError(f"has to be one of {', '.join(names)}")
        return str(value)

    return parse


def _option(default: Any, help: str, parse: Parse, *, secret: bool = False) -> Any:
    def parse_or_none(value: object) -> Any:
        return None if value in _NONE else parse(value)

    accepts = parse_or_none if default is None else parse
    metadata = {"help": help, "parse": accepts, "secret": secret}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, repr=not secret, metadata=metadata)


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("has to be a number")
    return value


def _whole(value: object) -> int:
    found = parse_number(value)
    if found != int(found):
        raise ValueError("has to be a whole number")
    return int(found)


def _flag(value: object) -> bool:
    found = {"true": True, "false": False}.get(value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError("has to be true or false")
    return found


def _text(value: object) -> str:
    if not (isinstance(value, str) and value.strip()):
        raise ValueError("has to be text")
    return value.strip()
