"""Tags and budgets: what is taken, and what is said of what is not."""

from datetime import UTC, datetime

import pytest

from tracker.core.starts import Period, check_tags, parse_tags


def test_tags_are_kept_in_order() -> None:
    """Blanks around key and value are no part of them; a value may hold any printable text."""
    tags = parse_tags(["team = red", "order=12=3 ü"])
    assert list(tags.items()) == [("order", "12=3 ü"), ("team", "red")]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["team"], "'team' is not KEY=VALUE"),
        (["a b=c"], "a key is 1 to 64"),
        (["=c"], "a key is 1 to 64"),
        (["team="], "1 to 255 characters"),
        ([f"team={'x' * 256}"], "1 to 255 characters"),
        (["team=a\x1b[2Jb"], "printable"),
        (["team=a", "team=b"], "'team' is given twice"),
        ([f"k{n}=v" for n in range(17)], "at most 16 tags"),
    ],
)
def test_wrong_tags_are_reported(given: list[str], told: str) -> None:
    """What is wrong, and with which."""
    with pytest.raises(ValueError, match=told):
        parse_tags(given)


def test_a_value_is_text() -> None:
    """Numbers are nobody's text."""
    with pytest.raises(ValueError, match="'team': a value is a text"):
        check_tags({"team": 7})


@pytest.mark.parametrize(
    ("period", "since", "renews"),
    [
        (Period.DAY, datetime(2026, 12, 31, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (Period.MONTH, datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (Period.TOTAL, None, None),
    ],
)
def test_periods_are_of_utc(period: Period, since: datetime, renews: datetime) -> None:
    """A day, a month, or for ever."""
    assert period.bounds(datetime(2026, 12, 31, 23, 59, tzinfo=UTC)) == (since, renews)
