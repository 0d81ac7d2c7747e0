"""A cron expression as an APScheduler trigger that reads it as cron does.

Two things differ in APScheduler 3: it counts weekdays from Monday, and where both a day of the
month and a weekday are given it wants both, while cron takes either.
"""

from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger

_LOOK_AHEAD: Final = 1500
_WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun")


def cron_trigger(expression: str) -> BaseTrigger:
    """The trigger for a checked expression of five fields, in UTC; 0 and 7 are Sunday."""
    minute, hour, day, month, weekday = expression.split()

    def trigger(day: str, weekday: str) -> CronTrigger:
        return CronTrigger(
            minute=minute, hour=hour, day=day, month=month, day_of_week=weekday, timezone=UTC
        )

    weekdays = _named(weekday)
    if day.startswith("*") or weekday.startswith("*"):
        return trigger(day, weekdays)
    return OrTrigger([trigger(day, "*"), trigger("*", weekdays)])


def longest_wait(expression: str, after: datetime) -> float:
    """The longest time between two of its next moments, in seconds; 0 where it never fires.

    So many are looked at that a weekend is among them, unless it fires every minute or two.
    """
    trigger = cron_trigger(expression)
    moments: list[datetime] = []
    moment: datetime | None = after
    while moment is not None and len(moments) < _LOOK_AHEAD:
        moment = trigger.get_next_fire_time(moments[-1] if moments else None, moment)
        if moment is not None:
            moments.append(moment)
    return max(
        ((later - earlier).total_seconds() for earlier, later in pairwise(moments)), default=0.0
    )


def _named(field: str) -> str:
    """A weekday field with each day it means by name, which leaves no doubt about the first day."""
    if field == "*":
        return field
    days: list[str] = []
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        if span == "*":
            low, high = 0, 6
        else:
            low = _day(first)
            high = _day(last) if last else (6 if step else low)
        days += [_WEEKDAYS[day] for day in range(low, high + 1, int(step or 1))]
    return ",".join(dict.fromkeys(days))


def _day(text: str) -> int:
    return _WEEKDAYS.index(text) if text in _WEEKDAYS else int(text)
