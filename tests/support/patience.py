"""Longer time limits of the database, for tests that are not about those limits.

Where the tests run, any process may pause for two seconds: one that holds a lock, and each of those
that answer.
"""

from typing import TYPE_CHECKING, Final

from tracker.store import url
from tracker.store.url import DatabaseTimes

if TYPE_CHECKING:  # processes of the tracker do not load it
    import pytest

TIMES: Final = DatabaseTimes(
    queue=6.0,
    busy=6.0,
    connect=8.0,
    statement=10.0,
    lock=6.0,
    answer=12.0,
    ping=8.0,
    waits=20.0,
    release=30.0,
)
"""The tracker's own limits, and four seconds or more in addition."""
A_MINUTE: Final = DatabaseTimes(
    queue=60.0, busy=60.0, connect=60.0, statement=60.0, lock=60.0, answer=60.0
)
"""For tests in which many wait for each other, and that are not about how long: a machine that
stands still for a moment lets all of them wait as long."""


def wait_longer_for_the_database(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Raise the time limits of databases opened from now on, until the end of the test."""
    monkeypatch.setattr(url, "TIMES", TIMES)


def always_wait_longer_for_the_database() -> None:
    """`wait_longer_for_the_database` in a process of the tracker, until it ends."""
    url.TIMES = TIMES  # type: ignore[misc]
