"""Progress on stderr: bars on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tracker.cli.output import note, plain

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

Cell = Callable[[], tuple[str, str]]
"""A cell of a bar: its text and style at each refresh."""


class Screen:
    """Shows bars by name, and lines above them. Without `bars`, only the lines."""

    def __init__(self, bars: "Progress | None" = None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._status = ""
        self._status_at = float("-inf")

    @property
    def has_bars(self) -> bool:
        """Whether stderr is a terminal."""
        return self._bars is not None

    def bar(self, name: str, *, done: float, total: float | None, **cells: Cell) -> None:
        """Show or update the bar `name`, with `cells` by the names of their columns."""
        if self._bars is None:
            return
        fields: dict[str, Any] = dict(cells)
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(plain(name), total=total, **fields)
        self._bars.update(self._tasks[name], completed=done, total=total, **fields)

    def remove(self, name: str) -> None:
        """Remove a bar, if it is there."""
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def line(self, text: str) -> None:
        """Print a line."""
        if self._bars is None:
            note(text)
        else:
            self._bars.console.print(plain(text), markup=False)

    def notice(self, text: str) -> None:
        """Print a line that the tracker itself has to say."""
        self.line(f"tracker: {text}")

    def status(self, text: str, *, seconds: float, now: bool = False) -> None:
        """Print a status line if it is new and the last one is `seconds` old, or with `now`."""
        if text != self._status and (now or time.monotonic() - self._status_at >= seconds):
            self._status, self._status_at = text, time.monotonic()
            self.line(text)


@contextmanager
def screen(
    columns: "Callable[[], Sequence[ProgressColumn]]", *, transient: bool = True
) -> Iterator[Screen]:
    """A screen with bars of these `columns` where stderr is a terminal.

    The bars stay when the block ends unless they are `transient`.
    """
    if not sys.stderr.isatty():
        yield Screen()
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        *columns(),
        console=Console(stderr=True, highlight=False, soft_wrap=True),
        transient=transient,
    ) as bars:
        yield Screen(bars)


def cell(name: str) -> "ProgressColumn":
    """A column for the cell `name` of each bar."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class CellColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(*task.fields[name](), no_wrap=True)

    return CellColumn()
