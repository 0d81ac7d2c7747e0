"""What commands print: JSON for programs and tables for people on stdout, notes on stderr.

Names, error messages and outputs come from other people: their control characters are escaped.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tracker.core.formatting import plain as plain_text

if TYPE_CHECKING:
    from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]

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


def print_json(value: Mapping[str, Any]) -> None:
    """Print `value` as ASCII JSON, which survives every locale."""
    typer.echo(json.dumps(value, indent=2))


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


def print_page(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    next_cursor: str | None,
    columns: Mapping[str, str | Callable[[Mapping[str, Any]], object]],
    *,
    as_json: bool,
    hide: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
) -> None:
    """Print a page of a list: as JSON under `name`, or as a table.

    `columns` are the table's: for each title the key of its values, or a function of the row. Times
    (keys that end in `_at`) are shown to the second. `hide` is that of `print_table`; `names` are
    shown in place of the ids of techniques.
    """
    if as_json:
        print_json({name: rows, "meta": {"next_cursor": next_cursor}})
        return

    def cell(row: Mapping[str, Any], column: str | Callable[[Mapping[str, Any]], object]) -> object:
        if not isinstance(column, str):
            return column(row)
        value = row[column]
        if column == "technique_id":
            return (names or {}).get(value, value)
        return f"{value[:19]}Z" if value and column.endswith("_at") else value

    values = ([cell(row, column) for column in columns.values()] for row in rows)
    print_table(columns, values, hide=hide)
    if next_cursor is not None:
        note(f"There are more: --cursor {next_cursor}")


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
