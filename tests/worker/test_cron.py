"""Cron expressions mean what cron means by them."""

from datetime import UTC, datetime, timedelta

import pytest

from tracker.settings.values import longest_wait
from tracker.worker import CronTrigger

SUNDAY = datetime(2026, 11, 22, tzinfo=UTC)


def fires(expression: str, *, days: int) -> list[datetime]:
    """Every time at which it fires within some days from Sunday, 22 November 2026."""
    trigger, found, after = CronTrigger(expression), [], SUNDAY
    while True:
        moment = trigger.get_next_fire_time(None, after)
        if moment is None or moment >= SUNDAY + timedelta(days=days):
            return found
        found.append(moment)
        after = moment + timedelta(seconds=1)


@pytest.mark.parametrize(
    ("expression", "days"),
    [
        ("0 12 * * 0", [0]),
        ("0 12 * * 7", [0]),
        ("0 12 * * sun", [0]),
        ("0 12 * * 1", [1]),
        ("0 12 * * 1-5", [1, 2, 3, 4, 5]),
        ("0 12 * * 5-7", [0, 5, 6]),
        ("0 12 * * */2", [0, 2, 4, 6]),
        ("0 12 * * mon,wed-thu", [1, 3, 4]),
    ],
)
def test_weekdays_count_from_sunday(expression: str, days: list[int]) -> None:
    """0 and 7 are Sunday, in lists, ranges and steps too."""
    assert [moment.isoweekday() % 7 for moment in fires(expression, days=7)] == days


def test_every_five_minutes() -> None:
    """The default fires at each fifth minute."""
    assert len(fires("*/5 * * * *", days=1)) == 288


def test_day_and_weekday_are_either_or() -> None:
    """Where both a day of the month and a weekday are given, cron takes either."""
    assert [moment.day for moment in fires("0 0 24 * 1", days=9)] == [23, 24, 30]


@pytest.mark.parametrize(
    ("expression", "seconds"),
    [
        ("*/5 * * * *", 300),
        ("0,10 * * * *", 3000),
        ("*/15 8-18 * * 1-5", 61.25 * 3600),
        ("0 0 1 * *", 31 * 86400),
        ("0 0 29 2 */7", 28 * 365.25 * 86400),
    ],
)
def test_the_longest_wait_between_two_times(expression: str, seconds: float) -> None:
    """Nights, weekends, long months and leap years included."""
    assert longest_wait(expression, SUNDAY) == seconds
