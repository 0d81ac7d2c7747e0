"""Panels and rows, with the options that the two dashboards need."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["stat", "lines", "bars", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Show:
    """One panel. `queries` are queries with their legends; `about` says how to read it.

    `limits` are the values from which it is amber and red; `width` is in 24ths of the page.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    about: str
    kind: Kind = "lines"
    unit: str = "short"
    width: int = 8
    limits: tuple[float | None, float | None] = (None, None)
    decimals: int | None = None
    most: float | None = None
    words: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Text and colour for values of a stat."""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Show, ...]
