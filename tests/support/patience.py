"""Longer time limits of the database, for tests that are not about those limits.

Where the tests run, any process may pause for two seconds: one that holds a lock, and each of those
that answer.
"""

from typing import TYPE_CHECKING, Any, Final

from tracker.store import engine, postgres, sqlite

if TYPE_CHECKING:  # processes of the tracker do not load it
    import pytest

LIMITS: Final[tuple[tuple[Any, str, object], ...]] = (
    (sqlite, "QUEUE_SECONDS", 6.0),
    (sqlite, "BUSY_SECONDS", 6.0),
    (postgres, "CONNECT_SECONDS", 8.0),
    (postgres, "STATEMENT_SECONDS", 10.0),
    (postgres, "LOCK_SECONDS", 6.0),
    (
        postgres.connect_postgres,
        "__kwdefaults__",
        postgres.connect_postgres.__kwdefaults__ | {"command_timeout": 11.0},
    ),
    (engine, "STATEMENT_SECONDS", 10.0),
    (engine, "ANSWER_SECONDS", 12.0),
    (engine, "PING_SECONDS", 8.0),
)
"""The tracker's own limits, and four seconds or more in addition."""


def wait_longer_for_the_database(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Raise the time limits of databases opened from now on, until the end of the test."""
    for target, name, value in LIMITS:
        monkeypatch.setattr(target, name, value)


def always_wait_longer_for_the_database() -> None:
    """`wait_longer_for_the_database` in a process of the tracker, until it ends."""
    for target, name, value in LIMITS:
        setattr(target, name, value)
