"""Amounts and line numbers for people."""

from decimal import Decimal

import pytest

from tracker.core.formatting import line_numbers, money


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        ("0", "$0.00"),
        ("1.5", "$1.50"),
        ("0.005", "$0.005"),
        ("1200", "$1,200.00"),
        ("1E+2", "$100.00"),
        ("0.0000004", "$0.0000004"),
        ("12.345678901", "$12.345678901"),
    ],
)
def test_amounts_are_shown_to_the_last_digit(amount: str, shown: str) -> None:
    """Cents always, and smaller parts down to billionths, in which amounts are stored."""
    assert money(Decimal(amount)) == shown


def test_lines_are_listed_shortly() -> None:
    """Three in a row are a range; beyond ten parts the rest is counted."""
    assert line_numbers([7]) == "line 7"
    assert line_numbers([4, 3]) == "lines 3 and 4"
    assert line_numbers([2, 9, 5, 6, 7]) == "lines 2, 5-7 and 9"
    assert line_numbers(range(1, 30, 2)) == "lines 1, 3, 5, 7, 9, 11, 13, 15, 17, 19 and 5 more"
    assert line_numbers([1, 2], "row") == "rows 1 and 2"
