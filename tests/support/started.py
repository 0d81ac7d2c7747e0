"""Observations that answer a start of ours."""

from dataclasses import replace
from typing import Any

from tracker.core.record import Observed, StartFacts


def of_start(entry: Observed, **facts: Any) -> Observed:
    """The entry, with these facts of the start that became its run; its key is the run's own unless
    it is named."""
    key = f"key-{entry.run_id!a}"  # in ASCII, as all keys
    before = entry.start or StartFacts(workspace_id="default", idempotency_key=key)
    return replace(entry, start=replace(before, **facts))
