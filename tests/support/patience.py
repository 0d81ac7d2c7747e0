"""Patience with a machine that stands still, for tests that are not about it."""

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from tracker.store import engine, postgres, sqlite

if TYPE_CHECKING:  # a process of the tracker's does not load it
    import pytest


class _ForGood:
    """What `MonkeyPatch` does, for as long as this process lives."""

    def setattr(self, target: Any, name: str, value: object) -> None:
        setattr(target, name, value)

    def setitem(self, target: MutableMapping[str, Any], name: str, value: object) -> None:
        target[name] = value


def always_wait_longer_for_the_database() -> None:
    """The same for a process of the tracker's, until its end."""
    wait_longer_for_the_database(_ForGood())
    engine.PING_SECONDS = 20.0  # type: ignore[misc]


def wait_longer_for_the_database(monkeypatch: "pytest.MonkeyPatch | _ForGood") -> None:
    """Let a write wait longer than two seconds for another one, and an answer of PostgreSQL be
    waited for longer than six.

    Where the tests run, any process may stand still for seconds: one that holds a lock, and each of
    those that answer. Until the end of the test, for databases that are opened from now on.
    """
    monkeypatch.setattr(sqlite, "QUEUE_SECONDS", 30.0)
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 30.0)
    monkeypatch.setattr(postgres, "CONNECT_SECONDS", 20.0)
    monkeypatch.setattr(postgres, "STATEMENT_SECONDS", 25.0)
    monkeypatch.setattr(postgres, "LOCK_SECONDS", 20.0)
    monkeypatch.setitem(postgres.connect_postgres.__kwdefaults__, "command_timeout", 26.0)
    monkeypatch.setattr(engine, "STATEMENT_SECONDS", 25.0)
    monkeypatch.setattr(engine, "ANSWER_SECONDS", 30.0)
