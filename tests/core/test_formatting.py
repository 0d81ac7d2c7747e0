"""Amounts, line numbers and requirements for people, cells of CSV, and times for programs."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from tracker.core.formatting import iso_time, line_numbers, money, requirement, safe_cell


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
        ("1E+27", f"${10**27:,}.00"),
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


def test_cells_of_csv_have_the_values_of_json() -> None:
    """An unknown value is empty, and an amount has no exponent."""
    cells = [True, False, None, Decimal("1E+2"), 3]
    assert [safe_cell(cell) for cell in cells] == ["true", "false", "", "100", "3"]


@pytest.mark.parametrize(
    ("kind", "message", "said"),
    [
        ("missing", "Field required", "is missing"),
        ("model_type", "Input should be a valid dictionary or instance of B", "must be an object"),
        ("list_type", "Input should be a valid list", "must be a list"),
        ("value_error", "Value error, 'x' is not KEY=VALUE", "'x' is not KEY=VALUE"),
        (
            "int_parsing",
            "Input should be a valid integer, unable to parse string as an integer",
            "must be a valid integer",
        ),
        (
            "too_long",
            "List should have at most 9 items after validation, not 10",
            "must have at most 9 items",
        ),
        (
            "less_than_equal",
            "Input should be less than or equal to datetime.timedelta(seconds=6600)",
            "must be less than or equal to 110m",
        ),
        (
            "greater_than",
            "Input should be greater than datetime.timedelta(0)",
            "must be greater than 0s",
        ),
        (
            "less_than_equal",
            "Input should be less than or equal to datetime.timedelta(days=1, seconds=1)",
            "must be less than or equal to 86401s",
        ),
    ],
)
def test_a_requirement_is_a_predicate(kind: str, message: str, said: str) -> None:
    """Whatever pydantic calls it."""
    assert requirement(kind, message) == said


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=-5))])
def test_a_time_for_programs_is_in_utc_with_z(zone: timezone) -> None:
    """The form of the API, whatever the zone of the value; such texts sort as the times do."""
    at = datetime(2026, 11, 28, 3, 0, 0, 120, tzinfo=UTC)
    assert iso_time(at.astimezone(zone)) == "2026-11-28T03:00:00.000120Z"
    assert iso_time(at.replace(microsecond=0)) == "2026-11-28T03:00:00.000000Z"
