"""What commands print: JSON for programs and tables for people on stdout; notes and progress
on stderr.

Names, error messages and outputs come from other people: their control characters are escaped.
"""

import asyncio
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.core.formatting import plain as plain_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task, TaskID

    from tracker.flora.caller import Wait
    from tracker.services import Services

_UNLIMITED: Final = 10_000_000
"""Width of a table where stdout is no terminal."""
_GAP: Final = 2
"""Characters between two columns of a table."""
_SENTENCE: Final = 24
"""Characters to which a column of sentences may shrink."""
_LONGEST_ID: Final = 48
"""Characters of an id at most; a longer word in a sentence is broken."""
_CLEAR_LINE: Final = "\x1b[2K"
_status: Final = [""]
"""The line that `show_status` shows now."""


def note(message: str) -> None:
    """Print a line on stderr: stdout holds results only."""
    show_status("")
    typer.echo(plain(message), err=True)


def show_status(text: str) -> None:
    """Show a line on stderr, a terminal, until the next one or a note; "" removes it."""
    if text != _status[0]:
        _status[0] = text
        width = shutil.get_terminal_size().columns - 1
        # The cursor stays at the start, so that any other output overwrites the line.
        typer.echo(f"{_CLEAR_LINE}{plain(text)[:width]}\r", err=True, nl=False)


def print_json(value: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Print `value` as ASCII JSON, which survives every locale; without `indent` on one line."""
    typer.echo(json.dumps(value, indent=indent))


def print_table(
    columns: Iterable[str], rows: Iterable[Iterable[object]], *, hide: Sequence[str] = ()
) -> None:
    """Print a table; `None` is an empty cell.

    A terminal that is too narrow shows the columns that fit, from left to right, those of `hide`
    last and in reverse; a note names the others. Only sentences are wrapped, so that ids can be
    copied.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    names = list(columns)
    cells = [[plain(cell) for cell in row] for row in rows]
    screen = console()
    widths = _column_widths(names, cells, hide, screen.width)
    screen.width = max(screen.width, sum(widths.values()) + _GAP * len(widths))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, width in widths.items():
        table.add_column(names[number], width=width, overflow="fold")
    for row in cells:
        table.add_row(*(Text(row[number]) for number in widths))
    screen.print(table)
    if hidden := [name for number, name in enumerate(names) if number not in widths]:
        note(f"Hidden: {', '.join(hidden)}. A wider terminal or --json shows them.")


def _column_widths(
    names: list[str], cells: list[list[str]], hide: Sequence[str], room: int
) -> dict[int, int]:
    """The widths of the columns to show, by their number: the first, and those that fit."""
    from rich.cells import cell_len

    full = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
    least = [
        min(width, max(_SENTENCE, *(_longest_word(row[number]) for row in cells)))
        if any(" " in row[number] for row in cells)
        else width
        for number, width in enumerate(full)
    ]
    last = [names.index(name) for name in reversed(hide) if name in names]
    shown: list[int] = []
    for number in [*(one for one in range(len(names)) if one not in last), *last]:
        if not shown or least[number] + _GAP <= room:
            room -= least[number] + _GAP * bool(shown)
            shown.append(number)
    widths = {}
    for number in sorted(shown):  # sentences share what is left
        widths[number] = least[number] + max(0, min(full[number] - least[number], room))
        room -= widths[number] - least[number]
    return widths


def _longest_word(text: str) -> int:
    """The width that keeps the ids in a sentence whole; a longer word is a link."""
    return min(max(map(len, text.split()), default=0), _LONGEST_ID)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print a line for each field that has a value."""
    shown = {name: value for name, value in fields.items() if value not in (None, [], "")}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        typer.echo(f"{name:<{width}}  {plain(value)}")


def print_with_inputs(fields: dict[str, Any]) -> None:
    """Print the fields of a run or a start: tags on one line, a line for each input."""
    inputs = fields.pop("inputs") or []
    fields["tags"] = ", ".join(f"{key}={value}" for key, value in fields["tags"].items())
    print_fields(fields)
    for one in inputs:
        print_fields({f"input {one.get('id')}": f"{one.get('value')}"})


def console() -> "Console":
    """A console on stdout."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _UNLIMITED, highlight=False)


def plain(value: object) -> str:
    """`value` as text on one line, with control characters escaped."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain_text(str(value))


# Progress on stderr: bars on a terminal, lines elsewhere; and what a command waits for.

_WAIT_SHOWN_AFTER: Final = 1.0
"""Seconds after which a call to FLORA is reported as waiting."""
_REFRESH_SECONDS: Final = 0.5

BAR_WIDTH: Final = 10

BarText = Callable[["Task"], Iterable[str | tuple[str, str]]]
"""The text behind a bar at each refresh: its parts, some with a style."""


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

    def bar(self, name: str, *, done: float, total: float | None, text: BarText) -> None:
        """Show or update the bar `name`."""
        if self._bars is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(plain(name), total=total, text=text)
        self._bars.update(self._tasks[name], completed=done, total=total, text=text)

    def remove(self, name: str) -> None:
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def line(self, text: str) -> None:
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
def screen(*, transient: bool = True) -> Iterator[Screen]:
    """A screen with bars where stderr is a terminal; they stay unless they are `transient`."""
    if not sys.stderr.isatty():
        yield Screen()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    class TextOfBar(ProgressColumn):
        def render(self, task: "Task") -> Text:
            return Text.assemble(*task.fields["text"](task), no_wrap=True)

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=BAR_WIDTH),
        TextOfBar(),
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
async def showing_waits(
    services: "Services", *, every: float = _REFRESH_SECONDS
) -> AsyncIterator[None]:
    """Report within two seconds that the block waits for FLORA, and why.

    On a terminal one line counts down and disappears; elsewhere, and above bars, each cause is one
    line.
    """
    showing = asyncio.create_task(_show_waits(services, every))
    try:
        yield
    finally:
        showing.cancel()
        show_status("")


async def _show_waits(services: "Services", every: float) -> None:
    reported: set[str] = set()
    while True:
        await asyncio.sleep(every)
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
