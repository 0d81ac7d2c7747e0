"""A sheet as it was given: rows of named values, each with the line on which it begins.

Reading never stops at the first thing that is wrong: every problem is noted with its line, and who
reads the sheet decides what that means.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tracker.core.errors import TrackerError

Values = tuple[str, ...]
"""What stands in one cell: one text, or several where a JSON line gives a list."""

_FOREIGN: Final = {
    b"PK\x03\x04": "is a workbook, not text: export it as CSV in UTF-8",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Something that is wrong with a sheet. Lines count from 1, 0 is the sheet as a whole; `column`
    is empty for the whole line."""

    line: int
    column: str
    message: str

    def __str__(self) -> str:
        line = f"line {self.line}" if self.line else ""
        column = f"column {self.column!r}" if self.column else ""
        where = ", ".join(filter(None, (line, column)))
        return f"{where}: {self.message}" if where else self.message


class SheetRefused(TrackerError):
    """The sheet is wrong, nothing was started; `problems` names all that is wrong, by line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems))
        found = len(self.problems)
        super().__init__(
            f"{found} problem{'s' if found != 1 else ''} in the sheet; nothing was started"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetRow:
    """One row. A cell that is empty is left out of `cells`."""

    line: int
    cells: dict[str, Values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A sheet, read. `header` is the line of the names, 0 where each row brings its own."""

    columns: tuple[str, ...]
    rows: tuple[SheetRow, ...]
    problems: tuple[Problem, ...]
    header: int = 0


def read_csv(data: bytes, *, delimiter: str = ",") -> Sheet:
    """A sheet from CSV in UTF-8, with or without a byte order mark; the first line names the
    columns."""
    if (foreign := _foreign(data)) is not None:
        return foreign
    problems: list[Problem] = []
    records = _records(_text(data), delimiter, problems)
    header, names = next(records, (1, []))
    columns = [name.strip() for name in names]
    if not columns:
        problems.append(Problem(1, "", "the sheet is empty: its first line names the columns"))
    rows = []
    for line, values in records:
        beyond = [value for value in values[len(columns) :] if value.strip()]
        if beyond:
            message = f"the line has {len(values)} cells, the header only {len(columns)}"
            problems.append(Problem(line, "", message))
        cells: dict[str, Values] = {}
        for name, value in zip(columns, values, strict=False):
            if not value.strip():
                continue
            if (unfit := _unfit(value)) is not None:
                problems.append(Problem(line, name, unfit))
            # Of columns with one name the first counts here; who maps it sees that there are two.
            cells.setdefault(name, (value,))
        rows.append(SheetRow(line=line, cells=cells))
    return Sheet(columns=tuple(columns), rows=tuple(rows), problems=tuple(problems), header=header)


def read_jsonl(data: bytes) -> Sheet:
    """A sheet from JSON lines in UTF-8: an object on each, whose values are texts or lists of
    texts."""
    if (foreign := _foreign(data)) is not None:
        return foreign
    problems: list[Problem] = []
    columns: dict[str, None] = {}
    rows = []
    for line, text in enumerate(_text(data).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            found = json.loads(text, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            problems.append(Problem(line, "", f"the line is not JSON: {error.msg}"))
            continue
        except ValueError as error:
            problems.append(Problem(line, "", str(error)))
            continue
        except RecursionError:
            problems.append(Problem(line, "", "the line is nested too deeply"))
            continue
        if not isinstance(found, dict):
            problems.append(Problem(line, "", "the line is not a JSON object"))
            continue
        cells: dict[str, Values] = {}
        for name, value in found.items():
            columns.setdefault(name)
            values, wrong = _json_values(value)
            if wrong is not None:
                problems.append(Problem(line, name, wrong))
            if values:
                cells[name] = values
        rows.append(SheetRow(line=line, cells=cells))
    return Sheet(columns=tuple(columns), rows=tuple(rows), problems=tuple(problems))


def _records(text: str, delimiter: str, problems: list[Problem]) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the line on which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            # What follows cannot be told apart any more: an open quote takes in all of it.
            problems.append(Problem(line, "", f"the line is not CSV: {error}"))
            return
        if values is None:
            return
        if any(value.strip() for value in values):
            yield line, values


def _json_values(value: Any) -> tuple[Values, str | None]:
    """The texts that a JSON value stands for, and what is wrong with it, if anything."""
    given = value if isinstance(value, list) else [value]
    texts = []
    for one in given:
        if one is None:
            continue
        if not isinstance(one, str):
            return (), f"must be text, not {_KINDS[type(one)]}"
        if (unfit := _unfit(one)) is not None:
            return (one,), unfit
        if one.strip():
            texts.append(one)
    return tuple(texts), None


_KINDS: Final = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "a list in a list",
}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, in which no name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _unfit(text: str) -> str | None:
    """Why a text cannot be sent or stored."""
    if "\0" in text:
        return "holds a NUL character"
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        return "is not UTF-8: save the sheet as UTF-8"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "holds half a character (a lone surrogate)"
    return None


def _text(data: bytes) -> str:
    """Bytes that are not UTF-8 become surrogates, so that each is found in its own cell."""
    return data.decode("utf-8-sig", errors="surrogateescape")


def _foreign(data: bytes) -> Sheet | None:
    for mark, message in _FOREIGN.items():
        if data.startswith(mark):
            return Sheet(columns=(), rows=(), problems=(Problem(0, "", f"the file {message}"),))
    return None
