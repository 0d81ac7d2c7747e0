"""A share of many cases that are alike: each is dear, and a fault shows in one as in another.

All of them run with `--every-database`; without it one of so many, always the same ones.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def share_of(cases: Sequence[T], *, of: int, thorough: bool = False) -> list[T]:
    """One of so many cases, or where that is thorough all of them."""
    return list(cases) if thorough else list(cases[::of])


def shared(cases: Sequence[Any], *, of: int) -> list[Any]:
    """The same as values of a parameter: all but one of so many are thorough."""
    return [
        pytest.param(case, marks=pytest.mark.thorough) if number % of else case
        for number, case in enumerate(cases)
    ]
