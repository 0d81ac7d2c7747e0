"""How one value reads."""

from datetime import timedelta

import pytest

from tracker.core.errors import SettingsError
from tracker.settings import load_settings
from tracker.settings.values import check_cron, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7d", 604800),
        ("24h", 86400),
        ("90m", 5400),
        ("30s", 30),
        ("45", 45),
        ("0.5", 0.5),
        (" 2 H ", 7200),
        (12, 12),
        (1.5, 1.5),
        (0, 0),
        (timedelta(seconds=3), 3),
    ],
)
def test_a_duration_has_a_unit_or_is_seconds(text: object, seconds: float) -> None:
    """Days, hours, minutes, seconds, or a bare number of seconds."""
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    ["", "d", "-5", "-5s", "5 weeks", "1h30m", "nan", "inf", "1e3", "٣", True, None, [], -1, 1e300],
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    """Nothing is guessed, and nothing but ValueError comes out."""
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration(text)
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration(float("inf"))
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration("9" * 400)


@pytest.mark.parametrize(
    "expression",
    [
        "* * * * *",
        "*/5 * * * *",
        "0 3 * * 0",
        "0 3 * * 7",
        "0,30 8-18/2 1,15 * mon-fri",
        "59 23 31 12 sun",
        "0 0 1 jan-mar *",
        "5/15 * * * 5-7",
    ],
)
def test_what_cron_reads_is_taken(expression: str) -> None:
    """Five fields of numbers, names, ranges, lists and steps; Sunday is 0 and 7."""
    assert check_cron(expression.upper()) == expression


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("* * * *", "this has 4"),
        ("@hourly", "this has 1"),
        ("0 0 * * * *", "this has 6"),
        ("60 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day of month"),
        ("* * * 13 *", "month"),
        ("* * * * 8", "day of week"),
        ("*/0 * * * *", "minute"),
        ("*-5 * * * *", "minute"),
        ("9-5 * * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("* * mon * *", "day of month"),
        ("٣ * * * *", "minute"),
        ("0 0 30 2 *", "day of month"),
        ("0 0 31 4,6 *", "day of month"),
    ],
)
def test_what_cron_does_not_read_is_refused_by_field(expression: str, said: str) -> None:
    """The message names the field that is wrong."""
    with pytest.raises(SettingsError, match=f"^TRACKER_RECONCILE_CRON .*{said}"):
        load_settings({"TRACKER_RECONCILE_CRON": expression})


@pytest.mark.parametrize("name", ["FLORA_BASE_URL", "TRACKER_PUBLIC_URL"])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.org", "https://"),
        ("http://127.0.0.1.example.org/", "https://"),
        ("ftp://127.0.0.1", "https://"),
        ("example.org", "address"),
        ("https://", "address"),
        ("https://ex ample.org", "address"),
        ("https://example.org:99999", "address"),
        ("https://[::1", "address"),
        ("https://me:pw@example.org", "user name"),
        ("https://example.org/?a=b", "before any"),
        ("https://example.org/#a", "before any"),
    ],
)
def test_an_address_that_would_not_work_or_would_leak_is_refused(
    name: str, url: str, said: str
) -> None:
    """Roots are https, or http on this machine, and hold nothing but host and path."""
    with pytest.raises(SettingsError, match=f"^{name} must .*{said}"):
        load_settings({name: url})


@pytest.mark.parametrize("url", ["http://localhost:8090", "http://[::1]:1", "https://x.org/a/b"])
def test_slashes_at_the_end_of_an_address_do_not_matter(url: str) -> None:
    """Paths are added to a root without doubling the slash."""
    assert load_settings({"FLORA_BASE_URL": url + "//"}).flora_base_url == url


def test_the_public_address_is_the_root_not_the_callback() -> None:
    """The callback's path is added; whoever adds it too is told so."""
    with pytest.raises(SettingsError, match="without /callbacks/flora"):
        load_settings({"TRACKER_PUBLIC_URL": "https://example.org/callbacks/flora"})


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("sqlite:///tracker.db", True),
        ("sqlite:////var/lib/tracker.db", True),
        ("sqlite+aiosqlite:///tracker.db", True),
        ("postgres://u:p@h/d", True),
        ("postgresql://h/d", True),
        ("postgresql+asyncpg://h/d", True),
        ("mysql://h/d", False),
        ("tracker.db", False),
        ("sqlite://", False),
        ("sqlite:///:memory:", False),
    ],
)
def test_the_database_is_sqlite_in_a_file_or_postgresql(url: str, taken: bool) -> None:
    """Both spellings of PostgreSQL, with a driver's name or without; memory is no place to keep."""
    if taken:
        assert load_settings({"TRACKER_DATABASE_URL": url}).tracker_database_url == url
    else:
        with pytest.raises(SettingsError, match=r"^TRACKER_DATABASE_URL must "):
            load_settings({"TRACKER_DATABASE_URL": url})


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"TRACKER_API_CONCURRENCY": "0"}, "TRACKER_API_CONCURRENCY must be greater"),
        ({"TRACKER_POLL_INTERVAL": "0"}, "TRACKER_POLL_INTERVAL must be greater"),
        ({"TRACKER_POLL_INTERVAL": "400"}, "TRACKER_POLL_INTERVAL_MAX must not be shorter"),
        ({"TRACKER_SIGNATURE_TOLERANCE": "-1"}, "TRACKER_SIGNATURE_TOLERANCE must be a duration"),
        ({"TRACKER_HISTORY_SINCE": "0"}, "TRACKER_HISTORY_SINCE must be greater"),
        ({"TRACKER_LOG_FORMAT": "xml"}, "TRACKER_LOG_FORMAT must be 'console' or 'json'"),
        ({"FLORA_API_KEY": "sk_live_…"}, "FLORA_API_KEY must be printable ASCII"),
    ],
)
def test_a_value_out_of_range_is_named(environ: dict[str, str], said: str) -> None:
    """Each message begins with the variable and says what it must be."""
    with pytest.raises(SettingsError, match=f"^{said}"):
        load_settings(environ)
