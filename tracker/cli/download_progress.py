"""Files under way, on stderr: a bar for each on a terminal, a line for each elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tracker.cli.errand import note
from tracker.cli.output import plain

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from tracker.delivering.downloads import DownloadJob, DownloadResult

_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB")


class Lines:
    """A line for each file."""

    def bytes(self, job: "DownloadJob", size: int, whole: int | None) -> None:
        """Bytes came; that is no line of its own."""

    def result(self, result: "DownloadResult") -> None:
        """An output is there, or cannot be had. What was there already is only counted."""
        line = _line(result)
        if line is not None:
            note(line)

    def tell(self, line: str) -> None:
        """Show a line that is about no file alone."""
        note(f"tracker: {plain(line)}")


class Bars:
    """A bar for each file that is under way."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def bytes(self, job: "DownloadJob", size: int, whole: int | None) -> None:
        """Bytes came."""
        if job.name not in self._bars:
            self._bars[job.name] = self._progress.add_task(job.name, total=whole)
        self._progress.update(self._bars[job.name], completed=size, total=whole)

    def result(self, result: "DownloadResult") -> None:
        """An output is there, or cannot be had: its bar gives way to a line."""
        bar = self._bars.pop(result.job.name, None)
        if bar is not None:
            self._progress.remove_task(bar)
        line = _line(result)
        if line is not None:
            self._progress.console.print(line, markup=False)

    def tell(self, line: str) -> None:
        """Show a line above the bars."""
        self._progress.console.print(f"tracker: {plain(line)}", markup=False)


@contextmanager
def shown() -> "Iterator[Lines | Bars]":
    """Where files are shown for as long as the block lasts."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(stderr=True, highlight=False, soft_wrap=True),
        transient=True,
    ) as progress:
        yield Bars(progress)


def size_text(size: float) -> str:
    """A number of bytes, with three digits that count."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.3g} {_UNITS[unit]}" if unit else f"{size:.0f} bytes"


def _line(result: "DownloadResult") -> str | None:
    job = result.job
    if result.error is not None:
        which = f"{job.output.output_id or job.position} of run {job.run_id}"
        row = "" if job.row is None else f" (row {job.row})"
        return plain(f"tracker: output {which}{row}: {result.error}")
    if result.outcome == "present" or result.entry is None:
        return None
    return f"{result.entry.file}  {size_text(result.entry.size)}"
