"""Runs under way, shown on stderr: a bar for each on a terminal, a line for each change elsewhere.

stdout is for what was asked for, so that it can be piped while the bars are looked at.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from tracker.cli.errand import note
from tracker.cli.output import plain
from tracker.core.clock import Clock
from tracker.core.record import Record
from tracker.core.run import Tracking

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from tracker.polling.follow import Sight

_STYLES: Final = {"completed": "green", "failed": "red", "running": "yellow", "pending": "dim"}


class Lines:
    """A line for each change."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._told: dict[str, str] = {}

    def show(self, sights: "Sequence[Sight]") -> None:
        """Show runs that changed."""
        for record, source in sights:
            run = record.run
            shown = f"{plain(run.run_id)} {standing(record)}"
            # Who said it and how long it takes are no news of their own.
            if self._told.get(run.run_id) != shown:
                self._told[run.run_id] = shown
                note(f"{shown}  {elapsed(record, self._clock)}  {source}")

    def tell(self, line: str) -> None:
        """Show a line that is about no run alone."""
        note(f"tracker: {plain(line)}")


class Bars:
    """A bar for each run, on a terminal."""

    def __init__(self, progress: "Progress", clock: Clock) -> None:
        self._progress = progress
        self._clock = clock
        self._bars: dict[str, TaskID] = {}

    def show(self, sights: "Sequence[Sight]") -> None:
        """Show runs that changed."""
        for record, source in sights:
            run = record.run
            done = 100 if record.tracking is Tracking.SETTLED else run.progress
            fields: dict[str, Any] = {"record": record, "source": str(source)}
            bar = self._bars.get(run.run_id)
            if bar is None:
                bar = self._progress.add_task(plain(run.run_id), total=100, **fields)
                self._bars[run.run_id] = bar
            self._progress.update(bar, completed=done, **fields)

    def tell(self, line: str) -> None:
        """Show a line above the bars."""
        self._progress.console.print(f"tracker: {plain(line)}", markup=False)


@contextmanager
def shown(clock: Clock) -> "Iterator[Lines | Bars]":
    """Where runs are shown for as long as the block lasts; `clock` tells how long they take."""
    if not sys.stderr.isatty():
        yield Lines(clock)
        return
    with _bars(clock) as progress:
        yield Bars(progress, clock)


def standing(record: Record) -> str:
    """Status and progress in a few words, with what is missing or went wrong."""
    run = record.run
    if record.tracking is Tracking.SETTLED:
        return f"{run.status}, settled"
    if record.tracking is Tracking.LOST:
        return f"{run.status}, lost: FLORA denies it"
    words = f"{run.status} {run.progress:g} %"
    if run.standing.ended:
        words += ", details to be read"
    return words if record.last_error is None else f"{words} ({plain(record.last_error)})"


def elapsed(record: Record, clock: Clock) -> str:
    """How long the run took, or has taken so far."""
    return took(record) or _length((record.settled_at or clock()) - record.created_at)


def took(record: Record) -> str | None:
    """How long the run took, by FLORA's clock; `None` where that is not known."""
    end = record.run.completed_at
    return None if end is None else _length(end - record.created_at)


def _length(length: timedelta) -> str:
    seconds = max(length.total_seconds(), 0.0)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bars(clock: Clock) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Standing(ProgressColumn):
        """Status, in its colour."""

        def render(self, task: Task) -> Text:
            record: Record = task.fields["record"]
            status = str(record.run.status)
            return Text(status, style=_STYLES.get(status, ""))

    class Elapsed(ProgressColumn):
        """How long it has taken."""

        def render(self, task: Task) -> Text:
            return Text(elapsed(task.fields["record"], clock), justify="right")

    class Remark(ProgressColumn):
        """Who brought the last news, and what went wrong."""

        def render(self, task: Task) -> Text:
            record: Record = task.fields["record"]
            remark = "" if record.last_error is None else f"  {plain(record.last_error)}"
            return Text(task.fields["source"] + remark, style="dim", no_wrap=True)

    return Progress(
        TextColumn("{task.description}", markup=False),
        Standing(),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        Elapsed(),
        Remark(),
        console=Console(stderr=True, highlight=False),
    )
