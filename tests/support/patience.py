"""Patience with a machine that stands still, for tests that are not about it."""

import pytest

from tracker.store import engine, postgres, sqlite


def wait_longer_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
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
