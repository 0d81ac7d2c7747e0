"""How far a batch has come, on stderr: one bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tracker.cli.batch_output import cost_words
from tracker.cli.errand import note
from tracker.cli.output import plain

if TYPE_CHECKING:
    from tracker.starting.batch import BatchProgress

LINE_EVERY: Final = 5.0
"""Seconds between two lines at least."""

Tell = Callable[["BatchProgress"], None]


@contextmanager
def shown(name: str) -> "Iterator[Tell]":
    """Shows what it is told for as long as the block lasts."""
    if not sys.stderr.isatty():
        yield _Lines().tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        console=Console(stderr=True, highlight=False),
        transient=True,
    ) as bars:
        bar = bars.add_task(plain(name), total=None, words="")

        def tell(progress: "BatchProgress") -> None:
            tally = progress.tally
            bars.update(bar, total=tally.rows, completed=tally.ended, words=words(progress))

        yield tell


class _Lines:
    """A line when something has changed, but not too many of them."""

    def __init__(self) -> None:
        self._told = ""
        self._at = float("-inf")
        self._stage: tuple[bool, bool] | None = None

    def tell(self, progress: "BatchProgress") -> None:
        line = words(progress)
        stage = (progress.left == 0, progress.tally.active == 0)
        if line == self._told:
            return
        if stage != self._stage or time.monotonic() - self._at >= LINE_EVERY:
            note(line)
            self._told, self._stage, self._at = line, stage, time.monotonic()


def words(progress: "BatchProgress") -> str:
    """How far it has come, in a few words."""
    tally = progress.tally
    parts = [f"{tally.started} of {tally.rows} started"]
    counts = {
        "running": tally.active,
        "completed": tally.completed,
        "failed": tally.failed,
        "lost": tally.lost,
        "not started for an error": progress.errors,
    }
    parts += [f"{count} {name}" for name, count in counts.items() if count]
    parts.append(cost_words(tally))
    if progress.left and progress.paused:
        parts.append(f"FLORA asks to wait {progress.paused:.0f} s")
    if progress.doubt:
        parts.append(f"waiting to learn what became of {progress.doubt} (no answer yet)")
    if progress.held:
        parts.append(f"next start in {progress.held:.0f} s")
    if (over := progress.over_budget) is not None and over.renews_at is not None:
        renews = f"{over.renews_at:%Y-%m-%d %H:%M}"
        parts.append(f"waiting for the budget {over.budget}, which begins anew at {renews} UTC")
    return ", ".join(parts)
