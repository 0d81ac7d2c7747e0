"""What commands print: JSON for programs, tables for people, both on stdout.

Names, error messages and outputs are other people's text: in a table their control characters are
shown, not obeyed.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tracker.core.plain import plain as plain_text

if TYPE_CHECKING:
    from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]

_WIDE: Final = 10_000
"""How wide a table may be where nobody looks at it: a file has no right margin."""


def print_json(value: Mapping[str, Any]) -> None:
    """`value` as JSON, in ASCII, so that it survives every locale."""
    typer.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A row for each of `rows`; `None` stays empty."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console().print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """One line for each field that has a value."""
    shown = {name: value for name, value in fields.items() if value not in (None, [], "")}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        typer.echo(f"{name:<{width}}  {plain(value)}")


def console() -> "Console":
    """A console on stdout, as wide as the terminal, or as it takes where stdout is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def plain(value: object) -> str:
    """`value` as text on one line in which nothing moves a terminal's cursor."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain_text(str(value))
