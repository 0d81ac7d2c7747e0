"""A copy under way, told on stderr: a line when a table is done, and some on the way there."""

import time
from typing import TYPE_CHECKING, Final

from tracker.cli.errand import note

if TYPE_CHECKING:
    from tracker.store.copy import Step

LINE_EVERY: Final = 2.0
"""Seconds between two lines about one table."""


class CopyLines:
    """Lines, but not too many of them."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def show(self, step: "Step") -> None:
        """Say how far it has come, where that is due."""
        now = time.monotonic()
        if step.rows == step.total or now - self._at >= LINE_EVERY:
            note(f"{step.table}: {step.rows} of {step.total} rows")
            self._at = now
