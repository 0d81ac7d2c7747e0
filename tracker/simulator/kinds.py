"""Kinds of options: what values one takes, from Python, from JSON or as text.

Each function here declares a dataclass field. Its metadata holds `help`, what the option does, and
`parse`, which returns the checked value and raises `ValueError` with the reason for any other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Final

Parse = Callable[[object], Any]

_FLAGS: Final = {"true": True, "false": False}


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


def share(help: str, default: float = 0.0) -> Any:
    """A number from 0 to 1: how many of the runs, or of the requests, are affected."""
    return _field(default, help, lambda value: parse_rate(str(_no_flag(value))), share=True)


def number(help: str, default: float | None = 0.0, *, low: float = 0.0) -> Any:
    """A finite number of at least `low`; also none where the default is None."""
    return _field(default, help, _or_none(default, lambda value: _number(value, low)))


def whole(help: str, default: int | None = 0) -> Any:
    """A whole number of at least 0; also none where the default is None."""
    return _field(default, help, _or_none(default, _whole))


def flag(help: str, default: bool = False) -> Any:
    """True or false."""
    return _field(default, help, _flag)


def choice(help: str, *names: str) -> Any:
    """One of `names`; the first is the default."""
    return _field(names[0], help, lambda value: _one_of(value, names))


def text(help: str, default: str, *, secret: bool = False) -> Any:
    """Text that is not empty. A secret is left out of what is printed of the options."""
    return _field(default, help, _text, secret=secret)


def listed(help: str, *default: Any, each: Parse | None = None) -> Any:
    """A tuple; as text its values are separated by commas."""

    def parse(value: object) -> tuple[Any, ...]:
        values = value.split(",") if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise ValueError("has to be a list")
        return tuple((each or _text)(one) for one in values if one != "")

    return _field(default, help, parse)


def table(help: str, each: Parse | None = None) -> Any:
    """A mapping from names to values; as text `name:value,name:value`."""

    def parse(value: object) -> dict[str, Any]:
        if isinstance(value, str):
            value = dict(part.partition(":")[::2] for part in value.split(",") if part)
        if not isinstance(value, Mapping):
            raise ValueError("has to be a table of names and values")
        return {_text(name): (each or _text)(one) for name, one in value.items()}

    return _field(dict, help, parse)


def positive(value: object) -> float:
    """A finite number above 0. Raises `ValueError` for any other value."""
    found = _number(value, 0)
    if found == 0:
        raise ValueError("has to be above 0")
    return found


def seconds(value: object) -> float:
    """A finite number of at least 0. Raises `ValueError` for any other value."""
    return _number(value, 0)


def _field(default: Any, help: str, parse: Parse, *, secret: bool = False, **more: bool) -> Any:
    metadata = {"help": help, "parse": parse, "secret": secret} | more
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, repr=not secret, metadata=metadata)


def _or_none(default: object, parse: Parse) -> Parse:
    def optional(value: object) -> Any:
        return None if default is None and value in (None, "", "none") else parse(value)

    return optional


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("has to be a number")
    return value


def _number(value: object, low: float) -> float:
    try:
        found = float(_no_flag(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError("has to be a number") from None
    if not (math.isfinite(found) and found >= low):
        raise ValueError(f"has to be {low:g} or more")
    return found


def _whole(value: object) -> int:
    found = _number(value, 0)
    if found != int(found):
        raise ValueError("has to be a whole number")
    return int(found)


def _flag(value: object) -> bool:
    found = _FLAGS.get(value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError("has to be true or false")
    return found


def _one_of(value: object, names: tuple[str, ...]) -> str:
    if str(value) not in names:
        raise ValueError(f"has to be {' or '.join(names)}")
    return str(value)


def _text(value: object) -> str:
    if not (isinstance(value, str) and value.strip()):
        raise ValueError("has to be text")
    return value.strip()
