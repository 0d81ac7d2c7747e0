"""What a benchmark found: tables for people, figures for machines, and the machine it ran on.

A benchmark prints its tables, and writes them as `NAME.md` and, with every single round, as
`NAME.json` into the directory that `--results` names.
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path("bench/results")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title; `note` says how to read them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [f"### {self.title}", "", _line(self.columns)]
        lines.append(_line(["---", *("---:" for _ in self.columns[1:])]))
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


@dataclass(slots=True)
class Report:
    """Everything that one benchmark found. `figures` holds it all, in plain JSON values."""

    name: str
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, table: Table) -> None:
        """Take a table in, and show it at once: the next one may take minutes."""
        self.tables.append(table)
        print(f"\n{table.markdown()}", flush=True)

    def write(self, directory: Path) -> None:
        """Leave both files in `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        text = "\n".join([f"*{machine()}*", "", *(table.markdown() for table in self.tables)])
        (directory / f"{self.name}.md").write_text(text, encoding="utf-8")
        whole = {"benchmark": self.name, "machine": machine(), "figures": self.figures}
        (directory / f"{self.name}.json").write_text(
            json.dumps(whole, indent=2) + "\n", encoding="utf-8"
        )


def machine() -> str:
    """Where and when: an absolute number means something on this machine alone."""
    return (
        f"{os.cpu_count()} processors, {platform.machine()}, Python {platform.python_version()}, "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


def say(line: str) -> None:
    """How far the benchmark has come; stdout is for what it finds."""
    print(line, file=sys.stderr, flush=True)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
