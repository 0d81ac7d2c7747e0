"""Amounts for people."""

from decimal import Decimal

import pytest

from tracker.core.formatting import money


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
