"""How long is waited before a request is repeated."""

from datetime import datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.flora.far_end import NOON
from tracker.flora.caller import backoff
from tracker.flora.http import http_date, retry_after_of


def http(when: datetime) -> str:
    return format_datetime(when, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "86400"}, 60),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7),
        ({"retry-after": http(NOON + timedelta(seconds=20))}, 20),
        ({"retry-after": http(NOON - timedelta(seconds=20))}, 0),
        ({"retry-after": http(NOON + timedelta(days=20))}, 60),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "1_0"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "9" * 5000}, None),
        ({"retry-after": "tomorrow"}, None),
    ],
)
def test_what_flora_asks(headers: dict[str, str], expected: float | None) -> None:
    """Seconds, milliseconds and dates are understood, up to a minute; nothing else asks a wait."""
    assert retry_after_of(headers, now=NOON) == expected


def test_a_date_is_measured_from_floras_own_clock() -> None:
    """Our clock may be an hour off: the answer's own date counts."""
    headers = {"date": http(NOON), "retry-after": http(NOON + timedelta(seconds=8))}
    assert retry_after_of(headers, now=NOON - timedelta(hours=1)) == 8


@given(st.text() | st.from_regex(r"\A\w{3}, \d+ \w{3} \d+ \d+:\d+:\d+ [\w+-]*\Z"))
def test_any_header(text: str) -> None:
    """No header makes anything but a wait between nothing and a minute, or no wait."""
    wait = retry_after_of({"retry-after": text, "retry-after-ms": text, "date": text}, now=NOON)
    assert wait is None or 0 <= wait <= 60
    date = http_date(text)
    assert date is None or date.utcoffset() == timedelta(0)


def test_backoff_doubles_up_to_half_a_minute() -> None:
    """Without a word from FLORA the waits double, never exceed 30 s, and are never in step."""
    for attempt, full in [(1, 0.5), (2, 1), (3, 2), (6, 16), (7, 30), (10_000, 30)]:
        waits = {backoff(attempt) for _ in range(50)}
        assert all(full / 2 <= wait <= full for wait in waits)
        assert len(waits) > 1
