"""Progress on stderr: bars on a terminal, lines elsewhere; and what a command waits for."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from tracker.cli.output import note, plain, show_status

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from tracker.flora.caller import Wait
    from tracker.services import Services

_WAIT_SHOWN_AFTER: Final = 1.0
"""Seconds after which a call to FLORA is reported as waiting."""
_REFRESH_SECONDS: Final = 0.5

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
        _screens.append(Screen(bars))
        try:
            yield _screens[-1]
        finally:
            _screens.pop()


_screens: Final = [Screen()]
"""The screen in use is the last."""


@asynccontextmanager
async def showing_waits(services: "Services") -> AsyncIterator[None]:
    """Report within two seconds that the block waits for FLORA, and why.

    On a terminal one line counts down and disappears; elsewhere, and above bars, each cause is one
    line.
    """
    showing = asyncio.create_task(_show_waits(services))
    try:
        yield
    finally:
        showing.cancel()
        show_status("")


async def _show_waits(services: "Services") -> None:
    reported: set[str] = set()
    while True:
        await asyncio.sleep(_REFRESH_SECONDS)
        waits = [one.client.wait for one in services.workspaces if one.client is not None]
        wait = max(filter(None, waits), key=lambda one: one.passed, default=None)
        if wait is None or wait.passed < _WAIT_SHOWN_AFTER:
            show_status("")
            continue
        cause, seconds = _cause(wait)
        if sys.stderr.isatty() and not _screens[-1].has_bars:
            show_status(f"{cause} ({seconds:.0f} s) …")
        elif cause not in reported:
            reported.add(cause)
            _screens[-1].notice(f"{cause} for up to {seconds:.0f} s")


def _cause(wait: "Wait") -> tuple[str, float]:
    """Why a call waits, and the seconds until it is sent or given up."""
    from tracker.core.errors import FloraRefusal, FloraUnreachable

    if wait.paused > 0:
        return "FLORA asked for a pause, waiting", wait.paused
    match wait.error:
        case None:
            return "Waiting for FLORA's answer", wait.left
        case FloraUnreachable():
            return "FLORA does not answer, retrying", wait.left
        case FloraRefusal(status=status):
            return f"FLORA answers {status}, retrying", wait.left
    return "FLORA's answer cannot be read, retrying", wait.left


def cell(name: str) -> "ProgressColumn":
    """A column for the cell `name` of each bar."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class CellColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(*task.fields[name](), no_wrap=True)

    return CellColumn()
