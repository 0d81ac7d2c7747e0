"""What commands print: JSON for programs and tables for people on stdout, notes on stderr.

Names, error messages and outputs come from other people: their control characters are escaped.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tracker.core.plain import plain as plain_text

if TYPE_CHECKING:
    from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]

_UNLIMITED: Final = 10_000
"""Width of a table where stdout is no terminal."""


def note(message: str) -> None:
    """Print a line on stderr: stdout holds results only."""
    typer.echo(plain(message), err=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Print `value` as ASCII JSON, which survives every locale."""
    typer.echo(json.dumps(value, indent=2))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; `None` is an empty cell."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console().print(table)


def print_page(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    next_cursor: str | None,
    columns: Mapping[str, str | Callable[[Mapping[str, Any]], object]],
    *,
    as_json: bool,
) -> None:
    """Print a page of a list: as JSON under `name`, or as a table.

    `columns` are the table's: for each title the key of its values, or a function of the row. Times
    (keys that end in `_at`) are shown to the second.
    """
    if as_json:
        print_json({name: rows, "meta": {"next_cursor": next_cursor}})
        return

    def cell(row: Mapping[str, Any], column: str | Callable[[Mapping[str, Any]], object]) -> object:
        if not isinstance(column, str):
            return column(row)
        value = row[column]
        return f"{value[:19]}Z" if value and column.endswith("_at") else value

    print_table(columns, ([cell(row, column) for column in columns.values()] for row in rows))
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
