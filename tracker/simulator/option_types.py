"""Types of options: which values an option takes, from Python, from JSON or as text."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, Strict, StringConstraints

T = TypeVar("T")


def option(help: str, default: Any = 0, *, secret: bool = False) -> Any:
    """An option that may be changed while the simulator runs. A secret is not shown."""
    return Field(default, description=help, repr=not secret)


def flag(help: str, default: bool = False) -> Any:
    """An option that is true or false."""
    return option(help, default)


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


def _flag(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _none(value: object) -> object:
    return None if value in ("", "none") else value


def _listed(value: object) -> object:
    return [one for one in value.split(",") if one] if isinstance(value, str) else value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _table(value: object) -> object:
    if isinstance(value, str):
        return dict(part.partition(":")[::2] for part in value.split(",") if part)
    return value


Share = Annotated[float, BeforeValidator(lambda value: parse_rate(str(value)))]
"""A number from 0 to 1: the share of the runs, or of the requests, that is affected."""
Flag = Annotated[bool, Strict(), BeforeValidator(_flag)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(_number)]
"""A whole number; as text also `1e5`."""
AsText = BeforeValidator(str)
"""For words of which some are numbers: JSON may have them as numbers."""
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Maybe = Annotated[T | None, BeforeValidator(_none)]
"""A value or none, as text `none`."""
Listed = Annotated[tuple[T, ...], BeforeValidator(_listed)]
"""Values; as text they are separated by commas."""
Table = Annotated[Mapping[Text, T], BeforeValidator(_table)]
"""A mapping from names to values; as text `name:value,name:value`."""
