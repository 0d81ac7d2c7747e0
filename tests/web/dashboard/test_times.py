"""Times on pages: UTC for readers without scripts, and marked for the script that converts them."""

from datetime import datetime, timedelta, timezone

import pytest

from tracker.web.dashboard.render import sentence, time

MARK = '<time datetime="2026-11-28T03:20:00.000Z" title="2026-11-28 03:20:00.000 UTC" '


def test_a_time_is_marked_and_says_utc() -> None:
    """Whatever the zone of the value."""
    at = datetime(2026, 11, 28, 4, 20, tzinfo=timezone(timedelta(hours=1)))
    assert time(at, "minute") == f'{MARK}data-style="minute">2026-11-28 03:20:00 UTC</time>'
    assert time(None) == '<span class="unknown">unknown</span>'


@pytest.mark.parametrize("text", ["2026-11-28 03:20:00 UTC", "2026-11-28 03:20 UTC"])
def test_times_in_a_sentence_are_marked(text: str) -> None:
    """Each of them; the text around them is escaped."""
    at = f'{MARK}data-style="clock">2026-11-28 03:20:00 UTC</time>'
    assert sentence(f"<b> since {text}, not {text}.") == f"&lt;b&gt; since {at}, not {at}."


def test_what_is_no_time_stays_text() -> None:
    """A day that does not exist, another zone, no time at all."""
    for text in ("2026-11-31 03:20:00 UTC", "2026-11-28 03:20:00 CET", "a < b"):
        assert sentence(text) == text.replace("<", "&lt;")
