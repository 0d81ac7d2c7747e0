"""Patience with a machine that stands still, for tests that are not about it."""

import pytest

from tracker.store import postgres, sqlite


def wait_longer_for_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a write wait longer than two seconds for another one.

    That is the most that a process with a lock, or the one that waits for it, may stand still where
    the tests run. Until the end of the test, for databases that are opened from now on.
    """
    monkeypatch.setattr(sqlite, "QUEUE_SECONDS", 20.0)
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 20.0)
    monkeypatch.setattr(postgres, "LOCK_SECONDS", 4.5)  # below the time of a statement
