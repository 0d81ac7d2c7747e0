"""Cases that take turns: many are alike, each is dear, and a fault shows in one as in another.

All of them run with `--every-database`. Without it a part of them runs each day, so that each has
its turn within a few days; `TRACKER_TEST_DAY=N` takes another day's part.
"""

import os
import time
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import pytest

T = TypeVar("T")

TODAY: Final = int(os.environ.setdefault("TRACKER_TEST_DAY", str(int(time.time() // 86_400))))
"""A day's number. All processes of the suite have the same one, past midnight too."""


def in_turn(cases: Sequence[T], *, of: int, thorough: bool = False) -> list[T]:
    """One of so many cases, or where that is thorough all of them."""
    return list(cases) if thorough else list(cases[TODAY % of :: of])


def has_turn(*, of: int, number: int = 0) -> bool:
    """Whether it is the turn of this one among so many."""
    return TODAY % of == number % of


def by_turns(cases: Sequence[Any], *, of: int) -> list[Any]:
    """The same as values of a parameter: those whose turn it is not are thorough."""
    return [
        case if has_turn(of=of, number=number) else pytest.param(case, marks=pytest.mark.thorough)
        for number, case in enumerate(cases)
    ]
